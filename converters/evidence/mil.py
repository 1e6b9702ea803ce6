"""A reference interpreter of Core ML programs: what a `.mlpackage` computes, on any system.

Owns the walk over the program: constants once, then operator by operator. It is no Core ML: it
shows that the file holds the right computation, not what a Mac or an iPhone makes of it, and says
nothing of speed. 16 bits are kept as the program has them: an operator computes in float32, and
its result is rounded to float16 where the program says that it is one; overflow becomes infinite.

Invariants: an operator, or a parameter of one, that is not known is an error that names it, before
anything is run; it is never passed over. Loads torch and coremltools, so only a child process
imports what is in here.

Source: MIL.proto of coremltools 9.0.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import MilOperatorError, SourceError, ToolMissingError
from converters.evidence.mil_values import Value, get_datatype, is_half, read_shape, read_value
from converters.evidence.mil_weights import CONSTANTS
from platforms.artifact import TensorSpec, locate_model
from platforms.runtimes.base import DTYPES, Array

_DATA = Path("Data") / "com.apple.CoreML"
_NAME = "name"
_FAULTS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError)


@dataclass(frozen=True)
class _Step:
    """One operator, ready to be computed."""

    kind: str
    label: str
    """By which the program's own messages would call it."""
    arguments: Mapping[str, Sequence[str]]
    """Parameter → values by name; more than one where the parameter takes several."""
    settings: Mapping[str, Any]
    """Parameter → constant that stands in the operator itself."""
    outputs: tuple[str, ...]
    halves: tuple[bool, ...]
    """Whether each output is of 16 bits."""
    is_several: frozenset[str]
    """Parameters whose value is a list, whatever its length."""
    done_with: tuple[str, ...] = ()
    """Values that nothing reads any more afterwards."""


