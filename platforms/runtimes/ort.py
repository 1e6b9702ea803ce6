"""ONNX Runtime behind `Runtime`.

Owns the session options and the check that a model's external data stays in its
folder. Never falls back to another execution provider without saying so.

Source: our measurements with onnxruntime 1.32 on x86-64 (spinning, sharing one
session between threads); external data: onnxruntime 1.32 refuses a path outside
the model's folder by itself, older releases do not, so it is checked here as well.
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from platforms.artifact import ArtifactFormat, Datatype, TensorSpec
from platforms.errors import InferenceError, ModelLoadError, RunStoppedError, TensorError
from platforms.runtimes.base import Array, LoadOptions, RunStop, Runtime, Session
from platforms.runtimes.onnx_locations import read_external_locations

_LIBRARY = "onnxruntime"
_SEVERITY_ERROR = 3
_CPU = "CPUExecutionProvider"
_PREPARED_FILE, _WEIGHTS_FILE = "model.onnx", "weights.data"

_DATATYPES: Mapping[str, Datatype] = MappingProxyType(
    {
        "tensor(bool)": Datatype.BOOL,
        "tensor(uint8)": Datatype.UINT8,
        "tensor(uint16)": Datatype.UINT16,
        "tensor(uint32)": Datatype.UINT32,
        "tensor(uint64)": Datatype.UINT64,
        "tensor(int8)": Datatype.INT8,
        "tensor(int16)": Datatype.INT16,
        "tensor(int32)": Datatype.INT32,
        "tensor(int64)": Datatype.INT64,
        "tensor(float16)": Datatype.FP16,
        "tensor(float)": Datatype.FP32,
        "tensor(double)": Datatype.FP64,
        "tensor(string)": Datatype.BYTES,
    }
)

_log = logging.getLogger(__name__)


class OrtSession(Session):
    """An `InferenceSession`; `run` releases the interpreter's lock while it computes."""

    def __init__(self, library: Any, session: Any) -> None:
        """Take over a session that the library opened."""
        super().__init__(
            runtime=OrtRuntime.name,
            provider=session.get_providers()[0],
            inputs=tuple(_to_spec(node) for node in session.get_inputs()),
            outputs=tuple(_to_spec(node) for node in session.get_outputs()),
        )
        self._session = session
        self._new_options = library.RunOptions
        self._names = [spec.name for spec in self.outputs]
        self._errors = _collect_errors(library)
        self._input_fault = library.capi.onnxruntime_pybind11_state.InvalidArgument

    def _run(self, inputs: Mapping[str, Array], stop: RunStop | None) -> dict[str, Array]:
        # A local name: `close` in another thread then waits for no one and breaks nothing.
        session = self._session
        if session is None:
            msg = "the session is closed"
            raise InferenceError(msg)
        options = None
        if stop is not None:
            # Of this run only: set once, `terminate` ends every run with the same options.
            options = self._new_options()
            stop.connect(partial(setattr, options, "terminate", True))
        try:
            values = session.run(self._names, inputs, options)
        except self._input_fault as exc:
            msg = f"the model refuses these inputs: {exc}"
            raise TensorError(msg) from exc
        except self._errors as exc:
            if stop is not None and stop.is_set:
                msg = "the run was stopped"
                raise RunStoppedError(msg) from exc
            msg = f"onnxruntime failed: {exc}"
            raise InferenceError(msg) from exc
        return dict(zip(self._names, values, strict=True))

    def close(self) -> None:
        """Let go of the model; its memory returns when running inferences end."""
        self._session = None


