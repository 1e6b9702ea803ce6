"""A torch model in the child process, whatever form it was given in.

Owns the contract of the Python file (`FILE.py:NAME`): NAME is called without arguments and returns

    an nn.Module, or (nn.Module, example_inputs)

and beside it the file may define

    MANIFEST           a JSON-ready mapping: name, version, description, license, inputs, outputs,
                       preprocess, postprocess, labels, …; a tensor is a name, or
                       {"name", "datatype", "shape"} with −1 for a free axis
    example_inputs()   a tensor, a tuple of them, or name → tensor, by the names of `forward`

Example inputs come from the option `examples` (an .npz), the function's own, `example_inputs()`,
what a .pt2 was saved with, or, by the declared shapes, from a fixed seed; in this order. One row
suffices where axis 0 is the batch: it is repeated, as tracing with one row fixes it.

Options of every tool on torch: `inputs` and `outputs` (tensors as in MANIFEST; they go before it),
`examples` (path of an .npz with an array per input).

Runs the user's Python file. Weights are read by `weights_only` and safetensors; a pickled module
is refused.
"""

import importlib.util
import inspect
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import numpy as np
import torch

from converters.errors import OversizedTensorError, PickledModelError, SourceError
from converters.routes.tools.safetensors_file import is_safetensors, read_safetensors
from converters.task import ModelFormat, Task
from platforms.artifact import Datatype, Precision

_ORIGIN = "EDGEWARD_SOURCE_FOLDER"
"""The original's folder, as the hop tells it."""
_SEED = 7
_LARGEST_ID = 2
"""Random whole numbers are 0 or 1: valid in any table."""
_FREE_AXIS = 2
"""Length of a free axis in a random example."""
_PROGRAM_ERRORS = (RuntimeError, ValueError, KeyError, TypeError, AssertionError, OSError)

DATATYPES: Mapping[Any, Datatype] = {
    torch.bool: Datatype.BOOL,
    torch.uint8: Datatype.UINT8,
    torch.int8: Datatype.INT8,
    torch.int16: Datatype.INT16,
    torch.int32: Datatype.INT32,
    torch.int64: Datatype.INT64,
    torch.float16: Datatype.FP16,
    torch.bfloat16: Datatype.BF16,
    torch.float32: Datatype.FP32,
    torch.float64: Datatype.FP64,
}
_DTYPES = {datatype: dtype for dtype, datatype in DATATYPES.items()}


@dataclass
class Tensor:
    """One input or output as declared, in part or whole."""

    name: str
    datatype: Datatype | None = None
    shape: tuple[int, ...] | None = None

    @property
    def free_axes(self) -> frozenset[int] | None:
        """Return the axes that are declared free, or None where no shape is declared."""
        if self.shape is None:
            return None
        return frozenset(axis for axis, length in enumerate(self.shape) if length < 0)


