"""The interface every inference runtime is used through.

Owns the checks that must be the same whatever runs the model: a runtime is
asked only for files that exist, and a session only ever sees tensors of the
names, element types and shapes its model declares, not empty and, unless told
otherwise, finite (onnxruntime itself accepts NaN and a batch of 0). Knows no runtime by name.

Invariants: `Session.run` may be called from many threads at once, and raises
nothing but `PlatformError`s for anything that is wrong with its inputs.
"""

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from platforms.artifact import ArtifactFormat, Datatype, TensorSpec
from platforms.errors import ModelLoadError, RunStoppedError, RuntimeMissingError, TensorError
from platforms.telemetry import forbid_telemetry

Array = NDArray[Any]

CPU_PROVIDER = "CPUExecutionProvider"
"""The CPU by onnxruntime's name, which every adapter understands."""

PROOF_FOLDER = Path(__file__).parent / "data"
PROOF_ANSWER_FILE = PROOF_FOLDER / "proof.json"

DTYPES: Mapping[Datatype, np.dtype[Any]] = MappingProxyType(
    {
        Datatype.BOOL: np.dtype(np.bool_),
        Datatype.UINT8: np.dtype(np.uint8),
        Datatype.UINT16: np.dtype(np.uint16),
        Datatype.UINT32: np.dtype(np.uint32),
        Datatype.UINT64: np.dtype(np.uint64),
        Datatype.INT8: np.dtype(np.int8),
        Datatype.INT16: np.dtype(np.int16),
        Datatype.INT32: np.dtype(np.int32),
        Datatype.INT64: np.dtype(np.int64),
        Datatype.FP16: np.dtype(np.float16),
        Datatype.FP32: np.dtype(np.float32),
        Datatype.FP64: np.dtype(np.float64),
        Datatype.BYTES: np.dtype(np.object_),
    }
)
"""NumPy's element type of each datatype, native byte order; BYTES are `str` objects. No BF16."""

DATATYPES: Mapping[np.dtype[Any], Datatype] = MappingProxyType(
    {dtype: datatype for datatype, dtype in DTYPES.items()}
)


@dataclass(frozen=True)
class LoadOptions:
    """How a session is to run."""

    threads: int
    """Threads inside one operator, 1 or more."""
    spinning: bool = False
    """Busy-wait between operators: 74–80 % CPU at 20 requests/s, for bulk work only."""
    providers: tuple[str, ...] = (CPU_PROVIDER,)
    """Execution providers in order of preference, by the runtime's own names.

    `CPUExecutionProvider` means the CPU to every runtime.
    """
    instances: int = 1
    """Runs that may go on at once, for runtimes whose loaded model serves one at a time (LiteRT,
    OpenVINO): more runs wait for one of them. onnxruntime and torch need none of it."""
    is_reduced_precision_allowed: bool = False
    """Let the runtime compute in less than the file's precision (OpenVINO: bf16, fp16)."""
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """onnxruntime: provider → its own options, such as `device_id`."""
    delegates: tuple[str, ...] = ()
    """LiteRT: paths of external delegates' libraries."""
    cache_folder: Path | None = None
    """Where the runtime may keep what it compiled; none: nothing is kept."""
    prepared: Path | None = None
    """A folder with the form that an equal load prepared of the model, or an empty one to
    prepare it in. Whoever gives it keys and verifies it; a runtime may ignore it."""

    def __post_init__(self) -> None:
        """Refuse counts that a runtime would take for "as many as you like"."""
        if self.threads < 1:
            msg = f"a session needs 1 thread or more, not {self.threads}"
            raise ValueError(msg)
        if self.instances < 1:
            msg = f"a session needs 1 instance or more, not {self.instances}"
            raise ValueError(msg)


