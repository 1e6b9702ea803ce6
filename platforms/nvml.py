"""NVIDIA's management library, asked through ctypes.

Owns the few calls that name a GPU, its memory and its driver. Needs no package,
and says why it knows nothing instead of raising: most boxes have no such library.

Source: NVML API Reference Guide (docs.nvidia.com/deploy/nvml-api).
"""

import ctypes
from dataclasses import dataclass

_SUCCESS = 0
_NAME_BYTES = 96
"""NVML_DEVICE_NAME_V2_BUFFER_SIZE; the driver's version needs 80."""


@dataclass(frozen=True)
class NvidiaGpu:
    """One GPU as NVML describes it."""

    name: str
    memory_bytes: int | None = None
    compute_capability: str | None = None


@dataclass(frozen=True)
class NvidiaFacts:
    """What NVML answered, or why it did not."""

    driver_version: str | None = None
    gpus: tuple[NvidiaGpu, ...] = ()
    error: str = ""


class _Memory(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


def probe_nvidia(library: str = "libnvidia-ml.so.1") -> NvidiaFacts:
    """Ask NVML for the GPUs and the driver.

    Loads the library into this process and initialises it for the length of the call.
    """
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return NvidiaFacts(error=f"{library} is not installed")
    try:
        return _read_facts(nvml)
    except AttributeError as exc:
        return NvidiaFacts(error=f"{library} is no usable NVML: {exc}")


def _read_facts(nvml: ctypes.CDLL) -> NvidiaFacts:
    code = nvml.nvmlInit_v2()
    if code != _SUCCESS:
        return NvidiaFacts(error=f"NVML: {_describe(nvml, code)}")
    try:
        count = ctypes.c_uint()
        code = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        gpus = tuple(gpu for index in range(count.value) if (gpu := _read_gpu(nvml, index)))
        error = "" if code == _SUCCESS else f"NVML: {_describe(nvml, code)}"
        return NvidiaFacts(_read_driver(nvml), gpus, error)
    finally:
        nvml.nvmlShutdown()


def _describe(nvml: ctypes.CDLL, code: int) -> str:
    nvml.nvmlErrorString.restype = ctypes.c_char_p
    text = nvml.nvmlErrorString(code)
    return text.decode(errors="replace") if text else f"error {code}"


def _read_driver(nvml: ctypes.CDLL) -> str | None:
    buffer = ctypes.create_string_buffer(_NAME_BYTES)
    if nvml.nvmlSystemGetDriverVersion(buffer, _NAME_BYTES) != _SUCCESS:
        return None
    return buffer.value.decode(errors="replace")


def _read_gpu(nvml: ctypes.CDLL, index: int) -> NvidiaGpu | None:
    handle = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != _SUCCESS:
        return None
    name = ctypes.create_string_buffer(_NAME_BYTES)
    nvml.nvmlDeviceGetName(handle, name, _NAME_BYTES)
    memory = _Memory()
    # An integrated GPU (Jetson, GB10) answers "not supported": it shares the box's memory.
    has_memory = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == _SUCCESS
    return NvidiaGpu(
        name=name.value.decode(errors="replace") or "NVIDIA GPU",
        memory_bytes=memory.total if has_memory else None,
        compute_capability=_read_capability(nvml, handle),
    )


def _read_capability(nvml: ctypes.CDLL, handle: ctypes.c_void_p) -> str | None:
    major, minor = ctypes.c_int(), ctypes.c_int()
    code = nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}" if code == _SUCCESS else None
