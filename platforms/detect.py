"""Detection: raw facts of a box in, its `PlatformSpec` out.

Pure: reads `ProbeData` and nothing else, so a box that was recorded anywhere is
detected the same way everywhere. `hardware_class` names boxes that may share
measurements, and is stable: a board's own name where it is a known board, else the
architecture with the instruction set that INT8 and FP32 kernels choose by, then the
usable accelerators.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from platforms.probe import ContainerHints, ProbeData
from platforms.spec import (
    Accelerator,
    AcceleratorKind,
    Arch,
    Os,
    PlatformSpec,
    RuntimeFinding,
)

X86_FLAGS = frozenset(
    (
        "avx",
        "avx2",
        "fma",
        "avx512f",
        "avx512_vnni",
        "avx_vnni",
        "avx512_bf16",
        "amx_int8",
        "amx_bf16",
    )
)
ARM_FLAGS = frozenset(("asimd", "asimddp", "i8mm", "bf16", "fphp", "asimdhp", "sve", "neon"))

_X86_RANK = ("amx_int8", "avx512_vnni", "avx512f", "avx_vnni", "avx2", "avx")
_ARM_RANK = ("i8mm", "asimddp", "asimdhp", "asimd", "neon")

_APPLE_FLAGS = {
    "hw.optional.arm.FEAT_DotProd": ("asimddp",),
    "hw.optional.arm.FEAT_I8MM": ("i8mm",),
    "hw.optional.arm.FEAT_BF16": ("bf16",),
    "hw.optional.arm.FEAT_FP16": ("fphp", "asimdhp"),
}
_APPLE_INTEL_FLAGS = {"AVX1.0": "avx", "AVX2": "avx2", "FMA": "fma", "AVX512F": "avx512f"}

# Source: Arm's MIDR_EL1 part numbers as in lscpu's table (util-linux 2.40, sys-utils/lscpu-arm.c).
_ARM_PARTS = {
    ("0x41", "0xc07"): "Cortex-A7",
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd04"): "Cortex-A35",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd09"): "Cortex-A73",
    ("0x41", "0xd0a"): "Cortex-A75",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd44"): "Cortex-X1",
    ("0x41", "0xd46"): "Cortex-A510",
    ("0x41", "0xd47"): "Cortex-A710",
    ("0x41", "0xd49"): "Neoverse-N2",
    ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x48", "0xd01"): "TaiShan-v110",
    ("0x4e", "0x003"): "Denver 2",
    ("0x4e", "0x004"): "Carmel",
}

_BOARD_CLASSES = {
    "brcm,bcm2836": "rpi2",
    "brcm,bcm2837": "rpi3",
    "brcm,bcm2711": "rpi4",
    "brcm,bcm2712": "rpi5",
    "nvidia,tegra210": "jetson-nano",
    "nvidia,tegra186": "jetson-tx2",
    "nvidia,tegra194": "jetson-xavier",
    "nvidia,tegra234": "jetson-orin",
    "nvidia,tegra264": "jetson-thor",
}
"""Boards by their chip's device-tree name: a Compute Module 4 is an `rpi4` to a model."""

# Source: pci-ids.ucw.cz and drivers/accel/ivpu/ivpu_drv.h of Linux 6.12.
_INTEL_NPUS = {
    "0x7d1d": "Meteor Lake NPU",
    "0xad1d": "Arrow Lake NPU",
    "0x643e": "Lunar Lake NPU",
    "0xb03e": "Panther Lake NPU",
}
_INTEL_GPUS = {
    "0x46a6": "Iris Xe Graphics (Alder Lake-P)",
    "0x46d1": "UHD Graphics (Alder Lake-N)",
    "0x56a0": "Arc A770",
    "0x7d45": "Graphics (Meteor Lake-P)",
    "0x7d55": "Arc Graphics (Meteor Lake-P)",
    "0x9a49": "Iris Xe Graphics (Tiger Lake-LP)",
    "0xa780": "UHD Graphics 770 (Raptor Lake-S)",
}
_ASCEND_DEVICES = {"0xd100": "Ascend 310", "0xd500": "Ascend 310P", "0xd801": "Ascend 910"}

