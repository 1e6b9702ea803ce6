"""ONNX, SavedModel and TFLite → OpenVINO IR: an `.xml` with its `.bin` beside.

Weights keep their precision: OpenVINO's own default halves them and says nothing.

Options: `inputs` and `outputs`, names in order, for sources that name them otherwise (SavedModel,
TFLite).
"""

import importlib
import math
import re
from collections import Counter
from typing import Any

import numpy as np

from converters.errors import HopFailedError, OperatorError, SourceError
from converters.routes.tools.telling import tell
from converters.task import Facts, ModelFormat, Task
from platforms.artifact import Precision, TensorSpec
from platforms.runtimes.base import DATATYPES
from platforms.telemetry import forbid_telemetry

_MISSING = re.compile(r"No conversion rule found for operations: (.+)")

_PRECISIONS = {
    "f16": Precision.FP16,
    "bf16": Precision.BF16,
    "i8": Precision.INT8,
    "u8": Precision.INT8,
    "i4": Precision.INT4_WEIGHTS,
    "u4": Precision.INT4_WEIGHTS,
}


def convert(task: Task) -> Facts:
    """Write an IR.

    Raises:
        OperatorError: OpenVINO has no form of an operator.
        SourceError: OpenVINO cannot read the source.
    """
    import openvino as ov

    task.report(0.1, "converting")
    model = read_model(task)
    for side in ("inputs", "outputs"):
        _name(getattr(model, side), _list_names(task.options.get(side) or []))
    ov.save_model(model, str(task.target), compress_to_fp16=False)
    return describe_model(model)[0]


def read_model(task: Task) -> Any:
    """Return a task's source as OpenVINO reads it.

    Raises:
        OperatorError: OpenVINO has no form of an operator.
        SourceError: OpenVINO cannot read the source.
    """
    forbid_telemetry()
    import openvino as ov

    try:
        if task.source.format is ModelFormat.OPENVINO:
            return ov.Core().read_model(str(task.source.path))
        return ov.convert_model(str(task.source.path))
    except _collect_errors(ov) as exc:
        found = _MISSING.search(str(exc))
        if found is not None:
            operator = found[1].strip().removesuffix(".")
            msg = f"OpenVINO has no form of {operator}"
            raise OperatorError(msg, operator) from exc
        msg = f"OpenVINO cannot read {task.source.path.name}: {exc}"
        raise SourceError(msg) from exc


def _collect_errors(library: Any) -> tuple[type[Exception], ...]:
    """Return what OpenVINO's front ends raise; its classes share no base of their own."""
    known = vars(importlib.import_module(f"{library.__name__}.frontend"))
    own = (kind for name, kind in known.items() if name.endswith("Failure"))
    return (*own, RuntimeError, ValueError, TypeError)


def describe_model(model: Any) -> tuple[dict[str, Any], int, int]:
    """Return the facts about a model, how many numbers its weights are, and their bytes."""
    operators: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    count = 0
    for node in model.get_ops():
        kind = node.get_type_name()
        if kind == "Constant":
            element = node.get_output_element_type(0)
            numbers = math.prod(node.get_output_shape(0))
            count += numbers
            sizes[element.get_type_name()] += numbers * element.bitwidth // 8
        elif kind not in ("Parameter", "Result"):
            operators[kind] += 1
    largest = max(sizes, key=lambda name: sizes[name], default="f32")
    facts = tell(
        [_to_spec(port) for port in model.inputs],
        [_to_spec(port) for port in model.outputs],
        operators,
        _PRECISIONS.get(largest, Precision.FP32),
        ["openvino"],
    )
    return facts, count, sum(sizes.values())


def _list_names(given: list[Any]) -> list[str]:
    return [item if isinstance(item, str) else item["name"] for item in given]


def _name(ports: Any, names: list[str]) -> None:
    """Give each tensor one name: its own one of these, or, where none is its own, by order.

    Raises:
        HopFailedError: there is another number of them, or only some are known.
    """
    own = {name: port for port in ports for name in port.get_names()}
    known = [name in own for name in names]
    if names and (len(names) != len(ports) or any(known) != all(known)):
        msg = f"the model has the tensors {', '.join(own)}, and {', '.join(names)} are wanted"
        raise HopFailedError(msg)
    if names and not any(known):
        chosen = [*zip(ports, names, strict=True)]
    elif names:
        chosen = [(own[name], name) for name in names]
    else:
        # A SavedModel's tensor is both `x` and `x:0`; which one is given is left to chance.
        chosen = [
            (port, min(port.get_names(), key=lambda name: (":" in name, len(name), name)))
            for port in ports
            if port.get_names()
        ]
    for port, name in chosen:
        port.get_tensor().set_names({name})


def _to_spec(port: Any) -> TensorSpec:
    shape = tuple(
        -1 if axis.is_dynamic else int(axis.get_length()) for axis in port.get_partial_shape()
    )
    dtype = np.dtype(port.get_element_type().to_dtype())
    return TensorSpec(port.get_any_name(), DATATYPES[dtype], shape)
