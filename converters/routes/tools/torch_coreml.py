"""torch → Core ML, an ML program in a `.mlpackage` folder.

Owns the ways in (an eager module is traced; a `.pt2` is read as an exported program, because a
trace of it fixes the batch), the free batch as a range, and the manifest's names. 64-bit whole
numbers become 32-bit. Core ML itself is not needed: on Linux nothing runs the result.

Options: as in `torch_source`; `precision` (`fp32`, or `fp16`), `max_batch` (64).

Source: coremltools 9.0 `ct.convert`; https://github.com/apple/coremltools/issues/2517 for `alias`.
"""

import re
import warnings
from collections import Counter
from typing import Any

import numpy as np

from converters.errors import OperatorError
from converters.routes.tools.telling import compare_types, tell
from converters.routes.tools.torch_program import Program, export_program
from converters.routes.tools.torch_script import trace
from converters.routes.tools.torch_source import TorchModel, load_torch
from converters.task import Facts, ModelFormat, Task
from platforms.artifact import Datatype, Precision, TensorSpec

_MAX_BATCH = 64
_MISSING = re.compile(r"convert function for op '([^']+)' not implemented")
_UNSUPPORTED = re.compile(r"Unsupported fx node (\S+), kind (\S+)")
_TYPES = {
    Datatype.FP32: (Datatype.FP32, np.float32),
    Datatype.FP64: (Datatype.FP32, np.float32),
    Datatype.FP16: (Datatype.FP16, np.float16),
    Datatype.BOOL: (Datatype.INT32, np.int32),
    Datatype.UINT8: (Datatype.INT32, np.int32),
    Datatype.INT8: (Datatype.INT32, np.int32),
    Datatype.INT16: (Datatype.INT32, np.int32),
    Datatype.INT32: (Datatype.INT32, np.int32),
    Datatype.INT64: (Datatype.INT32, np.int32),
}
"""What Core ML has in place of each type."""


def convert(task: Task) -> Facts:
    """Write a `.mlpackage` folder.

    Raises:
        OperatorError: coremltools has no form of an operator.
    """
    task.report(0.0, "reading the model")
    model = load_torch(task)
    made = export_program(model)
    task.report(0.3, "converting")
    is_half = task.options.get("precision") == Precision.FP16.value
    package = _convert(model, made, int(task.options.get("max_batch", _MAX_BATCH)), is_half)
    package.save(str(task.target))
    inputs, outputs = ([_retype(spec) for spec in side] for side in (made.inputs, made.outputs))
    notes = compare_types([*made.inputs, *made.outputs], [*inputs, *outputs])
    return tell(
        inputs,
        outputs,
        _count_operators(package),
        Precision.FP16 if is_half else model.find_precision(),
        ["torch", "coremltools"],
        [*made.notes, *notes],
    )


def _retype(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.name, _TYPES[spec.datatype][0], spec.shape)


def _convert(model: TorchModel, made: Program, max_batch: int, is_half: bool) -> Any:
    import coremltools as ct

    if model.format is ModelFormat.TORCH_EXPORT:
        _register_alias()
        given = made.program.run_decompositions({})
    else:
        rows = model.example if made.is_batch_free else model.make_rows(1)
        given = trace(model.module, rows)
    inputs = [_describe_input(spec, made.is_batch_free, max_batch) for spec in made.inputs]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ct.convert(
                given,
                convert_to="mlprogram",
                inputs=inputs,
                outputs=[ct.TensorType(name=spec.name) for spec in made.outputs],
                minimum_deployment_target=ct.target.iOS16,
                compute_precision=ct.precision.FLOAT16 if is_half else ct.precision.FLOAT32,
            )
    except (NotImplementedError, ValueError, RuntimeError) as exc:
        found = _MISSING.search(str(exc)) or _UNSUPPORTED.search(str(exc))
        if found is None:
            raise
        msg = f"coremltools has no form of {found[1]}"
        raise OperatorError(msg, found[1]) from exc


def _describe_input(spec: TensorSpec, is_batch_free: bool, max_batch: int) -> Any:
    import coremltools as ct

    rest = [max(axis, 1) for axis in spec.shape[1:]]
    first = ct.RangeDim(1, max_batch, default=1) if is_batch_free else max(spec.shape[0], 1)
    return ct.TensorType(name=spec.name, shape=(first, *rest), dtype=_TYPES[spec.datatype][1])


def _register_alias() -> None:
    """Teach coremltools torch's `alias`, until #2517 is closed."""
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import (
        _TORCH_OPS_REGISTRY,
        register_torch_op,
    )

    if "alias" in _TORCH_OPS_REGISTRY:
        return

    @register_torch_op  # type: ignore[untyped-decorator]
    def alias(context: Any, node: Any) -> None:
        context.add(_get_inputs(context, node, expected=1)[0], node.name)


def _count_operators(package: Any) -> dict[str, int]:
    program = package.get_spec().mlProgram
    counted: Counter[str] = Counter()
    for function in program.functions.values():
        for block in function.block_specializations.values():
            counted.update(operation.type for operation in block.operations)
    return {name: count for name, count in counted.items() if name != "const"}
