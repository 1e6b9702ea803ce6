"""Probes: the only part of `platforms` that reads the box to describe it.

Owns `ProbeData`, the raw facts of one box as plain JSON-ready values, and
`probe_box`, which collects them. Draws no conclusion: `detect` and `preflight`
do, on a probe recorded anywhere. A fact that cannot be read is absent, never an
error. `root` points at `/` or at a recorded tree; live interfaces that are no
files (NVML, sysctl, adjtimex, this process's affinity) are asked only at `/`.
"""

import ctypes
import os
import platform
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from platforms.cgroup import CgroupFacts, probe_cgroup, read_text
from platforms.nvml import NvidiaFacts, NvidiaGpu, probe_nvidia

_ROOT = Path("/")
_DEVICE_GLOBS = (
    "nvidia*",
    "nvhost*",
    "nvmap",
    "nvgpu/*/*",
    "dri/*",
    "accel/*",
    "davinci*",
    "apex*",
)
_LIBRARY_GLOBS = ("libedgetpu.so*", "libze_intel_npu.so*", "libze_intel_vpu.so*", "ld-musl-*")
_LIBRARY_FOLDERS = ("lib", "usr/lib", "usr/lib/*-linux-gnu*", "usr/local/lib")
_PCI_CLASSES = ("0x03", "0x12")
"""Display controllers and processing accelerators, by the PCI Code and ID Assignment."""
_PCI_CORAL_VENDOR = "0x1ac1"
"""A Coral card is a "system peripheral", as are dozens of parts that are of no interest."""
_CORAL_USB_IDS = ("1a6e:089a", "18d1:9302")
"""A Coral USB Accelerator before and after its firmware is loaded."""
_SYSCTL_NAMES = (
    "machdep.cpu.brand_string",
    "machdep.cpu.features",
    "machdep.cpu.leaf7_features",
    "hw.optional",
    "hw.memsize",
    "hw.model",
    "hw.ncpu",
    "kern.osproductversion",
    "kern.hv_vmm_present",
    "sysctl.proc_translated",
)
_FSYNC_WRITES = 20
_FSYNC_LIMIT_S = 2.0
_FSYNC_BYTES = 512
"""About one row of the write-ahead log that each commit of the store flushes."""


@dataclass(frozen=True)
class PciDevice:
    """One display controller or accelerator on the PCI bus; ids as `0x8086`."""

    vendor: str
    device: str
    pci_class: str
    driver: str | None = None
    """The kernel module bound to it."""


@dataclass(frozen=True)
class DeviceNode:
    """One node below `/dev`, and whether this user may read and write it."""

    path: str
    accessible: bool


@dataclass(frozen=True)
class ThermalZone:
    """One temperature sensor as the kernel names it."""

    name: str
    celsius: float


@dataclass(frozen=True)
class DiskFacts:
    """The filesystem that holds one path. Sizes in bytes."""

    path: str
    total_bytes: int | None = None
    free_bytes: int | None = None
    """What an unprivileged user may still write."""
    filesystem: str | None = None
    device: str | None = None
    """The whole disk's kernel name: `mmcblk0`, `nvme0n1`, `sda`."""
    rotational: bool | None = None
    card_type: str | None = None
    """`SD` or `MMC` (soldered eMMC) where the disk is such a card."""
    read_only: bool = False


@dataclass(frozen=True)
class StoreFacts:
    """Whether a folder takes writes, and how long a durable one takes."""

    writable: bool
    fsync_ms: float | None = None
    """Median of up to 20 appends of 512 bytes, each with fsync."""
    error: str = ""


@dataclass(frozen=True)
class ContainerHints:
    """Marks that container runtimes leave."""

    dockerenv: bool = False
    containerenv: bool = False
    kubernetes: bool = False
    env: str | None = None
    """The variable `container`, or the text of `/run/systemd/container`."""
    init_cgroup: str = ""


@dataclass(frozen=True)
class ClockFacts:
    """What the kernel and the time service say about the wall clock."""

    unix_time_s: float = 0.0
    synchronized: bool | None = None
    source: str = ""
    """Who said so: `timesyncd` or `adjtimex`."""


