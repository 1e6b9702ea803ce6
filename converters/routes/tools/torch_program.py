"""A torch model as an exported program, with the batch free where the model lets it be.

Owns the three ways there: an eager module is exported, a ScriptModule goes through torch's own
converter of its graph, and a `.pt2` is one already. An axis is left free by `Dim.AUTO`: torch
fixes it silently where the model needs it fixed, so what came of it is looked at, and a model
whose batch is fixed is exported with one row.

Source: torch 2.13 `torch/export/__init__.py`, `torch/_export/converter.py`.
"""

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from converters.errors import SourceError
from converters.routes.tools.torch_source import DATATYPES, TorchModel, _Flat, describe_value
from converters.task import ModelFormat
from platforms.artifact import TensorSpec


@dataclass
class Program:
    """An exported program and its tensors, named as the manifest names them."""

    program: Any
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    operators: dict[str, int]
    """By torch's names, such as `aten.linear.default`."""
    notes: list[str]

    @property
    def is_batch_free(self) -> bool:
        """Say whether axis 0 of every input is free."""
        return all(spec.has_free_batch for spec in self.inputs)


def export_program(model: TorchModel) -> Program:
    """Export a model, with the axes free that it leaves free.

    Raises:
        SourceError: its inputs or outputs are no tensors.
    """
    notes: list[str] = []
    program = model.program or _export(model, model.example, is_free=True)
    if model.is_batch_free and not _has_free_batch(program, len(model.example)):
        notes.append("the batch is fixed at 1: the model does not work for every length")
        program = _export(model, model.make_rows(1), is_free=False)
    return describe_program(program, model, notes)


def export_rows(model: TorchModel, rows: int) -> Any:
    """Return an eager module for exporters that fix the batch: `make_rows(rows)` runs through it.

    A ScriptModule is converted with that many rows, as its graph may depend on them.
    """
    if model.format is ModelFormat.TORCHSCRIPT:
        return _export(model, model.make_rows(rows), is_free=False).module()
    return model.module


def _export(model: TorchModel, example: tuple[torch.Tensor, ...], *, is_free: bool) -> Any:
    module = model.module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if model.format is ModelFormat.TORCHSCRIPT:
            module = _convert_script(module, example)
        shapes: Any = None
        if is_free:
            shapes = tuple(
                dict.fromkeys(sorted(axes), torch.export.Dim.AUTO) for axes in model.free_axes
            )
            # `*args` is one parameter.
            shapes = (shapes,) if isinstance(module, _Flat) else shapes
        return torch.export.export(module, example, dynamic_shapes=shapes)


def _convert_script(module: Any, example: tuple[torch.Tensor, ...]) -> Any:
    # torch.export refuses a ScriptModule and names this class, which is private.
    from torch._export.converter import TS2EPConverter

    return TS2EPConverter(module, example).convert().module(check_guards=False)


def _has_free_batch(program: Any, count: int) -> bool:
    nodes = {node.name: node.meta.get("val") for node in program.graph.nodes}
    values = [nodes.get(name) for name in program.graph_signature.user_inputs]
    return len(values) == count and all(
        value is not None and len(value.shape) and not isinstance(value.shape[0], int)
        for value in values
    )


def describe_program(program: Any, model: TorchModel, notes: list[str]) -> Program:
    """Return a program with its tensors under the model's names.

    Raises:
        SourceError: a tensor has no datatype here.
    """
    nodes = {node.name: node.meta.get("val") for node in program.graph.nodes}
    signature = program.graph_signature
    inputs = [
        _to_spec(name, nodes.get(str(own)))
        for name, own in zip(model.input_names, signature.user_inputs, strict=True)
    ]
    outputs = [
        _to_spec(name, nodes.get(str(own)))
        for name, own in zip(model.name_outputs(), signature.user_outputs, strict=True)
    ]
    for declared, axes, spec in zip(model.inputs, model.free_axes, inputs, strict=True):
        fixed = [axis for axis in sorted(axes - {0}) if spec.shape[axis] >= 0]
        if fixed:
            notes.append(f"{declared.name}: axis {fixed} is fixed by the model")
    operators = Counter(
        str(node.target) for node in program.graph.nodes if node.op == "call_function"
    )
    return Program(program, inputs, outputs, dict(operators), notes)


def _to_spec(name: str, value: Any) -> TensorSpec:
    found = describe_value(name, value)
    if found.datatype is None or found.shape is None:
        msg = f"{name} is a {type(value).__name__}, not a tensor of a known type"
        raise SourceError(msg)
    return TensorSpec(name, found.datatype, found.shape)


def describe_rows(model: TorchModel, rows: int) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return inputs and outputs as they are with that many rows: no axis is free."""
    example = model.make_rows(rows)
    found = model.run(example)
    pairs = (
        zip(model.input_names, example, strict=True),
        zip(model.name_outputs(), found, strict=True),
    )
    inputs, outputs = (
        [TensorSpec(name, DATATYPES[value.dtype], tuple(value.shape)) for name, value in side]
        for side in pairs
    )
    return inputs, outputs