class OrtRuntime(Runtime):
    """ONNX Runtime, for ONNX files."""

    name: ClassVar[str] = "ort"
    extra: ClassVar[str] = "onnx"
    formats: ClassVar[frozenset[ArtifactFormat]] = frozenset({ArtifactFormat.ONNX})

    def version(self) -> str:
        """Return onnxruntime's version."""
        return str(self.import_library(_LIBRARY).__version__)

    def providers(self) -> tuple[str, ...]:
        """Return the execution providers compiled in, in onnxruntime's order."""
        return tuple(self.import_library(_LIBRARY).get_available_providers())

    def _load(self, path: Path, options: LoadOptions) -> Session:
        library = self.import_library(_LIBRARY)
        _verify_external_data(path)
        available = library.get_available_providers()
        wanted = [name for name in options.providers if name in available]
        if not wanted:
            msg = f"none of {', '.join(options.providers)} is in this onnxruntime ({available})"
            raise ModelLoadError(msg)
        try:
            session = OrtSession(
                library,
                _open(library, path, options, wanted),
            )
        except _collect_errors(library) as exc:
            msg = f"onnxruntime refuses {path.name}: {exc}"
            raise ModelLoadError(msg) from exc
        _report_fallback(path, options, session)
        return session


def _build_options(library: Any, options: LoadOptions) -> Any:
    built = library.SessionOptions()
    built.intra_op_num_threads = options.threads
    built.inter_op_num_threads = 1
    built.log_severity_level = _SEVERITY_ERROR
    spinning = "1" if options.spinning else "0"
    built.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    built.add_session_config_entry("session.inter_op.allow_spinning", spinning)
    # Without it a file in the ORT format would pass for ONNX and escape our own check.
    built.add_session_config_entry("session.load_model_format", "ONNX")
    return built


def _open(library: Any, path: Path, options: LoadOptions, providers: list[str]) -> Any:
    """Open a model, or its prepared form; prepare it where there is an empty folder for it.

    Weights lie beside the optimized graph, uncompressed and aligned: they are mapped, not copied.
    No prepacked weights: twice the disk for a fourth of a load (docs/adr/0019).
    """
    built, source = _build_options(library, options), path
    if options.prepared is not None and providers == [_CPU]:
        prepared = options.prepared / _PREPARED_FILE
        if prepared.exists():
            source = prepared
            built.graph_optimization_level = library.GraphOptimizationLevel.ORT_DISABLE_ALL
        else:
            built.optimized_model_filepath = str(prepared)
            prefix = "session.optimized_model_external_initializers_"
            built.add_session_config_entry(f"{prefix}file_name", _WEIGHTS_FILE)
            built.add_session_config_entry(f"{prefix}min_size_in_bytes", "1024")
    return library.InferenceSession(str(source), built, providers=providers)


def _report_fallback(path: Path, options: LoadOptions, session: Session) -> None:
    """Say it when another provider runs the model: onnxruntime retries on CPU silently."""
    if session.provider != options.providers[0]:
        _log.warning(
            "%s: asked for %s, running on %s", path.name, options.providers[0], session.provider
        )


def _collect_errors(library: Any) -> tuple[type[Exception], ...]:
    """Return what onnxruntime raises; its classes share no base of their own."""
    state = vars(library.capi.onnxruntime_pybind11_state).values()
    own = (kind for kind in state if isinstance(kind, type) and issubclass(kind, Exception))
    return (*own, RuntimeError, ValueError, TypeError)


def _to_spec(node: Any) -> TensorSpec:
    if node.type not in _DATATYPES:
        msg = f"{node.name}: onnxruntime's {node.type} cannot be passed to or from a model here"
        raise ModelLoadError(msg)
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in node.shape or ())
    return TensorSpec(node.name, _DATATYPES[node.type], shape)


def _verify_external_data(path: Path) -> None:
    """Refuse a model whose weights lie outside its own folder, by path or by link.

    Raises:
        ModelLoadError: they do, or the file is no ONNX model.
    """
    folder = path.parent.resolve()
    for location in read_external_locations(path):
        if not (folder / location).resolve().is_relative_to(folder):
            msg = f"{path.name} keeps weights in {location!r}, outside its own folder"
            raise ModelLoadError(msg)