@dataclass(frozen=True)
class Declared:
    """What a manifest says a model takes and gives, in the model's own order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class RunStop:
    """A switch by which any thread ends one `Session.run`, where the runtime can do so.

    No lock: whichever of `set` and `connect` comes second sees what the first one wrote.
    """

    def __init__(self) -> None:
        """Start off, and connected to nothing."""
        self.is_set = False
        self._end: Callable[[], None] | None = None

    def set(self) -> None:
        """End the run, or the one that is about to begin; harmless when repeated or too late."""
        self.is_set = True
        if self._end is not None:
            self._end()

    def connect(self, end: Callable[[], None]) -> None:
        """Take the runtime's own way of ending the run; for sessions."""
        self._end = end
        if self.is_set:
            end()


class Session(ABC):
    """One model file, loaded; safe to share between threads."""

    def __init__(
        self,
        runtime: str,
        provider: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        assignment: Mapping[str, int] = MappingProxyType({}),
        findings: tuple[str, ...] = (),
    ) -> None:
        """Keep what the runtime reports about the model it loaded."""
        self.runtime = runtime
        self.provider = provider
        """The execution provider that really runs the model, whatever was asked for."""
        self.inputs = inputs
        self.outputs = outputs
        self.assignment = assignment
        """Execution provider → graph nodes it runs; empty where the runtime does not tell."""
        self.findings = findings
        """What an operator should know, such as a provider that was asked for and does not run;
        whoever loads it says so, by the model's name."""
        self._expected = {spec.name: (spec, DTYPES[spec.datatype]) for spec in inputs}

    def run(
        self,
        inputs: Mapping[str, Array],
        stop: RunStop | None = None,
        *,
        check_finite: bool = True,
    ) -> dict[str, Array]:
        """Run the model once, on every input it declares.

        Each array has its `TensorSpec`'s rank, fixed axes and element type in native
        byte order; axis 0 is the batch where the model leaves it free. Blocks for the
        length of one inference, or until `stop` is set and the runtime looks at it
        (onnxruntime: between two operators). Thread-safe. `check_finite=False` lets NaN and
        infinity through, which the Open Inference Protocol does not forbid.

        Raises:
            TensorError: as `verify`.
            InferenceError: the runtime failed, or the session is closed.
            RunStoppedError: `stop` was set before the end.
        """
        if stop is not None and stop.is_set:
            msg = "the run was stopped before it began"
            raise RunStoppedError(msg)
        self.verify(inputs, check_finite=check_finite)
        return self._run(inputs, stop)

    def verify(self, inputs: Mapping[str, Array], *, check_finite: bool = True) -> None:
        """Check inputs as `run` does, without running.

        Raises:
            TensorError: a name is missing or unknown, a dtype or shape differs, an axis
                is empty, or, unless told not to look, a float is NaN or infinite.
        """
        if inputs.keys() != self._expected.keys():
            msg = f"the model takes {sorted(self._expected)}, not {sorted(inputs)}"
            raise TensorError(msg)
        for name, (spec, dtype) in self._expected.items():
            _check_tensor(spec, dtype, inputs[name], check_finite)

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array], stop: RunStop | None) -> dict[str, Array]:
        """Run on inputs already checked; wrap the library's own errors.

        Connects `stop` where the library can end a run; may ignore it where it cannot.
        """

    def shrink(self, inputs: Mapping[str, Array]) -> None:
        """Run once, and give back memory that only larger runs before it needed.

        Does nothing where the runtime has no way to do so.

        Raises:
            TensorError, InferenceError: as `run`.
        """
        del inputs

    @abstractmethod
    def close(self) -> None:
        """Let go of the model; a later `run` is refused. Harmless when repeated."""


def _check_tensor(
    spec: TensorSpec, dtype: np.dtype[Any], value: object, check_finite: bool
) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != dtype:
        found = getattr(value, "dtype", type(value).__name__)
        msg = f"{spec.name}: the model takes {spec.datatype} ({dtype}), not {found}"
        raise TensorError(msg)
    if not is_shape_allowed(spec.shape, value.shape):
        msg = f"{spec.name}: the model takes shape {list(spec.shape)}, not {list(value.shape)}"
        raise TensorError(msg)
    if not value.size:
        msg = f"{spec.name}: an empty tensor of shape {list(value.shape)} holds nothing to run on"
        raise TensorError(msg)
    if check_finite and value.dtype.kind == "f" and not np.isfinite(value).all():
        msg = f"{spec.name}: holds NaN or an infinite number"
        raise TensorError(msg)


