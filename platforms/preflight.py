"""Preflight: is this box fit to run Edgeward, and what to do where it is not.

Pure functions over a spec, its probe and the store's facts, in the order in which a
person should read them. A check fails where the agent would not work, warns where it
would work worse than the box could, and every warning and failure names a remedy.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from platforms.probe import ProbeData, StoreFacts
from platforms.spec import AcceleratorKind, Arch, Os, PlatformSpec, RuntimeStatus

MEMORY_FAIL_MB = 300
"""Agent 60 MB, queue broker 10, one worker with onnxruntime 120, and a model."""
MEMORY_WARN_MB = 900
DISK_FAIL_MB = 200
"""One model version and the store's write-ahead log and ballast."""
DISK_WARN_MB = 2_000
FSYNC_WARN_MS = 50.0
"""A group commit of 16 jobs then allows about 300 durable jobs a second."""
PYTHON_MIN = (3, 11)
PYTHON_TESTED_MAX = (3, 14)
CLOCK_FLOOR_S = 1_767_225_600
"""2026-01-01T00:00Z: before this version was published, so a clock behind it is wrong."""

_NETWORK_FILESYSTEMS = frozenset(("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs"))
_VOLATILE_FILESYSTEMS = frozenset(("tmpfs", "ramfs", "overlay", "overlayfs"))
_PARAVIRTUAL_DISK = re.compile(r"(vd|xvd)[a-z]+")

_ACCELERATOR_REMEDIES = {
    AcceleratorKind.NVIDIA_GPU: "install the NVIDIA driver, or start the container with"
    " `--gpus all` (nvidia-container-toolkit)",
    AcceleratorKind.JETSON: "add the user to the groups `video` and `render`, or start the"
    " container with `--runtime nvidia`",
    AcceleratorKind.APPLE_ANE: "run on the Mac itself to use its Neural Engine",
    AcceleratorKind.INTEL_GPU: "add the user to the group `render`, or pass `--device /dev/dri`",
    AcceleratorKind.INTEL_NPU: "install intel-level-zero-npu and add the user to the group"
    " `render`, or pass `--device /dev/accel`",
    AcceleratorKind.ASCEND_NPU: "install the Ascend driver and add the user to `HwHiAiUser`",
    AcceleratorKind.CORAL_EDGE_TPU: "install libedgetpu1-std (and gasket-dkms for a PCIe card)"
    " and add the user to the group `plugdev` or `apex`",
}


class CheckStatus(StrEnum):
    """How one check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One finding about the box, and what to do about it."""

    name: str
    status: CheckStatus
    summary: str
    remedy: str = ""


def check_platform(spec: PlatformSpec, probe: ProbeData, store: StoreFacts) -> tuple[Check, ...]:
    """Return every check of the box, in reading order."""
    return (
        check_os(spec),
        check_python(spec),
        check_container(spec),
        check_cpu(spec),
        check_memory(spec, probe),
        check_accelerators(spec),
        check_runtimes(spec),
        check_disk_space(probe),
        check_disk_kind(probe),
        check_store(probe, store),
        check_clock(spec, probe),
    )


def check_os(spec: PlatformSpec) -> Check:
    """Check the operating system, its C library and its user space."""
    seen = f"{spec.os_version}, {spec.arch}"
    if spec.os is Os.OTHER or spec.arch is Arch.OTHER:
        remedy = "use Linux or macOS on x86-64, 64-bit ARM or ARMv7"
        return Check("os", CheckStatus.FAIL, f"{seen} is not supported", remedy)
    if spec.extra.get("rosetta"):
        remedy = "install an arm64 Python: the Mac's own one, or Homebrew's in /opt/homebrew"
        return Check("os", CheckStatus.WARN, f"{seen}: this Python runs under Rosetta", remedy)
    if spec.arch is Arch.ARMV7 and spec.extra.get("kernel_machine") == "aarch64":
        remedy = "install the 64-bit system: onnxruntime has no wheel for 32-bit ARM"
        return Check("os", CheckStatus.WARN, f"{seen}: 32-bit system on a 64-bit chip", remedy)
    if str(spec.extra.get("libc", "")).startswith("musl"):
        remedy = "use a system with glibc, such as Debian: the runtimes have no wheels for musl"
        return Check("os", CheckStatus.WARN, f"{seen} with musl", remedy)
    return Check("os", CheckStatus.OK, seen)


