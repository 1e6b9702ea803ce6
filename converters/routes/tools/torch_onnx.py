"""torch → ONNX by the exporter on exported programs.

Owns what the artifact is held to beyond the exporter's own work: one file below 2 GB, an IR
version that older runtimes read, the manifest's names in its order, the free axis called `batch`,
no batch normalization left, and no paths of this machine in it (the exporter writes stack traces).

Options: as in `torch_source`, and `opset` (18).

Source: torch 2.13 `torch/onnx/_internal/exporter`; the settings are measured (models.md).
"""

import re
from pathlib import Path
from typing import Any

import onnx
import torch

from converters.errors import OperatorError
from converters.routes.tools.onnx_specs import read_specs
from converters.routes.tools.telling import tell
from converters.routes.tools.torch_program import Program, export_program
from converters.routes.tools.torch_source import load_torch
from converters.task import Facts, Task

_OPSET = 18
_IR_VERSION_HIGHEST = 10
"""onnxruntime 1.18 (2024) reads no higher one."""
_ONE_FILE_BYTES = 1_900_000_000
"""Beyond 2 GB protobuf has no message."""
_DISPATCH = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")
_NODE = re.compile(r"Error when translating node %(\S+)")


def convert(task: Task) -> Facts:
    """Write an ONNX file.

    Raises:
        OperatorError: the exporter has no form of an operator.
    """
    task.report(0.0, "reading the model")
    model = load_torch(task)
    task.report(0.2, "exporting")
    made = export_program(model)
    task.report(0.5, "translating to ONNX")
    size = sum(value.numel() * value.element_size() for value in model.iterate_weights())
    _export(
        made, task.target, int(task.options.get("opset", _OPSET)), is_large=size > _ONE_FILE_BYTES
    )
    task.report(0.9, "checking")
    notes = [*made.notes, *_finish(task.target, made)]
    operators = read_specs(task.target)[2]
    return tell(
        made.inputs,
        made.outputs,
        operators,
        model.find_precision(),
        ["torch", "onnx", "onnxscript"],
        notes,
    )


def _export(made: Program, target: Path, opset: int, *, is_large: bool) -> None:
    try:
        torch.onnx.export(
            made.program,
            (),
            str(target),
            dynamo=True,
            external_data=is_large,
            opset_version=opset,
            input_names=[spec.name for spec in made.inputs],
            output_names=[spec.name for spec in made.outputs],
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as exc:
        found = find_operator(str(exc))
        if found is None:
            raise
        operator, node = found
        msg = f"torch's ONNX exporter has no form of {operator} (node {node or 'unknown'})"
        raise OperatorError(msg, operator, node) from exc


def find_operator(message: str) -> tuple[str, str] | None:
    """Return operator and node that the exporter's message names, or None."""
    operator, node = _DISPATCH.search(message), _NODE.search(message)
    if operator is None:
        return None
    return operator[1], node[1] if node else ""


def _finish(path: Path, made: Program) -> list[str]:
    """Bring the file into the form that artifacts have; return notes."""
    model = onnx.load(path, load_external_data=False)
    if model.ir_version > _IR_VERSION_HIGHEST:
        model.ir_version = _IR_VERSION_HIGHEST
    _strip(model)
    _name_batch(model, made)
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    left = sum(node.op_type == "BatchNormalization" for node in model.graph.node)
    if not left:
        return []
    return [f"{left} batch normalizations are not folded into what is before them"]


def _strip(model: Any) -> None:
    """Remove stack traces and other notes of the exporter's, which name files of this machine."""
    for function in model.functions:
        _strip_nodes(function.node)
    _strip_nodes(model.graph.node)
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.ClearField("metadata_props")
    for tensor in model.graph.initializer:
        tensor.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    model.ClearField("metadata_props")


def _strip_nodes(nodes: Any) -> None:
    for node in nodes:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _strip_nodes(attribute.g.node)


def _name_batch(model: Any, made: Program) -> None:
    """Call the free axis 0 of every input `batch`, everywhere it stands."""
    if not made.is_batch_free:
        return
    own = {value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input}
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in own:
                axis.dim_param = "batch"