_BOARD_PLACEHOLDERS = frozenset(
    ("", "default string", "none", "super server", "system product name", "to be filled by o.e.m.")
)


def detect_platform(probe: ProbeData, runtimes: tuple[RuntimeFinding, ...] = ()) -> PlatformSpec:
    """Decide what box these facts and runtime findings describe."""
    os_, arch = _detect_os(probe), _detect_arch(probe)
    flags = _detect_flags(probe, arch)
    accelerators = tuple(found for detect in _ACCELERATORS for found in detect(probe))
    machine_mb = _detect_machine_memory_mb(probe)
    return PlatformSpec(
        os=os_,
        os_version=_detect_os_version(probe),
        arch=arch,
        cpu_model=_detect_cpu_model(probe),
        cpu_flags=tuple(sorted(flags)),
        cores=_detect_cores(probe),
        cores_machine=probe.cpu_count,
        memory_mb=_detect_memory_mb(probe, machine_mb),
        memory_machine_mb=machine_mb,
        python_version=probe.python_version,
        container=_detect_container(probe.container),
        board=_detect_board(probe),
        accelerators=accelerators,
        runtimes=runtimes,
        hardware_class=_detect_class(probe, arch, flags, accelerators),
        extra=_detect_extra(probe),
    )


def _detect_os(probe: ProbeData) -> Os:
    return {"Linux": Os.LINUX, "Darwin": Os.MACOS}.get(probe.system, Os.OTHER)


def _detect_os_version(probe: ProbeData) -> str:
    macos = probe.sysctl.get("kern.osproductversion")
    if macos:
        return f"macOS {macos}"
    return probe.os_release.get("PRETTY_NAME") or f"{probe.system} {probe.release}".strip()


def _detect_arch(probe: ProbeData) -> Arch:
    machine = probe.machine.lower()
    if probe.system == "Darwin" and machine == "arm64":
        return Arch.APPLE_SILICON
    if machine in ("x86_64", "amd64") and probe.pointer_bits == 64:
        return Arch.X86_64
    if machine in ("aarch64", "arm64"):
        # Raspberry Pi OS runs its 32-bit user space on a 64-bit kernel: wheels go by the former.
        return Arch.AARCH64 if probe.pointer_bits == 64 else Arch.ARMV7
    return Arch.ARMV7 if machine in ("armv7l", "armv8l") else Arch.OTHER


def _detect_flags(probe: ProbeData, arch: Arch) -> frozenset[str]:
    """Return the flags that matter and that every core has."""
    if probe.system == "Darwin":
        return _detect_macos_flags(probe.sysctl, arch)
    key = "flags" if arch is Arch.X86_64 else "Features"
    cores = [frozenset(text.split()) for text in _read_cpuinfo(probe.cpuinfo, key)]
    flags = frozenset.intersection(*cores) if cores else frozenset()
    if arch is Arch.ARMV7 and "asimd" in flags:
        flags |= {"neon"}
    return flags & (X86_FLAGS if arch is Arch.X86_64 else ARM_FLAGS)


def _detect_macos_flags(sysctl: dict[str, str], arch: Arch) -> frozenset[str]:
    if arch is not Arch.APPLE_SILICON:
        names = ("machdep.cpu.features", "machdep.cpu.leaf7_features")
        words = " ".join(sysctl.get(name, "") for name in names).split()
        return frozenset(_APPLE_INTEL_FLAGS[word] for word in words if word in _APPLE_INTEL_FLAGS)
    optional = (flags for name, flags in _APPLE_FLAGS.items() if sysctl.get(name) == "1")
    return frozenset({"asimd"}.union(*optional))


def _read_cpuinfo(cpuinfo: str, key: str) -> list[str]:
    """Return the values of one key, a core after another."""
    return re.findall(rf"^{re.escape(key)}[ \t]*:[ \t]*(.+)$", cpuinfo, re.MULTILINE)