@dataclass(frozen=True)
class ProbeData:
    """Raw facts of one box, JSON-ready both ways."""

    system: str = ""
    machine: str = ""
    release: str = ""
    python_version: str = ""
    pointer_bits: int = 64
    """Of this Python: a 32-bit user space may run on a 64-bit kernel."""
    libc: str = ""
    cpu_count: int = 1
    affinity: int | None = None
    """CPUs this process may run on, by its affinity mask."""
    cpuinfo: str = ""
    meminfo_kb: dict[str, int] = field(default_factory=dict)
    os_release: dict[str, str] = field(default_factory=dict)
    cgroup: CgroupFacts = field(default_factory=CgroupFacts)
    device_tree_model: str | None = None
    device_tree_compatible: tuple[str, ...] = ()
    dmi: dict[str, str] = field(default_factory=dict)
    device_nodes: tuple[DeviceNode, ...] = ()
    libraries: tuple[str, ...] = ()
    """Shared libraries that drivers of accelerators need, as found in the library folders."""
    pci: tuple[PciDevice, ...] = ()
    usb_ids: tuple[str, ...] = ()
    """Coral accelerators on USB, as `vendor:product`."""
    nvidia: NvidiaFacts = field(default_factory=NvidiaFacts)
    jetson_release: str | None = None
    sysctl: dict[str, str] = field(default_factory=dict)
    thermal: tuple[ThermalZone, ...] = ()
    power_mode: str | None = None
    disk: DiskFacts = field(default_factory=lambda: DiskFacts(path=""))
    container: ContainerHints = field(default_factory=ContainerHints)
    clock: ClockFacts = field(default_factory=ClockFacts)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ProbeData":
        """Rebuild a probe from `to_json`'s form; what it lacks has its default.

        Raises:
            TypeError, KeyError: the data is not such a form.
        """
        return cls(**{name: _rebuild(name, value) for name, value in data.items()})


def probe_box(path: Path, root: Path = _ROOT) -> ProbeData:
    """Read everything that detection and preflight decide on.

    `path` is the store's folder, whose disk is described. Starts one `sysctl` process
    on macOS and loads NVML where present; takes some milliseconds on Linux.
    """
    is_live = root == _ROOT
    return ProbeData(
        system=platform.system(),
        machine=platform.machine(),
        release=read_text(root / "proc/sys/kernel/osrelease") or platform.release(),
        python_version=platform.python_version(),
        pointer_bits=struct.calcsize("P") * 8,
        libc=" ".join(part for part in platform.libc_ver() if part),
        cpu_count=_probe_cpu_count(root),
        affinity=_probe_affinity() if is_live else None,
        cpuinfo=read_text(root / "proc/cpuinfo") or "",
        meminfo_kb=probe_meminfo(root),
        os_release=_probe_os_release(root),
        cgroup=probe_cgroup(root),
        device_tree_model=read_text(root / "proc/device-tree/model"),
        device_tree_compatible=_probe_compatible(root),
        dmi=_probe_dmi(root),
        device_nodes=_probe_device_nodes(root),
        libraries=_probe_libraries(root),
        pci=_probe_pci(root),
        usb_ids=_probe_usb_ids(root),
        nvidia=probe_nvidia() if is_live else NvidiaFacts(),
        jetson_release=_first_line(read_text(root / "etc/nv_tegra_release")),
        sysctl=_probe_sysctl() if is_live and platform.system() == "Darwin" else {},
        thermal=probe_thermal(root),
        power_mode=probe_power_mode(root),
        disk=probe_disk(path, root),
        container=_probe_container(root),
        clock=_probe_clock(root, is_live=is_live),
    )


def probe_meminfo(root: Path = _ROOT) -> dict[str, int]:
    """Return `/proc/meminfo`'s numbers in KiB."""
    numbers = {}
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        amount = rest.split()
        if amount and amount[0].isdigit():
            numbers[name] = int(amount[0])
    return numbers


def probe_thermal(root: Path = _ROOT) -> tuple[ThermalZone, ...]:
    """Return the thermal zones, or hwmon's CPU sensors where the kernel has no zone."""
    zones = [
        (zone / "type", zone / "temp")
        for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    ]
    sensors = [
        (hwmon / "name", hwmon / "temp1_input")
        for hwmon in sorted((root / "sys/class/hwmon").glob("hwmon*"))
    ]
    return _read_zones(zones) or _read_zones(sensors)


def probe_power_mode(root: Path = _ROOT) -> str | None:
    """Return the power mode: nvpmodel's on a Jetson, else the profile or the governor."""
    nvpmodel = read_text(root / "var/lib/nvpmodel/status")
    if nvpmodel and nvpmodel.startswith("pmode:"):
        return f"nvpmodel {nvpmodel.removeprefix('pmode:')}"
    profile = read_text(root / "sys/firmware/acpi/platform_profile")
    return profile or read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def probe_disk(path: Path, root: Path = _ROOT) -> DiskFacts:
    """Describe the disk below `path`, or below its nearest existing parent."""
    existing = _find_existing(path)
    try:
        usage = os.statvfs(existing)
    except OSError:
        return DiskFacts(path=str(path))
    mount = _find_mount(existing, root)
    block = _find_block(mount, root) if mount else None
    queue = read_text(block / "queue/rotational") if block else None
    return DiskFacts(
        path=str(path),
        total_bytes=usage.f_blocks * usage.f_frsize,
        free_bytes=usage.f_bavail * usage.f_frsize,
        filesystem=mount.filesystem if mount else None,
        device=block.name if block else None,
        rotational=None if queue is None else queue == "1",
        card_type=read_text(block / "device/type") if block and "mmc" in block.name else None,
        read_only=bool(usage.f_flag & os.ST_RDONLY),
    )


