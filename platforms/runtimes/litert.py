"""LiteRT (TensorFlow Lite) behind `Runtime`.

Owns the choice between `ai_edge_litert` and the older `tflite_runtime`, a bounded pool of
interpreters, and the conversion at the edges of a quantized model. One interpreter serves
one run at a time; `invoke` releases Python's lock. A run cannot be stopped: a `RunStop`
set while it computes is seen after it.

The rule for quantized tensors: a session shows the file's own types, except where the
manifest declares FP32 for a tensor that the file keeps as int8, uint8 or int16 with one
scale: there the session takes and gives FP32, `round(x / scale) + zero_point`, saturated.

The rule for the batch: a file whose batch is fixed at 1 is run row by row where the
manifest declares a free batch; a free one is resized, which an interpreter keeps until
a run of another shape needs it.

Source: ai_edge_litert 2.3 (interpreter.py), https://ai.google.dev/edge/litert; that
`tflite_runtime` 2.14 passes its import under numpy 2 and fails at the first Interpreter is
our measurement, and so is that it answers garbage for per-channel dynamic-range INT8: the
parity gate before activation is for that, this module cannot see it.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from platforms.artifact import ArtifactFormat, Datatype, TensorSpec
from platforms.errors import InferenceError, ModelLoadError, RunStoppedError, RuntimeMissingError
from platforms.runtimes.base import (
    DATATYPES,
    PROOF_FOLDER,
    Array,
    Declared,
    LoadOptions,
    RunStop,
    Runtime,
    Session,
)

_LIBRARIES = ("ai_edge_litert", "tflite_runtime")
_CPU = "XNNPACK"
_ERRORS = (ValueError, RuntimeError, TypeError, OSError)
_QUANTIZED = (Datatype.INT8, Datatype.UINT8, Datatype.INT16)


@dataclass(frozen=True)
class _Tensor:
    """One input or output: where the interpreter has it, and how it is presented."""

    index: int
    stored: TensorSpec
    shown: TensorSpec
    scale: float
    zero_point: int

    @property
    def is_converted(self) -> bool:
        return self.stored.datatype is not self.shown.datatype

    def quantize(self, value: Array) -> Array:
        if not self.is_converted:
            return value
        dtype = next(kind for kind, known in DATATYPES.items() if known is self.stored.datatype)
        limits = np.iinfo(dtype)
        # In float64: float32 rounds the sum before it is cut off at the limits.
        steps = np.rint(value.astype(np.float64) / self.scale) + self.zero_point
        quantized: Array = np.clip(steps, limits.min, limits.max).astype(dtype)
        return quantized

    def dequantize(self, value: Array) -> Array:
        if not self.is_converted:
            return value
        shown: Array = ((value.astype(np.float64) - self.zero_point) * self.scale).astype(
            np.float32
        )
        return shown


class _Pool:
    """A bounded number of interpreters, each made when one is wanted and all are busy."""

    def __init__(self, make: Callable[[], Any], size: int) -> None:
        self._make = make
        self._idle: list[Any] = [make()]
        self._left = size - 1
        self._freed = threading.Condition()
        self._is_closed = False

    @contextmanager
    def borrow(self) -> Iterator[Any]:
        interpreter = self._take()
        try:
            yield interpreter
        finally:
            with self._freed:
                if not self._is_closed:
                    self._idle.append(interpreter)
                self._freed.notify()

    def _take(self) -> Any:
        with self._freed:
            self._freed.wait_for(lambda: self._idle or self._left or self._is_closed)
            if self._is_closed:
                msg = "the session is closed"
                raise InferenceError(msg)
            if self._idle:
                return self._idle.pop()
            self._left -= 1
        try:
            return self._make()
        except _ERRORS as exc:
            with self._freed:
                self._left += 1
            msg = f"LiteRT cannot make another interpreter: {exc}"
            raise InferenceError(msg) from exc

    def close(self) -> None:
        with self._freed:
            self._is_closed = True
            self._idle.clear()
            self._freed.notify_all()


class LitertSession(Session):
    """A pool of interpreters on one file, which they map into memory once."""

    def __init__(
        self, pool: _Pool, inputs: tuple[_Tensor, ...], outputs: tuple[_Tensor, ...], provider: str
    ) -> None:
        """Take over interpreters and the description of their tensors."""
        super().__init__(
            runtime=LitertRuntime.name,
            provider=provider,
            inputs=tuple(tensor.shown for tensor in inputs),
            outputs=tuple(tensor.shown for tensor in outputs),
        )
        self._pool = pool
        self._in = inputs
        self._out = outputs
        self._is_row_by_row = any(
            tensor.shown.has_free_batch and not tensor.stored.has_free_batch for tensor in inputs
        )

    def _run(self, inputs: Mapping[str, Array], stop: RunStop | None) -> dict[str, Array]:
        values = [tensor.quantize(inputs[tensor.shown.name]) for tensor in self._in]
        with self._pool.borrow() as interpreter:
            try:
                if not self._is_row_by_row:
                    found = self._invoke(interpreter, values)
                else:
                    found = self._invoke_rows(interpreter, values, stop)
            except _ERRORS as exc:
                msg = f"LiteRT failed: {exc}"
                raise InferenceError(msg) from exc
        return {
            tensor.shown.name: tensor.dequantize(value)
            for tensor, value in zip(self._out, found, strict=True)
        }

    def _invoke_rows(
        self, interpreter: Any, values: list[Array], stop: RunStop | None
    ) -> list[Array]:
        rows = []
        for row in range(len(values[0])):
            if stop is not None and stop.is_set:
                msg = f"the run was stopped after {row} of {len(values[0])} rows"
                raise RunStoppedError(msg)
            rows.append(self._invoke(interpreter, [value[row : row + 1] for value in values]))
        return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

    def _invoke(self, interpreter: Any, values: list[Array]) -> list[Array]:
        details = {item["index"]: tuple(item["shape"]) for item in interpreter.get_input_details()}
        changed = [
            (tensor.index, value.shape)
            for tensor, value in zip(self._in, values, strict=True)
            if details[tensor.index] != value.shape
        ]
        for index, shape in changed:
            interpreter.resize_tensor_input(index, shape)
        if changed:
            interpreter.allocate_tensors()
        for tensor, value in zip(self._in, values, strict=True):
            interpreter.set_tensor(tensor.index, np.ascontiguousarray(value))
        interpreter.invoke()
        # `get_tensor` copies: the interpreter's memory changes with the next run.
        return [interpreter.get_tensor(tensor.index) for tensor in self._out]

    def close(self) -> None:
        """Let go of the interpreters; one that is running goes when its run ends."""
        self._pool.close()


class LitertRuntime(Runtime):
    """LiteRT, for `.tflite` files."""

    name: ClassVar[str] = "litert"
    extra: ClassVar[str] = "litert"
    formats: ClassVar[frozenset[ArtifactFormat]] = frozenset({ArtifactFormat.TFLITE})

    def version(self) -> str:
        """Return the version of the library that can make an interpreter."""
        # Not imported with the module: the registry's readers need no metadata.
        from importlib.metadata import version

        return version(self._find_library()[0].replace("_", "-"))

    def providers(self) -> tuple[str, ...]:
        """Return the CPU's delegate; others are given by path in `LoadOptions.delegates`."""
        self._find_library()
        return (_CPU,)

    def _find_library(self) -> tuple[str, Any]:
        """Return name and module of the first library that can make an interpreter.

        Raises:
            RuntimeMissingError: there is none; the preferred one's reason is kept.
        """
        reasons: list[RuntimeMissingError] = []
        for name in _LIBRARIES:
            try:
                module = self.import_library(f"{name}.interpreter")
                module.Interpreter(str(PROOF_FOLDER / "proof.tflite"), num_threads=1)
            except RuntimeMissingError as exc:
                reasons.append(exc)
            except _ERRORS as exc:
                msg = f"runtime {self.name}: {name} is installed and makes no interpreter ({exc})"
                reasons.append(RuntimeMissingError(msg))
            else:
                return name, module
        broken = next((why for why in reasons if why.__cause__ is None), reasons[0])
        raise broken

    def _load(self, path: Path, options: LoadOptions) -> Session:
        return self._load_declared(path, options, None)

    def _load_declared(
        self, path: Path, options: LoadOptions, declared: Declared | None
    ) -> Session:
        _, library = self._find_library()

        def make() -> Any:
            for name in options.delegates:
                # First by ourselves: ai_edge_litert 2.3 raises in `Delegate.__del__` as well
                # when the library is not there.
                ctypes.CDLL(name)
            delegates = [library.load_delegate(name) for name in options.delegates]
            interpreter = library.Interpreter(
                str(path), num_threads=options.threads, experimental_delegates=delegates or None
            )
            interpreter.allocate_tensors()
            return interpreter

        try:
            first = make()
            pool = _Pool(_start_with(first, make), options.instances)
        except _ERRORS as exc:
            msg = f"LiteRT refuses {path.name}: {exc}"
            raise ModelLoadError(msg) from exc
        names = _read_signature(first)
        wanted_in, wanted_out = (declared.inputs, declared.outputs) if declared else ((), ())
        inputs = _describe(first.get_input_details(), names, wanted_in)
        outputs = _describe(first.get_output_details(), names, wanted_out)
        return LitertSession(pool, inputs, outputs, ", ".join((*options.delegates, _CPU)))