def _detect_cpu_model(probe: ProbeData) -> str:
    brand = probe.sysctl.get("machdep.cpu.brand_string")
    if brand:
        return brand
    named = _read_cpuinfo(probe.cpuinfo, "model name")
    # "ARMv8 Processor rev 1 (v8l)" names no model; the part numbers do.
    if named and not named[0].startswith("ARMv"):
        return named[0].strip()
    implementers = _read_cpuinfo(probe.cpuinfo, "CPU implementer")
    parts = _read_cpuinfo(probe.cpuinfo, "CPU part")
    ids = dict.fromkeys(zip(implementers, parts, strict=False))
    names = [_ARM_PARTS.get(found, f"{found[0]}:{found[1]}") for found in ids]
    return " + ".join(names) or (named[0] if named else "unknown")


def _detect_cores(probe: ProbeData) -> float:
    """Return the cores allowed: the tightest of quota, cpuset, affinity and machine."""
    limits = [float(probe.cpu_count)]
    limits.extend(quota for text in probe.cgroup.cpu_max if (quota := _read_quota(text)))
    if probe.cgroup.cpuset:
        limits.append(float(_count_cpus(probe.cgroup.cpuset)))
    if probe.affinity:
        limits.append(float(probe.affinity))
    return min(limit for limit in limits if limit > 0)


def _read_quota(text: str) -> float | None:
    quota, _, period = text.partition(" ")
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(quota) / int(period)


def _count_cpus(cpuset: str) -> int:
    """Count the CPUs of the kernel's list form, such as `0-2,5`."""
    total = 0
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", cpuset):
        total += int(last or first) - int(first) + 1
    return total


def _detect_machine_memory_mb(probe: ProbeData) -> int:
    macos = probe.sysctl.get("hw.memsize", "")
    size = int(macos) if macos.isdigit() else probe.meminfo_kb.get("MemTotal", 0) * 1024
    return size // 10**6