def is_shape_allowed(declared: tuple[int, ...], actual: tuple[int, ...]) -> bool:
    """Say whether a tensor of the actual shape fits the declared one, where −1 is free."""
    return len(declared) == len(actual) and all(
        want in (-1, have) for want, have in zip(declared, actual, strict=True)
    )


class Runtime(ABC):
    """An inference library that reads some model formats."""

    name: ClassVar[str]
    extra: ClassVar[str]
    """What to install: `pip install 'edgeward[<extra>]'`."""
    formats: ClassVar[frozenset[ArtifactFormat]]
    prepares: ClassVar[bool] = False
    """Whether it makes use of `LoadOptions.prepared`."""

    @abstractmethod
    def version(self) -> str:
        """Return the library's version.

        Raises:
            RuntimeMissingError: the library is not installed or cannot be imported.
        """

    @abstractmethod
    def providers(self) -> tuple[str, ...]:
        """Return the execution providers the library offers here, best first.

        Raises:
            RuntimeMissingError: the library is not installed or cannot be imported.
        """

    is_proof_needed: ClassVar[bool] = True
    """False for a runtime that runs nothing on this box."""

    def load(self, path: Path, options: LoadOptions, declared: Declared | None = None) -> Session:
        """Open a model file; blocks while the runtime reads and prepares it.

        `declared` is needed by formats that do not describe their tensors (TorchScript), and
        lets a runtime present a quantized tensor as the float that the manifest says it is.

        Raises:
            RuntimeMissingError: the library is not installed or cannot be imported.
            ModelLoadError: the file is missing, or the runtime refuses it.
        """
        if not path.exists():
            msg = f"there is no model file {path}"
            raise ModelLoadError(msg)
        return self._load_declared(path, options, declared)

    def _load_declared(
        self, path: Path, options: LoadOptions, declared: Declared | None
    ) -> Session:
        """Open a file that exists; for runtimes that use the declaration to override."""
        return self._load(path, options)

    @abstractmethod
    def _load(self, path: Path, options: LoadOptions) -> Session:
        """Open a file that exists; wrap the library's own errors in `ModelLoadError`."""

    def get_proof_model(self) -> Path:
        """Return a tiny model file that answers as `data/proof.json` says.

        Every proof model computes the same function, so one answer serves all formats.

        Raises:
            ModelLoadError: no proof model is shipped for this runtime's formats.
        """
        for model_format in sorted(self.formats):
            path = PROOF_FOLDER / f"proof.{model_format.value}"
            if path.exists():
                return path
        msg = f"no proof model for {', '.join(sorted(self.formats))}: override get_proof_model"
        raise ModelLoadError(msg)

    def import_library(self, module: str) -> ModuleType:
        """Import the runtime's library.

        Raises:
            RuntimeMissingError: it is not installed, or is but cannot be imported here.
        """
        forbid_telemetry()
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as exc:
            msg = (
                f"runtime {self.name} needs {exc.name}, which is not installed: "
                f"pip install 'edgeward[{self.extra}]'"
            )
            raise RuntimeMissingError(msg) from exc
        except ImportError as exc:
            msg = (
                f"runtime {self.name}: {module} is installed but cannot be imported ({exc}); "
                f"reinstall it with pip install --force-reinstall 'edgeward[{self.extra}]'"
            )
            raise RuntimeMissingError(msg) from exc


def read_proof_declaration() -> Declared:
    """Return what every proof model takes and gives: FP32, the batch free."""
    answer = json.loads(PROOF_ANSWER_FILE.read_text(encoding="utf-8"))

    def describe(tensors: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name, Datatype.FP32, (-1, *np.shape(value)[1:]))
            for name, value in tensors.items()
        )

    return Declared(describe(answer["inputs"]), describe(answer["outputs"]))
