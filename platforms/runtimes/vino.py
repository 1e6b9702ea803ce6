"""OpenVINO behind `Runtime`: its IR, ONNX, TFLite and SavedModel folders.

Owns the choice of the device and the precision: float32 unless the options allow less,
because OpenVINO's own default computes in bf16 where the CPU can and says nothing. One
infer request serves one run at a time, as many as `instances`; a run is stopped by
cancelling its request. The device that really runs is the compiled model's word.

Source: openvino 2026.4 (`openvino/_ov_api.py`), properties
https://docs.openvino.ai/2026/; bf16 with top-1 agreement .9926 is our measurement.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar

import numpy as np

from platforms.artifact import ArtifactFormat, TensorSpec, locate_model
from platforms.errors import InferenceError, ModelLoadError, RunStoppedError
from platforms.runtimes.base import (
    CPU_PROVIDER,
    DATATYPES,
    Array,
    Declared,
    LoadOptions,
    RunStop,
    Runtime,
    Session,
)

_CPU = "CPU"
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, OSError)


class _Cancel:
    """The end of one run: once the run is over, a late stop finds nothing to cancel."""

    def __init__(self, request: Any) -> None:
        self._lock = threading.Lock()
        self._request = request

    def __call__(self) -> None:
        with self._lock:
            if self._request is not None:
                self._request.cancel()

    def disarm(self) -> None:
        with self._lock:
            self._request = None


class OpenvinoSession(Session):
    """A compiled model with its infer requests."""

    def __init__(
        self,
        compiled: Any,
        instances: int,
        findings: tuple[str, ...],
        declared: Declared | None = None,
    ) -> None:
        """Take over a compiled model and make its infer requests."""
        wanted = [*declared.inputs, *declared.outputs] if declared is not None else []
        names = frozenset(spec.name for spec in wanted)
        super().__init__(
            runtime=OpenvinoRuntime.name,
            provider=", ".join(compiled.get_property("EXECUTION_DEVICES")),
            inputs=tuple(_to_spec(port, names) for port in compiled.inputs),
            outputs=tuple(_to_spec(port, names) for port in compiled.outputs),
            findings=findings,
        )
        self.precision: str = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        """Element type that the device really computes in, such as `f32`."""
        self._compiled = compiled
        self._idle: SimpleQueue[Any] = SimpleQueue()
        for _ in range(instances):
            self._idle.put(compiled.create_infer_request())

    def _run(self, inputs: Mapping[str, Array], stop: RunStop | None) -> dict[str, Array]:
        request = self._idle.get()
        try:
            if request is None or self._compiled is None:
                msg = "the session is closed"
                raise InferenceError(msg)
            return self._infer(request, inputs, stop)
        finally:
            # After `close` the marker instead: the memory goes, and whoever waits is refused.
            self._idle.put(request if self._compiled is not None else None)

    def _infer(
        self, request: Any, inputs: Mapping[str, Array], stop: RunStop | None
    ) -> dict[str, Array]:
        cancel = _Cancel(request)
        values = {
            index: np.ascontiguousarray(inputs[spec.name]) for index, spec in enumerate(self.inputs)
        }
        try:
            request.start_async(values, share_inputs=True)
            if stop is not None:
                stop.connect(cancel)
            request.wait()
            # Copied: the request's memory changes with its next run.
            return {
                spec.name: np.array(request.get_output_tensor(index).data)
                for index, spec in enumerate(self.outputs)
            }
        except _ERRORS as exc:
            if stop is not None and stop.is_set:
                msg = "the run was stopped"
                raise RunStoppedError(msg) from exc
            msg = f"OpenVINO failed: {exc}"
            raise InferenceError(msg) from exc
        finally:
            cancel.disarm()

    def close(self) -> None:
        """Let go of the model; its memory returns when running inferences end."""
        if self._compiled is None:
            return
        self._compiled = None
        # Every request that is idle goes now, a busy one when its run ends; the one left-over
        # marker wakes each waiting run in turn.
        while not self._idle.empty():
            self._idle.get()
        self._idle.put(None)


class OpenvinoRuntime(Runtime):
    """OpenVINO, for Intel's CPUs, GPUs and NPUs and for ARM CPUs."""

    name: ClassVar[str] = "openvino"
    extra: ClassVar[str] = "openvino"
    formats: ClassVar[frozenset[ArtifactFormat]] = frozenset(
        {
            ArtifactFormat.OPENVINO,
            ArtifactFormat.ONNX,
            ArtifactFormat.TFLITE,
            ArtifactFormat.SAVED_MODEL,
        }
    )

    def version(self) -> str:
        """Return OpenVINO's version."""
        return str(self.import_library("openvino").get_version())

    def providers(self) -> tuple[str, ...]:
        """Return OpenVINO's names of the devices it found here, such as CPU, GPU, NPU."""
        return tuple(self.import_library("openvino").Core().available_devices)

    def _load(self, path: Path, options: LoadOptions) -> Session:
        return self._load_declared(path, options, None)

    def _load_declared(
        self, path: Path, options: LoadOptions, declared: Declared | None
    ) -> Session:
        library = self.import_library("openvino")
        core = library.Core()
        device, findings = _choose_device(options, tuple(core.available_devices))
        try:
            compiled = core.compile_model(
                core.read_model(str(locate_model(path))), device, _build_properties(options, device)
            )
            session = OpenvinoSession(compiled, options.instances, findings, declared)
        except _ERRORS as exc:
            msg = f"OpenVINO refuses {path.name}: {exc}"
            raise ModelLoadError(msg) from exc
        return session


def _choose_device(options: LoadOptions, available: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    wanted = [_CPU if name == CPU_PROVIDER else name for name in options.providers]
    usable = [name for name in wanted if name in available]
    if not usable:
        msg = f"none of {', '.join(wanted)} is among OpenVINO's devices here ({available})"
        raise ModelLoadError(msg)
    if usable[0] == wanted[0]:
        return usable[0], ()
    return usable[0], (f"asked for {wanted[0]}, running on {usable[0]}",)


def _build_properties(options: LoadOptions, device: str) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    if not options.is_reduced_precision_allowed:
        properties["INFERENCE_PRECISION_HINT"] = "f32"
    if device == _CPU:
        properties["INFERENCE_NUM_THREADS"] = options.threads * options.instances
        properties["NUM_STREAMS"] = str(options.instances)
    if options.cache_folder is not None:
        properties["CACHE_DIR"] = str(options.cache_folder)
    return properties


def _to_spec(port: Any, wanted: frozenset[str]) -> TensorSpec:
    # A port has all names of its tensor: of an fp16 file's input also that of the cast behind it.
    known = sorted(wanted & port.get_names())
    name = known[0] if known else str(port.get_any_name())
    dtype = np.dtype(port.get_element_type().to_dtype())
    if dtype not in DATATYPES or dtype.kind not in "biuf":
        msg = f"{name}: OpenVINO's {port.get_element_type()} cannot be passed to a model here"
        raise ModelLoadError(msg)
    shape = tuple(
        -1 if axis.is_dynamic else int(axis.get_length()) for axis in port.get_partial_shape()
    )
    return TensorSpec(name, DATATYPES[dtype], shape)