def probe_fsync(path: Path) -> StoreFacts:
    """Measure a durable append in the folder `path`.

    Writes up to 10 kB into a temporary file there and removes it; blocks for 20 fsyncs, or
    for about 2 s on a disk that is slower than that.
    """
    timings: list[float] = []
    try:
        with tempfile.TemporaryFile(dir=path, prefix=".edgeward-fsync-", buffering=0) as file:
            while len(timings) < _FSYNC_WRITES and sum(timings) < _FSYNC_LIMIT_S:
                timings.append(_time_fsync(file.fileno()))
    except OSError as exc:
        return StoreFacts(writable=False, error=exc.strerror or str(exc))
    return StoreFacts(writable=True, fsync_ms=statistics.median(timings) * 1000)


def _time_fsync(descriptor: int) -> float:
    started = time.perf_counter()
    os.write(descriptor, b"\0" * _FSYNC_BYTES)
    os.fsync(descriptor)
    return time.perf_counter() - started


def _probe_cpu_count(root: Path) -> int:
    """Count the CPUs online, from the tree where it is a recorded one."""
    if root == _ROOT:
        return os.cpu_count() or 1
    cpuinfo = read_text(root / "proc/cpuinfo") or ""
    return sum(line.startswith("processor") for line in cpuinfo.splitlines()) or 1


def _probe_affinity() -> int | None:
    # macOS has no affinity masks.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _probe_os_release(root: Path) -> dict[str, str]:
    text = read_text(root / "etc/os-release") or read_text(root / "usr/lib/os-release") or ""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {name: value.strip("\"'") for name, value in pairs}


def _probe_compatible(root: Path) -> tuple[str, ...]:
    text = read_text(root / "proc/device-tree/compatible") or ""
    return tuple(name for name in text.split("\x00") if name)


def _probe_dmi(root: Path) -> dict[str, str]:
    names = ("sys_vendor", "product_name", "board_vendor", "board_name")
    texts = {name: read_text(root / "sys/class/dmi/id" / name) for name in names}
    return {name: text for name, text in texts.items() if text}


def _probe_device_nodes(root: Path) -> tuple[DeviceNode, ...]:
    nodes = {node for pattern in _DEVICE_GLOBS for node in (root / "dev").glob(pattern)}
    return tuple(
        DeviceNode(f"/{node.relative_to(root)}", os.access(node, os.R_OK | os.W_OK))
        for node in sorted(nodes)
        if not node.is_dir()
    )


def _probe_libraries(root: Path) -> tuple[str, ...]:
    found = {
        library.name
        for folder in _LIBRARY_FOLDERS
        for pattern in _LIBRARY_GLOBS
        for library in root.glob(f"{folder}/{pattern}")
    }
    return tuple(sorted(found))


def _probe_pci(root: Path) -> tuple[PciDevice, ...]:
    devices = []
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        pci_class, vendor = read_text(folder / "class") or "", read_text(folder / "vendor") or ""
        if pci_class.startswith(_PCI_CLASSES) or vendor == _PCI_CORAL_VENDOR:
            driver = folder / "driver"
            devices.append(
                PciDevice(
                    vendor=vendor,
                    device=read_text(folder / "device") or "",
                    pci_class=pci_class,
                    driver=driver.resolve().name if driver.exists() else None,
                )
            )
    return tuple(devices)


def _probe_usb_ids(root: Path) -> tuple[str, ...]:
    folders = sorted((root / "sys/bus/usb/devices").glob("*"))
    ids = (
        f"{read_text(folder / 'idVendor')}:{read_text(folder / 'idProduct')}" for folder in folders
    )
    return tuple(usb_id for usb_id in ids if usb_id in _CORAL_USB_IDS)