def _detect_memory_mb(probe: ProbeData, machine_mb: int) -> int:
    limits = (int(text) // 10**6 for text in probe.cgroup.memory_max if text.isdigit())
    return min((machine_mb, *limits)) if machine_mb else 0


def _detect_container(hints: ContainerHints) -> str | None:
    marks = (
        (hints.kubernetes or "kubepods" in hints.init_cgroup, "kubernetes"),
        (hints.containerenv or hints.env == "podman", "podman"),
        (hints.dockerenv or "/docker" in hints.init_cgroup, "docker"),
        ("/lxc" in hints.init_cgroup, "lxc"),
    )
    return next((name for is_marked, name in marks if is_marked), hints.env)


def _detect_board(probe: ProbeData) -> str | None:
    if probe.device_tree_model:
        return probe.device_tree_model
    names = (probe.dmi.get("product_name", ""), probe.dmi.get("board_name", ""))
    named = (name for name in names if name.strip().lower() not in _BOARD_PLACEHOLDERS)
    return next(named, None) or probe.sysctl.get("hw.model")


def _detect_extra(probe: ProbeData) -> dict[str, str | bool]:
    facts: dict[str, str | bool | None] = {
        "kernel": probe.release,
        "libc": _detect_libc(probe),
        "power_mode": probe.power_mode,
        "jetson_release": probe.jetson_release,
        "rosetta": probe.sysctl.get("sysctl.proc_translated") == "1" or None,
        "kernel_machine": probe.machine if probe.pointer_bits == 32 else None,
    }
    return {name: value for name, value in facts.items() if value}


def _detect_libc(probe: ProbeData) -> str:
    if probe.libc:
        return probe.libc
    return "musl" if any(name.startswith("ld-musl") for name in probe.libraries) else ""


def _detect_class(
    probe: ProbeData,
    arch: Arch,
    flags: frozenset[str],
    accelerators: tuple[Accelerator, ...],
) -> str:
    base, own = _detect_base_class(probe, arch, flags)
    kinds = {found.kind for found in accelerators if found.usable} - own
    return "+".join((base, *sorted(kinds)))


def _detect_base_class(
    probe: ProbeData, arch: Arch, flags: frozenset[str]
) -> tuple[str, frozenset[AcceleratorKind]]:
    """Return the class without accelerators, and the accelerators its name already implies."""
    chips = (_BOARD_CLASSES.get(name) for name in probe.device_tree_compatible)
    board = next((chip for chip in chips if chip), None)
    if board:
        suffix = "-armv7" if arch is Arch.ARMV7 else ""
        return board + suffix, frozenset({AcceleratorKind.JETSON})
    chip = re.match(r"Apple (M\d+)", probe.sysctl.get("machdep.cpu.brand_string", ""))
    if chip and arch is Arch.APPLE_SILICON:
        own = frozenset({AcceleratorKind.APPLE_GPU, AcceleratorKind.APPLE_ANE})
        return f"mac-{chip[1].lower()}", own
    rank = _X86_RANK if arch is Arch.X86_64 else _ARM_RANK
    best = next((flag for flag in rank if flag in flags), None)
    return f"{arch}-{best}" if best else str(arch), frozenset()


@dataclass(frozen=True)
class _Nodes:
    """Whether device nodes that match a pattern are there, and open to this user."""

    present: bool
    accessible: bool


def _find_nodes(probe: ProbeData, pattern: str) -> _Nodes:
    nodes = [node for node in probe.device_nodes if re.fullmatch(pattern, node.path)]
    return _Nodes(bool(nodes), any(node.accessible for node in nodes))


def _explain(nodes: _Nodes, what: str) -> str:
    """Return why a device cannot be used, or an empty text where it can."""
    if not nodes.present:
        return f"no {what}: the driver is not loaded, or the container does not pass it"
    return "" if nodes.accessible else f"no permission for {what}"


def _is_jetson(probe: ProbeData) -> bool:
    return any(name.startswith("nvidia,tegra") for name in probe.device_tree_compatible)


def _detect_nvidia(probe: ProbeData) -> Iterable[Accelerator]:
    # A Jetson's NVML names its GPU too: it is reported once, as a Jetson.
    if _is_jetson(probe):
        return
    for gpu in probe.nvidia.gpus:
        yield Accelerator(
            AcceleratorKind.NVIDIA_GPU,
            gpu.name,
            memory_mb=gpu.memory_bytes // 10**6 if gpu.memory_bytes else None,
            driver=probe.nvidia.driver_version,
            detail=f"compute capability {gpu.compute_capability}" if gpu.compute_capability else "",
        )
    is_on_bus = any(
        found.vendor == "0x10de" and found.pci_class.startswith("0x03") for found in probe.pci
    )
    if not probe.nvidia.gpus and (is_on_bus or _find_nodes(probe, r"/dev/nvidia\d+").present):
        reason = probe.nvidia.error or "NVML lists no GPU"
        yield Accelerator(AcceleratorKind.NVIDIA_GPU, "NVIDIA GPU", usable=False, detail=reason)


def _detect_jetson(probe: ProbeData) -> Iterable[Accelerator]:
    if not _is_jetson(probe):
        return
    reason = _explain(_find_nodes(probe, r"/dev/(nvmap|nvhost-.*|nvgpu/.*)"), "/dev/nvhost-*")
    yield Accelerator(
        AcceleratorKind.JETSON,
        probe.device_tree_model or "NVIDIA Jetson",
        driver=probe.jetson_release,
        usable=not reason,
        detail=reason or "shares the box's memory",
    )


def _detect_apple(probe: ProbeData) -> Iterable[Accelerator]:
    if _detect_arch(probe) is not Arch.APPLE_SILICON:
        return
    chip = probe.sysctl.get("machdep.cpu.brand_string", "Apple silicon")
    is_virtual = probe.sysctl.get("kern.hv_vmm_present") == "1"
    reason = "a virtual machine has no Neural Engine" if is_virtual else ""
    yield Accelerator(AcceleratorKind.APPLE_GPU, f"{chip} GPU", detail="shares the Mac's memory")
    yield Accelerator(
        AcceleratorKind.APPLE_ANE, f"{chip} Neural Engine", usable=not is_virtual, detail=reason
    )


def _detect_intel_gpu(probe: ProbeData) -> Iterable[Accelerator]:
    reason = _explain(_find_nodes(probe, r"/dev/dri/renderD\d+"), "/dev/dri/renderD*")
    for found in probe.pci:
        if found.vendor == "0x8086" and found.pci_class.startswith("0x03"):
            name = _INTEL_GPUS.get(found.device, f"GPU 8086:{found.device.removeprefix('0x')}")
            yield Accelerator(
                AcceleratorKind.INTEL_GPU,
                f"Intel {name}",
                driver=found.driver,
                usable=not reason,
                detail=reason,
            )


def _detect_intel_npu(probe: ProbeData) -> Iterable[Accelerator]:
    reason = _explain(_find_nodes(probe, r"/dev/accel/accel\d+"), "/dev/accel/accel*")
    # OpenVINO reaches the NPU through this user-space driver, which no kernel brings along.
    if not reason and not any(name.startswith("libze_intel_") for name in probe.libraries):
        reason = "libze_intel_npu.so is missing: install intel-level-zero-npu"
    for found in probe.pci:
        is_npu = found.device in _INTEL_NPUS or found.driver == "intel_vpu"
        if found.vendor == "0x8086" and found.pci_class.startswith("0x12") and is_npu:
            name = _INTEL_NPUS.get(found.device, f"NPU 8086:{found.device.removeprefix('0x')}")
            yield Accelerator(
                AcceleratorKind.INTEL_NPU,
                f"Intel {name}",
                driver=found.driver,
                usable=not reason,
                detail=reason,
            )


def _detect_ascend(probe: ProbeData) -> Iterable[Accelerator]:
    on_bus = [
        found
        for found in probe.pci
        if found.vendor == "0x19e5" and found.pci_class.startswith("0x12")
    ]
    nodes = _find_nodes(probe, r"/dev/davinci\d+")
    if not on_bus and not nodes.present:
        return
    reason = _explain(nodes, "/dev/davinci*") or _explain(
        _find_nodes(probe, r"/dev/davinci_manager"), "/dev/davinci_manager"
    )
    names = [_ASCEND_DEVICES.get(found.device, "Ascend NPU") for found in on_bus]
    for name in names or ["Ascend NPU"]:
        yield Accelerator(
            AcceleratorKind.ASCEND_NPU, f"Huawei {name}", usable=not reason, detail=reason
        )


def _detect_coral(probe: ProbeData) -> Iterable[Accelerator]:
    library = ""
    if not any(name.startswith("libedgetpu") for name in probe.libraries):
        library = "libedgetpu.so.1 is missing: install libedgetpu1-std"
    for _ in probe.usb_ids:
        yield Accelerator(
            AcceleratorKind.CORAL_EDGE_TPU, "Coral USB", usable=not library, detail=library
        )
    nodes = _find_nodes(probe, r"/dev/apex_\d+")
    is_on_bus = any((found.vendor, found.device) == ("0x1ac1", "0x089a") for found in probe.pci)
    if nodes.present or is_on_bus:
        reason = _explain(nodes, "/dev/apex_*") or library
        yield Accelerator(
            AcceleratorKind.CORAL_EDGE_TPU, "Coral PCIe", usable=not reason, detail=reason
        )


_ACCELERATORS: tuple[Callable[[ProbeData], Iterable[Accelerator]], ...] = (
    _detect_nvidia,
    _detect_jetson,
    _detect_apple,
    _detect_intel_gpu,
    _detect_intel_npu,
    _detect_ascend,
    _detect_coral,
)