def check_python(spec: PlatformSpec) -> Check:
    """Check the version of Python."""
    digits = re.match(r"(\d+)\.(\d+)", spec.python_version)
    version = (int(digits[1]), int(digits[2])) if digits else (0, 0)
    seen = f"Python {spec.python_version}"
    if version < PYTHON_MIN:
        return Check(
            "python", CheckStatus.FAIL, f"{seen} is too old", "install Python 3.11 to 3.14"
        )
    if version > PYTHON_TESTED_MAX:
        remedy = "use Python 3.14 or older if a runtime cannot be installed"
        return Check("python", CheckStatus.WARN, f"{seen} is newer than tested", remedy)
    return Check("python", CheckStatus.OK, seen)


def check_container(spec: PlatformSpec) -> Check:
    """Check for a container, and whether it leaves enough of a core."""
    where = f"in a container ({spec.container})" if spec.container else "not in a container"
    summary = f"{where}; {spec.cores:g} of {spec.cores_machine} cores"
    if spec.cores < 1:
        remedy = "give it at least one core (`--cpus 1`, `CPUQuota=100%`): inference is throttled"
        return Check("container", CheckStatus.WARN, summary, remedy)
    return Check("container", CheckStatus.OK, summary)


def check_cpu(spec: PlatformSpec) -> Check:
    """Check the instruction sets that the runtimes' kernels are written for."""
    flags = " ".join(spec.cpu_flags) or "no known flags"
    summary = f"{spec.cpu_model}: {flags}"
    if spec.arch is Arch.ARMV7 and "neon" not in spec.cpu_flags:
        remedy = "use a board with NEON: the runtimes for ARMv7 need it"
        return Check("cpu", CheckStatus.FAIL, summary, remedy)
    if spec.arch is Arch.X86_64 and "avx2" not in spec.cpu_flags:
        remedy = (
            "give a virtual machine the host's CPU model (`-cpu host`); a real CPU without"
            " AVX2 is slow, and TensorFlow and some others do not start on it"
        )
        return Check("cpu", CheckStatus.WARN, summary, remedy)
    return Check("cpu", CheckStatus.OK, summary)


def check_memory(spec: PlatformSpec, probe: ProbeData) -> Check:
    """Check the memory that the machine has and the cgroup allows."""
    summary = f"{spec.memory_mb} MB"
    if spec.memory_mb < spec.memory_machine_mb:
        summary += f" allowed of the machine's {spec.memory_machine_mb}"
    if "MemAvailable" in probe.meminfo_kb:
        summary += f", {probe.meminfo_kb['MemAvailable'] * 1024 // 10**6} MB available now"
    if spec.memory_mb < MEMORY_FAIL_MB:
        remedy = f"give it at least {MEMORY_FAIL_MB} MB"
        return Check("memory", CheckStatus.FAIL, summary, remedy)
    if spec.memory_mb < MEMORY_WARN_MB:
        remedy = "run the inference lane only, with LiteRT or small INT8 models"
        return Check("memory", CheckStatus.WARN, summary, remedy)
    return Check("memory", CheckStatus.OK, summary)


def check_accelerators(spec: PlatformSpec) -> Check:
    """Check that every accelerator that is there can be used."""
    if not spec.accelerators:
        return Check("accelerators", CheckStatus.OK, "none; inference runs on the CPU")
    parts, remedies = [], []
    for found in spec.accelerators:
        driver = f" (driver {found.driver})" if found.driver else ""
        trouble = "" if found.usable else f": not usable, {found.detail}"
        parts.append(f"{found.name}{driver}{trouble}")
        if not found.usable:
            remedies.append(_ACCELERATOR_REMEDIES.get(found.kind, "check its driver"))
    status = CheckStatus.WARN if remedies else CheckStatus.OK
    return Check("accelerators", status, "; ".join(parts), "; ".join(dict.fromkeys(remedies)))


def check_runtimes(spec: PlatformSpec) -> Check:
    """Check that an inference runtime is proven, and that none is broken."""
    parts = []
    for found in spec.runtimes:
        version = f" {found.version}" if found.version else ""
        parts.append(f"{found.name}{version} {found.status}")
    summary = "; ".join(parts) or "no runtime was tried"
    if not any(found.status is RuntimeStatus.PROVEN for found in spec.runtimes):
        remedy = "pip install 'edgeward[onnx]' (or [litert] on a small board)"
        return Check("runtimes", CheckStatus.FAIL, summary, remedy)
    broken = [found for found in spec.runtimes if found.status is RuntimeStatus.BROKEN]
    if broken:
        reasons = "; ".join(f"{found.name}: {found.detail}" for found in broken)
        remedy = f"uninstall what you do not need, or mend it. {reasons}"
        return Check("runtimes", CheckStatus.WARN, summary, remedy)
    return Check("runtimes", CheckStatus.OK, summary)