class MilProgram:
    """A program with its constants made dense, as float32 and integers."""

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        constants: Mapping[str, Any],
        steps: tuple[_Step, ...],
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._constants = constants
        self._steps = steps

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs, in the program's own types.

        Raises:
            MilOperatorError: an operator cannot be computed on these values; names it.
        """
        import torch

        values: dict[str, Any] = dict(self._constants)
        for spec in self.inputs:
            values[spec.name] = _to_tensor(np.ascontiguousarray(inputs[spec.name]))
        with torch.inference_mode():
            for step in self._steps:
                _compute(step, values)
        return {
            spec.name: values[spec.name].numpy().astype(DTYPES[spec.datatype])
            for spec in self.outputs
        }


def _compute(step: _Step, values: dict[str, Any]) -> None:
    from converters.evidence.mil_operators import OPERATORS

    arguments: dict[str, Any] = dict(step.settings)
    for name, given in step.arguments.items():
        several = [values[one] for one in given]
        arguments[name] = several if name in step.is_several else several[0]
    try:
        found = OPERATORS[step.kind](**arguments)
    except _FAULTS as exc:
        msg = f"operator {step.kind} ({step.label}) cannot be computed: {exc}"
        raise MilOperatorError(msg, step.kind, step.label) from exc
    results = found if isinstance(found, tuple | list) else (found,)
    for name, result, is_narrow in zip(step.outputs, results, step.halves, strict=True):
        values[name] = result.half().float() if is_narrow else result
    for name in step.done_with:
        values.pop(name, None)


def load_program(path: Path) -> MilProgram:
    """Read a `.mlpackage`.

    Args:
        path: the folder, or the file in it that stands for it.

    Raises:
        SourceError: it is no ML program, or its weights are not there.
        MilOperatorError: it has operators or parameters that are not known here; names them.
        ToolMissingError: coremltools or torch is not installed.
    """
    folder = locate_model(path)
    function = _read_function(folder)
    block = function.block_specializations[function.opset]
    constants: dict[str, Value] = {}
    steps: list[_Step] = []
    types = {item.name: item.type for item in function.inputs}
    for operation in block.operations:
        types.update({item.name: item.type for item in operation.outputs})
        if operation.type == "const":
            name = operation.outputs[0].name
            constants[name] = read_value(operation.attributes["val"], folder / _DATA)
        elif operation.type in CONSTANTS:
            name = operation.outputs[0].name
            constants[name] = _make_dense(operation, constants, folder / _DATA)
        else:
            steps.append(_read_step(operation, folder / _DATA))
    _refuse_unknown(steps)
    return MilProgram(
        _describe((item.name, types[item.name]) for item in function.inputs),
        _describe((name, types[name]) for name in block.outputs),
        {name: _to_value(value) for name, value in constants.items()},
        _mark_last_uses(steps, [*block.outputs, *constants]),
    )


def _read_function(folder: Path) -> Any:
    try:
        from coremltools.models.utils import load_spec
    except ImportError as exc:
        msg = f"reading Core ML needs coremltools: pip install 'edgeward[convert]' ({exc})"
        raise ToolMissingError(msg) from exc
    from google.protobuf.message import DecodeError

    try:
        spec = load_spec(str(folder))
    except (OSError, RuntimeError, ValueError, DecodeError) as exc:
        msg = f"{folder.name} cannot be read as Core ML: {exc}"
        raise SourceError(msg) from exc
    kind = spec.WhichOneof("Type")
    functions = dict(spec.mlProgram.functions) if kind == "mlProgram" else {}
    if len(functions) != 1:
        found = f"has {len(functions)} functions" if functions else f"is a {kind}"
        msg = f"{folder.name} {found}: the reference interpreter reads ML programs with one"
        raise SourceError(msg)
    return next(iter(functions.values()))


def _make_dense(operation: Any, constants: Mapping[str, Value], folder: Path) -> Value:
    arguments: dict[str, Value] = {
        name: read_value(value, folder)
        for name, value in operation.attributes.items()
        if name != _NAME
    }
    for name, argument in operation.inputs.items():
        binding = argument.arguments[0]
        is_named = binding.WhichOneof("binding") == "name"
        arguments[name] = constants[binding.name] if is_named else read_value(binding.value, folder)
    try:
        dense = CONSTANTS[operation.type](**arguments)
    except _FAULTS as exc:
        msg = f"{operation.type} ({operation.outputs[0].name}) cannot be computed: {exc!r}"
        raise MilOperatorError(msg, operation.type, operation.outputs[0].name) from exc
    return dense.astype(np.float16) if is_half(operation.outputs[0].type) else dense


def _read_step(operation: Any, folder: Path) -> _Step:
    arguments: dict[str, list[str]] = {}
    settings: dict[str, Any] = {
        name: _to_value(read_value(value, folder))
        for name, value in operation.attributes.items()
        if name != _NAME
    }
    several = set()
    for name, argument in operation.inputs.items():
        bindings = list(argument.arguments)
        if name == "values":
            several.add(name)
        if bindings[0].WhichOneof("binding") == "name":
            arguments[name] = [binding.name for binding in bindings]
        else:
            settings[name] = _to_value(read_value(bindings[0].value, folder))
    outputs = list(operation.outputs)
    return _Step(
        kind=operation.type,
        label=outputs[0].name if outputs else "",
        arguments=arguments,
        settings=settings,
        outputs=tuple(item.name for item in outputs),
        halves=tuple(is_half(item.type) for item in outputs),
        is_several=frozenset(several),
    )


def _refuse_unknown(steps: Sequence[_Step]) -> None:
    from converters.evidence.mil_operators import OPERATORS, find_unknown_parameters

    unknown = {step.kind: step.label for step in steps if step.kind not in OPERATORS}
    if unknown:
        named = ", ".join(f"{kind} ({label})" for kind, label in sorted(unknown.items()))
        msg = f"the reference interpreter does not know the operators {named}"
        raise MilOperatorError(msg, min(unknown), unknown[min(unknown)])
    for step in steps:
        more = find_unknown_parameters(step.kind, [*step.arguments, *step.settings])
        if more:
            msg = f"operator {step.kind} ({step.label}) has unknown parameters {', '.join(more)}"
            raise MilOperatorError(msg, step.kind, step.label)


def _mark_last_uses(steps: Sequence[_Step], kept: Sequence[str]) -> tuple[_Step, ...]:
    """Return the steps, each with what may be let go after it: memory stays that of a runtime."""
    seen = set(kept)
    marked: list[_Step] = []
    for step in reversed(steps):
        used = {name for names in step.arguments.values() for name in names} | {*step.outputs}
        marked.append(replace(step, done_with=tuple(sorted(used - seen))))
        seen |= used
    return tuple(reversed(marked))


def _describe(tensors: Any) -> tuple[TensorSpec, ...]:
    found = []
    for name, kind in tensors:
        datatype = get_datatype(kind)
        if datatype is None:
            msg = f"{name} is no tensor of a type that can be passed to a model here"
            raise SourceError(msg)
        found.append(TensorSpec(name, datatype, read_shape(kind)))
    return tuple(found)


def _to_value(value: Value) -> Any:
    return _to_tensor(value) if isinstance(value, np.ndarray) else value


def _to_tensor(array: Array) -> Any:
    """Return a torch tensor: float16 as float32, unsigned numbers as signed ones that hold them."""
    import torch

    wide = {"f": np.float32, "u": np.int64 if array.itemsize > 2 else np.int32}
    kind = array.dtype.kind
    with suppress(KeyError):
        array = array.astype(wide[kind])
    return torch.from_numpy(np.array(array))
