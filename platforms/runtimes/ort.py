"""ONNX Runtime behind `Runtime`.

Owns the session options and the check that a model's external data stays in its
folder. Never falls back to another execution provider without saying so.

Source: our measurements with onnxruntime 1.32 on x86-64 (spinning, sharing one
session between threads); external data: onnxruntime 1.32 refuses a path outside
the model's folder by itself, older releases do not, so it is checked here as well.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from platforms.artifact import ArtifactFormat, Datatype, TensorSpec
from platforms.errors import InferenceError, ModelLoadError, RunStoppedError, TensorError
from platforms.runtimes.base import (
    CPU_PROVIDER,
    Array,
    LoadOptions,
    RunStop,
    Runtime,
    Session,
)
from platforms.runtimes.onnx_locations import read_external_locations

_LIBRARY = "onnxruntime"
_SEVERITY_ERROR = 3
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


class OrtSession(Session):
    """An `InferenceSession`; `run` releases the interpreter's lock while it computes."""

    def __init__(self, library: Any, session: Any, wanted: tuple[str, ...]) -> None:
        """Take over a session that the library opened."""
        assignment = _read_assignment(session)
        super().__init__(
            runtime=OrtRuntime.name,
            provider=_find_provider(session, assignment),
            inputs=tuple(_to_spec(node) for node in session.get_inputs()),
            outputs=tuple(_to_spec(node) for node in session.get_outputs()),
            assignment=assignment,
            findings=_find_fallbacks(wanted, tuple(session.get_providers()), assignment),
        )
        self._session = session
        self._new_options = library.RunOptions
        self._names = [spec.name for spec in self.outputs]
        self._errors = _collect_errors(library)
        self._input_fault = library.capi.onnxruntime_pybind11_state.InvalidArgument

    def _run(self, inputs: Mapping[str, Array], stop: RunStop | None) -> dict[str, Array]:
        options = None
        if stop is not None:
            # Of this run only: set once, `terminate` ends every run with the same options.
            options = self._new_options()
            stop.connect(partial(setattr, options, "terminate", True))
        return self._run_with(inputs, options, stop)

    def shrink(self, inputs: Mapping[str, Array]) -> None:
        """Run once, and give back memory that only larger runs before it needed.

        A MobileNetV2-shaped CNN after a batch of 16: 182 MB → 105 MB (x86-64, onnxruntime 1.32).
        """
        self.verify(inputs, check_finite=False)
        options = self._new_options()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._run_with(inputs, options, None)

    def _run_with(
        self, inputs: Mapping[str, Array], options: Any, stop: RunStop | None
    ) -> dict[str, Array]:
        # A local name: `close` in another thread then waits for no one and breaks nothing.
        session = self._session
        if session is None:
            msg = "the session is closed"
            raise InferenceError(msg)
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
    prepares: ClassVar[bool] = True
    formats: ClassVar[frozenset[ArtifactFormat]] = frozenset({ArtifactFormat.ONNX})

    def version(self) -> str:
        """Return onnxruntime's version."""
        return str(self.import_library(_LIBRARY).__version__)

    def providers(self) -> tuple[str, ...]:
        """Return the execution providers compiled in, in onnxruntime's order."""
        return tuple(self.import_library(_LIBRARY).get_available_providers())

    def register_plugin(self, name: str, path: Path) -> tuple[str, ...]:
        """Register a plug-in execution provider's library with onnxruntime, for this process.

        Returns the providers of all devices known from then on; a session gets one of them
        by its name in `LoadOptions.providers`.

        Raises:
            RuntimeMissingError: onnxruntime is not installed.
            ModelLoadError: the library cannot be loaded, or is registered already.
        """
        library = self.import_library(_LIBRARY)
        try:
            library.register_execution_provider_library(name, str(path))
        except _collect_errors(library) as exc:
            msg = f"onnxruntime cannot load the provider {name} from {path}: {exc}"
            raise ModelLoadError(msg) from exc
        return tuple(dict.fromkeys(device.ep_name for device in library.get_ep_devices()))

    def _load(self, path: Path, options: LoadOptions) -> Session:
        library = self.import_library(_LIBRARY)
        _verify_external_data(path)
        built = _build_options(library, options)
        chosen = _choose_providers(library, options, built)
        try:
            opened = _open(library, path, options, built, chosen)
            session = OrtSession(library, opened, options.providers)
        except _collect_errors(library) as exc:
            msg = f"onnxruntime refuses {path.name}: {exc}"
            raise ModelLoadError(msg) from exc
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
    built.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return built