def check_disk_space(probe: ProbeData) -> Check:
    """Check the space that an unprivileged user may still write."""
    if probe.disk.free_bytes is None or probe.disk.total_bytes is None:
        remedy = f"check that {probe.disk.path} can be reached"
        return Check("disk-space", CheckStatus.WARN, "free space is unknown", remedy)
    free_mb = probe.disk.free_bytes // 10**6
    summary = f"{free_mb} MB of {probe.disk.total_bytes // 10**6} free for {probe.disk.path}"
    remedy = "free some space, or move the data folder to a larger disk"
    if free_mb < DISK_FAIL_MB:
        return Check("disk-space", CheckStatus.FAIL, summary, remedy)
    if free_mb < DISK_WARN_MB:
        return Check("disk-space", CheckStatus.WARN, summary, remedy)
    return Check("disk-space", CheckStatus.OK, summary)


def check_disk_kind(probe: ProbeData) -> Check:
    """Check that the filesystem keeps what it was told to keep."""
    filesystem = probe.disk.filesystem
    summary = f"{_describe_disk(probe)}, {filesystem or 'unknown filesystem'}"
    if filesystem in _NETWORK_FILESYSTEMS:
        remedy = "put the data folder on a local disk: SQLite's locks do not hold over a network"
        return Check("disk-kind", CheckStatus.FAIL, summary, remedy)
    if filesystem in _VOLATILE_FILESYSTEMS:
        remedy = "put the data folder on a disk or a volume: this one is gone after a restart"
        return Check("disk-kind", CheckStatus.WARN, summary, remedy)
    return Check("disk-kind", CheckStatus.OK, summary)


def check_store(probe: ProbeData, store: StoreFacts) -> Check:
    """Check that the data folder takes durable writes, and how fast."""
    path = probe.disk.path
    if not store.writable:
        remedy = f"create {path} and give it to the user that runs the agent"
        if probe.disk.read_only:
            remedy = f"mount the filesystem of {path} read-write"
        return Check("store", CheckStatus.FAIL, f"{path}: {store.error or 'not writable'}", remedy)
    if store.fsync_ms is None:
        remedy = "run the check again"
        return Check("store", CheckStatus.WARN, f"{path} is writable; fsync not measured", remedy)
    summary = f"{path} is writable; a durable append takes {store.fsync_ms:.2f} ms"
    if store.fsync_ms > FSYNC_WARN_MS:
        remedy = "move the data folder to a faster disk, or replace a worn SD card"
        return Check("store", CheckStatus.WARN, summary, remedy)
    return Check("store", CheckStatus.OK, summary)


def check_clock(spec: PlatformSpec, probe: ProbeData) -> Check:
    """Check the wall clock: certificates and update metadata expire by it."""
    remedy = "start a time service: `systemctl enable --now systemd-timesyncd` (or chrony)"
    if probe.clock.unix_time_s < CLOCK_FLOOR_S:
        summary = "the clock is behind the release of this version"
        return Check("clock", CheckStatus.FAIL, summary, remedy)
    if probe.clock.synchronized:
        return Check("clock", CheckStatus.OK, f"synchronised (says {probe.clock.source})")
    if spec.os is Os.MACOS:
        return Check("clock", CheckStatus.OK, "kept by macOS")
    state = "not synchronised" if probe.clock.synchronized is False else "state unknown"
    return Check("clock", CheckStatus.WARN, state, remedy)


def _describe_disk(probe: ProbeData) -> str:
    disk = probe.disk
    if disk.card_type == "SD":
        return f"SD card ({disk.device})"
    if disk.card_type == "MMC":
        return f"eMMC ({disk.device})"
    # Hypervisors announce their disks as rotational whatever lies behind them.
    if disk.device is None or disk.rotational is None or _PARAVIRTUAL_DISK.match(disk.device):
        return f"disk {disk.device or 'of unknown kind'}"
    return f"{'hard disk' if disk.rotational else 'solid-state disk'} ({disk.device})"