@dataclass
class TorchModel:
    """A model, its inputs and what is said of it."""

    format: ModelFormat
    module: Any
    """An eager module, a ScriptModule, or, of a .pt2, its unlifted module."""
    program: Any
    """The ExportedProgram of a .pt2, else None."""
    example: tuple[torch.Tensor, ...]
    """Two rows or more where the batch is free."""
    inputs: list[Tensor]
    free_axes: list[frozenset[int]]
    """Of each input: the axes that may have any length."""
    declared_outputs: list[Tensor]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def input_names(self) -> list[str]:
        """Return the inputs' names in the model's order."""
        return [tensor.name for tensor in self.inputs]

    @property
    def is_batch_free(self) -> bool:
        """Say whether axis 0 of every input is free."""
        return all(0 in axes for axes in self.free_axes)

    def make_rows(self, count: int) -> tuple[torch.Tensor, ...]:
        """Return the example with `count` rows where the batch is free, else as it is."""
        return tuple(
            value[torch.arange(count) % len(value)] if 0 in axes else value
            for value, axes in zip(self.example, self.free_axes, strict=True)
        )

    def run(self, rows: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Run the model; its outputs in order, whatever it returns them in."""
        with torch.inference_mode():
            return flatten(self.module(*rows))[0]

    def name_outputs(self) -> list[str]:
        """Return the outputs' names: declared, the model's own keys, or `output`, `output_1`….

        Raises:
            SourceError: another number of outputs is declared than the model has.
        """
        with torch.inference_mode():
            values, keys = flatten(self.module(*self.example))
        names = [tensor.name for tensor in self.declared_outputs]
        if names and len(names) != len(values):
            msg = f"the model gives {len(values)} tensors, MANIFEST names {len(names)} outputs"
            raise SourceError(msg)
        counted = ["output", *(f"output_{n}" for n in range(1, len(values)))]
        return names or keys or counted

    def find_precision(self) -> Precision:
        """Return the precision that most of the weights' bytes have."""
        sizes: dict[Any, int] = {}
        for value in self.iterate_weights():
            sizes[value.dtype] = sizes.get(value.dtype, 0) + value.numel() * value.element_size()
        largest = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
        known = {
            torch.float16: Precision.FP16,
            torch.bfloat16: Precision.BF16,
            torch.int8: Precision.INT8,
        }
        return known.get(largest, Precision.FP32)

    def iterate_weights(self) -> list[torch.Tensor]:
        """Return parameters, buffers and constants."""
        if self.program is not None:
            kept = [*self.program.state_dict.values(), *self.program.constants.values()]
            return [value for value in kept if isinstance(value, torch.Tensor)]
        return [*self.module.parameters(), *self.module.buffers()]


def flatten(found: Any) -> tuple[list[torch.Tensor], list[str]]:
    """Return the tensors of what a module returned, and their keys where it is a mapping.

    Raises:
        SourceError: there is something else than tensors in it.
    """
    keys: list[str] = []
    values: list[Any]
    if isinstance(found, torch.Tensor):
        values = [found]
    elif isinstance(found, Mapping):
        keys, values = [str(key) for key in found], [*found.values()]
    elif isinstance(found, Sequence):
        values = [*found]
    else:
        values = [found]
    for value in values:
        if not isinstance(value, torch.Tensor):
            msg = (
                f"the model gives a {type(value).__name__}: wrap it in a module that gives a tensor"
                ", a tuple of tensors, or name → tensor"
            )
            raise SourceError(msg)
    return values, keys


class _Flat(torch.nn.Module):
    """A module whose outputs are a tuple, for exporters that know no mapping."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(flatten(self.module(*args))[0])


def load_torch(task: Task) -> TorchModel:
    """Read a task's source; blocks, and runs the user's file where there is one.

    Raises:
        SourceError: it is not what it should be, or its inputs' shapes are not known.
        PickledModelError, OversizedTensorError: weights that are not read.
    """
    # The fused path of nn.TransformerEncoderLayer has one operator that no target knows.
    torch.backends.mha.set_fastpath_enabled(False)
    torch.manual_seed(_SEED)
    source = task.source
    if source.format in (ModelFormat.CALLABLE, ModelFormat.STATE_DICT):
        return _load_function(task)
    if source.format is ModelFormat.TORCHSCRIPT:
        return _load_script(task)
    return _load_program(task)


def _load_function(task: Task) -> TorchModel:
    source = task.source
    file = _import_file(source.builder or source.path, os.environ.get(_ORIGIN))
    built = getattr(file, source.name or "")()
    module, given = built if isinstance(built, tuple) else (built, None)
    if not isinstance(module, torch.nn.Module):
        msg = f"{source.name}() gave a {type(module).__name__}, not an nn.Module"
        raise SourceError(msg)
    if source.format is ModelFormat.STATE_DICT:
        _load_weights(module, source.path)
    if given is None and hasattr(file, "example_inputs"):
        given = file.example_inputs()
    manifest = _read_manifest(file)
    names = _read_parameters(module.forward)
    module = module.eval().requires_grad_(False)
    model = _assemble(task, module, None, given, names, manifest)
    with torch.inference_mode():
        if isinstance(module(*model.example), Mapping):
            names_out = [Tensor(name) for name in model.name_outputs()]
            model.declared_outputs = model.declared_outputs or names_out
            model.module = _Flat(module).eval()
    return model


def _import_file(path: Path, origin: str | None) -> ModuleType:
    """Run the user's file, with its original place as its own."""
    place = Path(origin) / path.name if origin else path
    if origin:
        # Last: what lies beside the file hides no installed package.
        sys.path.append(origin)
    name = f"edgeward_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        msg = f"{path.name} cannot be imported"
        raise SourceError(msg)
    module = importlib.util.module_from_spec(spec)
    # What lies beside the original is found by `__file__`; the code that runs is the copy's.
    module.__file__ = str(place)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _read_manifest(file: ModuleType) -> dict[str, Any]:
    found = getattr(file, "MANIFEST", {})
    try:
        read = json.loads(json.dumps(found))
    except (TypeError, ValueError) as exc:
        msg = f"MANIFEST is not JSON-ready: {exc}"
        raise SourceError(msg) from exc
    if not isinstance(read, dict):
        msg = f"MANIFEST is a {type(found).__name__}, not a mapping"
        raise SourceError(msg)
    return read


def _read_parameters(function: Any) -> list[str]:
    """Return the names of a function's positional parameters."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in found if parameter.kind in kinds]


def _load_weights(module: torch.nn.Module, path: Path) -> None:
    if is_safetensors(path):
        weights: Any = read_safetensors(path)
    else:
        weights = _load_safely(path)
    verify_storage(path.name, weights)
    try:
        module.load_state_dict(weights, strict=True)
    except RuntimeError as exc:
        msg = f"the weights of {path.name} do not fit the module: {exc}"
        raise SourceError(msg) from exc


def _load_safely(path: Path) -> Any:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as exc:
        msg = f"{path.name} holds more than tensors and is not loaded: save its state_dict()"
        raise PickledModelError(msg) from exc
    except (*_PROGRAM_ERRORS, EOFError) as exc:
        msg = f"{path.name} cannot be read: {exc}"
        raise SourceError(msg) from exc
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        msg = f"{path.name} holds no state dict"
        raise SourceError(msg)
    # Checkpoints of training loops keep the weights under a key of their own.
    inner = [weights[key] for key in ("state_dict", "model") if isinstance(weights.get(key), dict)]
    return inner[0] if inner else weights


def verify_storage(name: str, weights: Mapping[str, Any]) -> None:
    """Refuse tensors that stand for more than is stored, by a stride of 0 or a sparse layout.

    Raises:
        OversizedTensorError: one does.
        SourceError: one is no tensor.
    """
    for key, value in weights.items():
        if not isinstance(value, torch.Tensor):
            msg = f"{name}: {key} is a {type(value).__name__}, no tensor"
            raise SourceError(msg)
        if value.layout is not torch.strided or value.device.type == "meta":
            msg = f"{name}: the tensor {key} is stored as {value.layout} on {value.device.type}"
            raise OversizedTensorError(msg)
        declared, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if declared > held:
            msg = f"{name} declares the tensor {key!r} with {declared} bytes and holds {held}"
            raise OversizedTensorError(msg)


def _load_script(task: Task) -> TorchModel:
    path = task.source.path
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            loaded = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
            module = loaded.eval()
    except _PROGRAM_ERRORS as exc:
        msg = f"torch refuses {path.name}: {exc}"
        raise SourceError(msg) from exc
    verify_storage(path.name, dict(module.named_parameters()) | dict(module.named_buffers()))
    # The first is the module itself; `x.1` is what tracing makes of `x`.
    names = [value.debugName().partition(".")[0] for value in module.graph.inputs()][1:]
    return _assemble(task, module, None, None, names, {})


def _load_program(task: Task) -> TorchModel:
    path = task.source.path
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        # An open file: torch warns about any name that does not end in .pt2.
        with path.open("rb") as file:
            program = torch.export.load(file)
    except (*_PROGRAM_ERRORS, UnpicklingError) as exc:
        msg = f"torch refuses {path.name}: {exc}"
        raise SourceError(msg) from exc
    verify_storage(path.name, {k: v for k, v in program.state_dict.items() if v is not None})
    nodes = {node.name: node.meta.get("val") for node in program.graph.nodes}
    names = [str(name) for name in program.graph_signature.user_inputs]
    own = [describe_value(name, nodes.get(name)) for name in names]
    given = program.example_inputs[0] if program.example_inputs else None
    return _assemble(task, program.module(), program, given, names, {}, own)


def describe_value(name: str, value: Any) -> Tensor:
    """Return a tensor's name, datatype and shape by the program's own record of it."""
    if not hasattr(value, "dtype"):
        return Tensor(name)
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in value.shape)
    return Tensor(name, DATATYPES.get(value.dtype), shape)


def _assemble(
    task: Task,
    module: Any,
    program: Any,
    given: Any,
    names: list[str],
    manifest: dict[str, Any],
    own: list[Tensor] | None = None,
) -> TorchModel:
    """Bring together what the options, the file and the model itself say."""
    options = task.options
    declared = _read_tensors(options.get("inputs") or manifest.get("inputs") or [])
    example = _find_example(options, given, names, own or declared)
    inputs = _match_inputs(declared, own, names, len(example))
    free_axes = _find_free_axes(own or declared, example)
    model = TorchModel(
        format=task.source.format,
        module=module,
        program=program,
        example=example,
        inputs=inputs,
        free_axes=free_axes,
        declared_outputs=_read_tensors(options.get("outputs") or manifest.get("outputs") or []),
        manifest=manifest,
    )
    longest = max((len(value) for value in example if value.dim()), default=1)
    model.example = model.make_rows(max(2, longest))
    return model


def _read_tensors(given: Any) -> list[Tensor]:
    """Return tensors from names, or from mappings as the manifest has them."""
    found = []
    for item in given:
        if isinstance(item, str):
            found.append(Tensor(item))
            continue
        datatype, shape = item.get("datatype"), item.get("shape")
        found.append(
            Tensor(
                item["name"],
                None if datatype is None else Datatype(datatype),
                None if shape is None else tuple(int(axis) for axis in shape),
            )
        )
    return found


def _find_example(
    options: Mapping[str, Any], given: Any, names: list[str], known: list[Tensor]
) -> tuple[torch.Tensor, ...]:
    if options.get("examples"):
        return _read_examples(Path(options["examples"]), known, names)
    if given is not None:
        return _to_tuple(given, names)
    if known and all(tensor.shape is not None for tensor in known):
        return tuple(_make_random(tensor) for tensor in known)
    msg = (
        "the shapes of the inputs are not known: define example_inputs() or MANIFEST['inputs'] "
        "with shapes in the Python file, or give the inputs with their shapes"
    )
    raise SourceError(msg)


def _read_examples(path: Path, known: list[Tensor], names: list[str]) -> tuple[torch.Tensor, ...]:
    wanted = [tensor.name for tensor in known] or names
    with np.load(path, allow_pickle=False) as found:
        missing = [name for name in wanted if name not in found]
        if missing:
            msg = f"{path.name} has no array for the input {', '.join(missing)}"
            raise SourceError(msg)
        return tuple(torch.from_numpy(np.ascontiguousarray(found[name])) for name in wanted)


def _to_tuple(given: Any, names: list[str]) -> tuple[torch.Tensor, ...]:
    if isinstance(given, torch.Tensor):
        values: tuple[Any, ...] = (given,)
    elif isinstance(given, Mapping):
        values = tuple(given[name] for name in names if name in given)
        if len(values) != len(given):
            msg = f"example_inputs() names {sorted(given)}, forward takes {names}"
            raise SourceError(msg)
    else:
        values = tuple(given)
    for value in values:
        if not isinstance(value, torch.Tensor):
            msg = f"an example input is a {type(value).__name__}, not a tensor"
            raise SourceError(msg)
    return values


def _make_random(tensor: Tensor) -> torch.Tensor:
    shape = [length if length > 0 else _FREE_AXIS for length in tensor.shape or ()]
    dtype = _DTYPES[tensor.datatype or Datatype.FP32]
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, _LARGEST_ID, shape).to(dtype)


def _match_inputs(
    declared: list[Tensor], own: list[Tensor] | None, names: list[str], count: int
) -> list[Tensor]:
    """Return one declared or nameless tensor for each example.

    Raises:
        SourceError: another number is declared.
    """
    inputs = declared or own or [Tensor(name) for name in names[:count]]
    if len(inputs) != count:
        msg = (
            f"the model is given {count} tensors, and {len(inputs)} inputs are named: "
            f"{', '.join(tensor.name for tensor in inputs)}"
        )
        raise SourceError(msg)
    return inputs


def _find_free_axes(known: list[Tensor], example: tuple[torch.Tensor, ...]) -> list[frozenset[int]]:
    """Return each input's free axes: as declared, else axis 0 where all have the same length."""
    lengths = {len(value) if value.dim() else None for value in example}
    default = frozenset({0}) if len(lengths) == 1 and None not in lengths else frozenset[int]()
    if len(known) != len(example):
        return [default for _ in example]
    return [default if (axes := tensor.free_axes) is None else axes for tensor in known]