def _choose_providers(library: Any, options: LoadOptions, built: Any) -> dict[str, Any]:
    """Return the arguments that say where to run; a plug-in's devices go into `built`.

    Raises:
        ModelLoadError: none of the wanted providers is there.
    """
    available = library.get_available_providers()
    devices = _find_plugin_devices(library, options.providers)
    if devices:
        own = dict(options.provider_options.get(devices[0].ep_name, {}))
        built.add_provider_for_devices(devices, own)
        return {}
    usable = [name for name in options.providers if name in available]
    if not usable:
        msg = f"none of {', '.join(options.providers)} is in this onnxruntime ({available})"
        raise ModelLoadError(msg)
    given = [dict(options.provider_options.get(name, {})) for name in usable]
    return {"providers": usable, "provider_options": given}


def _find_plugin_devices(library: Any, wanted: tuple[str, ...]) -> list[Any]:
    """Return the devices of the first wanted provider, where it is a registered plug-in."""
    if wanted[0] in library.get_available_providers() or not hasattr(library, "get_ep_devices"):
        return []
    return [device for device in library.get_ep_devices() if device.ep_name == wanted[0]]


def _read_assignment(session: Any) -> dict[str, int]:
    """Return provider → nodes of the optimized graph it was given; older releases tell nothing."""
    read = getattr(session, "get_provider_graph_assignment_info", None)
    counts: dict[str, int] = {}
    for part in read() if read else ():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts


def _find_provider(session: Any, assignment: Mapping[str, int]) -> str:
    """Return the first provider that was given any node, by onnxruntime's order."""
    active = session.get_providers()
    return str(next((name for name in active if assignment.get(name)), active[0]))


def _find_fallbacks(
    wanted: tuple[str, ...], active: tuple[str, ...], assignment: Mapping[str, int]
) -> tuple[str, ...]:
    """Say where another provider runs than the one asked for: onnxruntime does so silently."""
    first = wanted[0]
    if first not in active:
        return (f"asked for {first}, running on {active[0]}: {first} could not be used",)
    elsewhere = {name: count for name, count in assignment.items() if name != first and count}
    if not elsewhere:
        return ()
    total = sum(assignment.values())
    parts = ", ".join(f"{count} on {name}" for name, count in elsewhere.items())
    return (f"asked for {first}: of {total} nodes, {parts}",)


def _open(
    library: Any, path: Path, options: LoadOptions, built: Any, chosen: Mapping[str, Any]
) -> Any:
    """Open a model, or its prepared form; prepare it where there is an empty folder for it.

    Weights lie beside the optimized graph, uncompressed and aligned: they are mapped, not copied.
    No prepacked weights: twice the disk for a fourth of a load (docs/adr/0019).
    """
    source = path
    if options.prepared is not None and chosen.get("providers") == [CPU_PROVIDER]:
        prepared = options.prepared / _PREPARED_FILE
        if prepared.exists():
            source = prepared
            built.graph_optimization_level = library.GraphOptimizationLevel.ORT_DISABLE_ALL
        else:
            built.optimized_model_filepath = str(prepared)
            prefix = "session.optimized_model_external_initializers_"
            built.add_session_config_entry(f"{prefix}file_name", _WEIGHTS_FILE)
            built.add_session_config_entry(f"{prefix}min_size_in_bytes", "1024")
    return library.InferenceSession(str(source), built, **chosen)


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