def _start_with(first: Any, make: Callable[[], Any]) -> Callable[[], Any]:
    """Return what gives `first` at the first call and makes a new one at each later call."""
    ready = [first]
    return lambda: ready.pop() if ready else make()


def _read_signature(interpreter: Any) -> dict[str, str]:
    """Return the tensors' names by the file's only signature, tensor name → public name.

    A converter invents tensor names (`serving_default_x:0`), a signature keeps the model's.
    """
    signatures = interpreter.get_signature_list()
    if len(signatures) != 1:
        return {}
    runner = interpreter.get_signature_runner(next(iter(signatures)))
    details = {**runner.get_input_details(), **runner.get_output_details()}
    return {item["name"]: public for public, item in details.items()}


def _describe(
    details: list[dict[str, Any]],
    names: Mapping[str, str],
    declared: tuple[TensorSpec, ...],
) -> tuple[_Tensor, ...]:
    wanted = {spec.name: spec for spec in declared}
    return tuple(_present(item, names.get(item["name"], item["name"]), wanted) for item in details)


def _present(item: dict[str, Any], name: str, wanted: Mapping[str, TensorSpec]) -> _Tensor:
    dtype = np.dtype(item["dtype"])
    if dtype not in DATATYPES or dtype.kind not in "biuf":
        msg = f"{name}: LiteRT's {dtype} cannot be passed to or from a model here"
        raise ModelLoadError(msg)
    signature = item.get("shape_signature")
    shape = signature if signature is not None and len(signature) else item["shape"]
    stored = TensorSpec(name, DATATYPES[dtype], tuple(int(axis) for axis in shape))
    scale, zero_point = item["quantization"]
    shown = stored
    if name in wanted:
        shown = _match(stored, wanted[name], is_quantized=scale != 0)
    return _Tensor(item["index"], stored, shown, float(scale), int(zero_point))


def _match(stored: TensorSpec, wanted: TensorSpec, *, is_quantized: bool) -> TensorSpec:
    """Return how a tensor is shown: as declared where this module can convert, else as stored."""
    floats = wanted.datatype is Datatype.FP32 and stored.datatype in _QUANTIZED and is_quantized
    rows = wanted.has_free_batch and stored.shape[:1] == (1,)
    shape = (-1, *stored.shape[1:]) if rows else stored.shape
    return TensorSpec(stored.name, wanted.datatype if floats else stored.datatype, shape)