def _probe_sysctl() -> dict[str, str]:
    """Ask macOS; names it does not know are left out."""
    try:
        answer = subprocess.run(
            ["/usr/sbin/sysctl", *_SYSCTL_NAMES],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (line.split(": ", 1) for line in answer.stdout.splitlines() if ": " in line)
    return {name: value.strip() for name, value in pairs}


def _probe_container(root: Path) -> ContainerHints:
    return ContainerHints(
        dockerenv=(root / ".dockerenv").exists(),
        containerenv=(root / "run/.containerenv").exists(),
        kubernetes="KUBERNETES_SERVICE_HOST" in os.environ,
        # The variable's name is in lower case: podman, LXC and systemd-nspawn set it.
        env=os.environ.get("container") or read_text(root / "run/systemd/container"),  # noqa: SIM112
        init_cgroup=read_text(root / "proc/1/cgroup") or "",
    )


class _Timex(ctypes.Structure):
    """The head of `struct timex`; the rest is room for the kernel to write into."""

    _fields_ = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    ]


def _probe_clock(root: Path, *, is_live: bool) -> ClockFacts:
    now = time.time()
    if (root / "run/systemd/timesync/synchronized").exists():
        return ClockFacts(now, synchronized=True, source="timesyncd")
    synchronized = _read_adjtimex() if is_live else None
    return ClockFacts(now, synchronized, "" if synchronized is None else "adjtimex")


def _read_adjtimex() -> bool | None:
    """Ask the kernel whether a time service keeps the clock; changes nothing (`modes` is 0)."""
    unsynchronized = 0x40
    try:
        adjtimex = ctypes.CDLL(None).adjtimex
    except (OSError, AttributeError):
        return None
    timex = _Timex()
    if adjtimex(ctypes.byref(timex)) < 0:
        return None
    return not timex.status & unsynchronized


def _read_zones(files: list[tuple[Path, Path]]) -> tuple[ThermalZone, ...]:
    zones = []
    for name_file, celsius_file in files:
        text = read_text(celsius_file)
        # A sensor that is powered down answers an error, or nothing.
        if text and text.lstrip("-").isdigit():
            name = read_text(name_file) or celsius_file.parent.name
            zones.append(ThermalZone(name, int(text) / 1000))
    return tuple(zones)


@dataclass(frozen=True)
class _Mount:
    number: str
    point: str
    filesystem: str
    source: str


def _find_existing(path: Path) -> Path:
    absolute = path.absolute()
    return next((folder for folder in (absolute, *absolute.parents) if folder.exists()), _ROOT)


def _find_mount(path: Path, root: Path) -> _Mount | None:
    """Return the deepest mount that holds `path`; of several on one point, the topmost."""
    resolved = path.resolve()
    best: _Mount | None = None
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 2 or not resolved.is_relative_to(fields[4]):
            continue
        if best is None or len(fields[4]) >= len(best.point):
            best = _Mount(fields[2], fields[4], kind[0], kind[1])
    return best


def _find_block(mount: _Mount, root: Path) -> Path | None:
    """Return the sysfs folder of the whole disk below a mount."""
    candidates = (
        root / "sys/dev/block" / mount.number,
        # btrfs and others mount under a number of their own: go by the source's name.
        root / "sys/class/block" / Path(mount.source).name,
    )
    block = next((folder.resolve() for folder in candidates if folder.exists()), None)
    if block is not None and (block / "partition").exists():
        return block.parent
    return block


def _first_line(text: str | None) -> str | None:
    return text.splitlines()[0] if text else None


def _rebuild(name: str, value: Any) -> Any:
    rebuild = _REBUILDERS.get(name)
    return rebuild(value) if rebuild else value


def _each(kind: Callable[..., Any]) -> Callable[[list[dict[str, Any]]], tuple[Any, ...]]:
    return lambda items: tuple(kind(**item) for item in items)


def _rebuild_cgroup(item: dict[str, Any]) -> CgroupFacts:
    listed = {name: tuple(item.get(name, ())) for name in ("cpu_max", "memory_max")}
    return CgroupFacts(**{**item, **listed})


def _rebuild_nvidia(item: dict[str, Any]) -> NvidiaFacts:
    return NvidiaFacts(**{**item, "gpus": _each(NvidiaGpu)(item.get("gpus", []))})


_REBUILDERS: dict[str, Callable[[Any], Any]] = {
    "cgroup": _rebuild_cgroup,
    "device_tree_compatible": tuple,
    "device_nodes": _each(DeviceNode),
    "libraries": tuple,
    "pci": _each(PciDevice),
    "usb_ids": tuple,
    "nvidia": _rebuild_nvidia,
    "thermal": _each(ThermalZone),
    "disk": lambda item: DiskFacts(**item),
    "container": lambda item: ContainerHints(**item),
    "clock": lambda item: ClockFacts(**item),
}
