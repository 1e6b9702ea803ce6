"""The vocabulary of hardware: what a box can be.

Owns the immutable description of one box (`PlatformSpec`) that detection
produces and every decision reads. Holds no probe and reads no machine, so a
Jetson can be described, stored and reasoned about on an x86 laptop.
"""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Os(StrEnum):
    """Operating systems that Edgeward knows."""

    LINUX = "linux"
    MACOS = "macos"
    OTHER = "other"


class Arch(StrEnum):
    """Processor architectures, by the name that Python wheels use where there is one."""

    X86_64 = "x86_64"
    AARCH64 = "aarch64"
    ARMV7 = "armv7"
    APPLE_SILICON = "apple_silicon"
    OTHER = "other"


class AcceleratorKind(StrEnum):
    """Kinds of compute device besides the CPU."""

    NVIDIA_GPU = "nvidia_gpu"
    JETSON = "jetson"
    APPLE_GPU = "apple_gpu"
    APPLE_ANE = "apple_ane"
    INTEL_GPU = "intel_gpu"
    INTEL_NPU = "intel_npu"
    ASCEND_NPU = "ascend_npu"
    CORAL_EDGE_TPU = "coral_edge_tpu"


class RuntimeStatus(StrEnum):
    """What is known about an inference runtime on this box."""

    PROVEN = "proven"
    """One inference gave the right answer in a child process."""
    MISSING = "missing"
    """Its package is not installed."""
    BROKEN = "broken"
    """Installed, but its inference crashed, hung or gave a wrong answer."""
    UNSUPPORTED = "unsupported"
    """It cannot run on this operating system or architecture."""


@dataclass(frozen=True)
class Accelerator:
    """One compute device besides the CPU."""

    kind: AcceleratorKind
    name: str
    memory_mb: int | None = None
    driver: str | None = None
    usable: bool = True
    """False where the device is there but its driver or permission is not."""
    detail: str = ""


@dataclass(frozen=True)
class RuntimeFinding:
    """One inference runtime as found on this box."""

    name: str
    """The adapter's name: `ort`, `litert`, `openvino`, `torchscript`, `coreml`."""
    status: RuntimeStatus
    version: str | None = None
    providers: tuple[str, ...] = ()
    """Execution providers, delegates or devices the runtime itself reports."""
    detail: str = ""
    """Why it is missing or broken, and what to do about it."""


@dataclass(frozen=True)
class PlatformSpec:
    """Everything decisions need to know about one box. Memory in MB (10⁶ bytes)."""

    os: Os
    os_version: str
    arch: Arch
    cpu_model: str
    cpu_flags: tuple[str, ...]
    """The flags that matter for inference, sorted: `avx2`, `avx512_vnni`, `asimddp`, …"""
    cores: float
    """CPU cores the cgroup allows, which may be a fraction."""
    cores_machine: int
    memory_mb: int
    """Memory the cgroup allows."""
    memory_machine_mb: int
    python_version: str
    container: str | None = None
    board: str | None = None
    """The board's own name (device tree or DMI), such as `Raspberry Pi 5 Model B Rev 1.0`."""
    accelerators: tuple[Accelerator, ...] = ()
    runtimes: tuple[RuntimeFinding, ...] = ()
    hardware_class: str = "generic"
    """A short stable name for boxes alike, such as `x86_64-avx512_vnni`, `rpi5`, `jetson-orin`."""
    extra: dict[str, Any] = field(default_factory=dict)

    def runtime(self, name: str) -> RuntimeFinding | None:
        """Return the finding about the runtime called `name`, or None."""
        return next((found for found in self.runtimes if found.name == name), None)

    def has_accelerator(self, kind: AcceleratorKind) -> bool:
        """Say whether a usable accelerator of this kind is present."""
        return any(found.kind is kind and found.usable for found in self.accelerators)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "PlatformSpec":
        """Rebuild a spec from `to_json`'s form.

        Raises:
            KeyError, ValueError, TypeError: the data is not such a form.
        """
        accelerators = tuple(
            Accelerator(**{**item, "kind": AcceleratorKind(item["kind"])})
            for item in data["accelerators"]
        )
        runtimes = tuple(
            RuntimeFinding(
                **{
                    **item,
                    "status": RuntimeStatus(item["status"]),
                    "providers": tuple(item["providers"]),
                }
            )
            for item in data["runtimes"]
        )
        fields = {
            **data,
            "os": Os(data["os"]),
            "arch": Arch(data["arch"]),
            "cpu_flags": tuple(data["cpu_flags"]),
            "accelerators": accelerators,
            "runtimes": runtimes,
        }
        return cls(**fields)
