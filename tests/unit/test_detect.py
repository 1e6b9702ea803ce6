"""Detection on recorded boxes, and on the ways in which a box can be misread."""

import json
from dataclasses import replace

import pytest

from platforms.cgroup import CgroupFacts
from platforms.detect import detect_platform
from platforms.nvml import NvidiaFacts
from platforms.probe import ContainerHints, DeviceNode, PciDevice, ProbeData
from platforms.spec import (
    AcceleratorKind,
    Arch,
    Os,
    PlatformSpec,
    RuntimeFinding,
    RuntimeStatus,
)
from tests.unit.recorded import NAMES, detect_recorded, read_probe

CLASSES = {
    "container-half-core": "x86_64-avx2",
    "jetson-orin-nano": "jetson-orin",
    "mac-mini-m2": "mac-m2",
    "nuc-core-ultra": "x86_64-avx_vnni+intel_gpu+intel_npu",
    "rpi4": "rpi4",
    "rpi4-32bit-userland": "rpi4-armv7",
    "rpi5": "rpi5+coral_edge_tpu",
    "this-machine": "x86_64-avx512_vnni",
    "x86-server-t4": "x86_64-avx512_vnni+nvidia_gpu",
}


def close_nodes(probe: ProbeData) -> ProbeData:
    nodes = tuple(DeviceNode(node.path, accessible=False) for node in probe.device_nodes)
    return replace(probe, device_nodes=nodes)


def test_every_recorded_box_has_an_expected_class() -> None:
    assert set(CLASSES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_hardware_class_of_a_recorded_box_is_stable(name: str) -> None:
    assert detect_recorded(name).hardware_class == CLASSES[name]


@pytest.mark.parametrize("name", NAMES)
def test_spec_survives_a_trip_through_json(name: str) -> None:
    spec = detect_recorded(name)
    assert PlatformSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("name", "arch", "cpu_model", "flags"),
    [
        ("rpi4", Arch.AARCH64, "Cortex-A72", ("asimd",)),
        ("rpi4-32bit-userland", Arch.ARMV7, "Cortex-A72", ("neon",)),
        ("rpi5", Arch.AARCH64, "Cortex-A76", ("asimd", "asimddp", "asimdhp", "fphp")),
        (
            "jetson-orin-nano",
            Arch.AARCH64,
            "Cortex-A78AE",
            ("asimd", "asimddp", "asimdhp", "fphp"),
        ),
        (
            "mac-mini-m2",
            Arch.APPLE_SILICON,
            "Apple M2",
            ("asimd", "asimddp", "asimdhp", "bf16", "fphp", "i8mm"),
        ),
        (
            "nuc-core-ultra",
            Arch.X86_64,
            "Intel(R) Core(TM) Ultra 5 125H",
            ("avx", "avx2", "avx_vnni", "fma"),
        ),
        (
            "x86-server-t4",
            Arch.X86_64,
            "Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz",
            ("avx", "avx2", "avx512_vnni", "avx512f", "fma"),
        ),
    ],
)
def test_processor_of_a_recorded_box_is_recognised(
    name: str, arch: Arch, cpu_model: str, flags: tuple[str, ...]
) -> None:
    spec = detect_recorded(name)
    assert (spec.arch, spec.cpu_model, spec.cpu_flags) == (arch, cpu_model, flags)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("x86-server-t4", [AcceleratorKind.NVIDIA_GPU]),
        ("jetson-orin-nano", [AcceleratorKind.JETSON]),
        ("mac-mini-m2", [AcceleratorKind.APPLE_GPU, AcceleratorKind.APPLE_ANE]),
        ("nuc-core-ultra", [AcceleratorKind.INTEL_GPU, AcceleratorKind.INTEL_NPU]),
        ("rpi5", [AcceleratorKind.CORAL_EDGE_TPU]),
        ("rpi4", []),
        ("container-half-core", []),
    ],
)
def test_accelerators_of_a_recorded_box_are_all_found_and_usable(
    name: str, kinds: list[AcceleratorKind]
) -> None:
    found = detect_recorded(name).accelerators
    assert [item.kind for item in found] == kinds
    assert all(item.usable for item in found)


def test_nvidia_gpu_keeps_its_name_memory_and_driver() -> None:
    (gpu,) = detect_recorded("x86-server-t4").accelerators
    assert (gpu.name, gpu.memory_mb, gpu.driver) == ("Tesla T4", 16106, "550.144.03")


def test_container_limits_count_and_the_fraction_of_a_core_is_kept() -> None:
    spec = detect_recorded("container-half-core")
    assert (spec.cores, spec.cores_machine) == (0.5, 16)
    assert (spec.memory_mb, spec.memory_machine_mb) == (536, 135053)
    assert spec.container == "docker"


def test_number_near_two_to_the_63_is_no_memory_limit() -> None:
    spec = detect_recorded("this-machine")
    assert spec.memory_mb == spec.memory_machine_mb > 0


def test_tightest_level_of_nested_groups_counts() -> None:
    cgroup = CgroupFacts(2, ("max 100000", "150000 100000", "max 100000"), ("max", "2000000000"))
    spec = detect_platform(replace(read_probe("x86-server-t4"), cgroup=cgroup))
    assert (spec.cores, spec.memory_mb) == (1.5, 2000)


def test_cpuset_with_gaps_limits_the_cores() -> None:
    cgroup = CgroupFacts(2, ("max 100000",), (), "0-1,3")
    assert detect_platform(replace(read_probe("x86-server-t4"), cgroup=cgroup)).cores == 3.0


def test_affinity_mask_limits_the_cores() -> None:
    assert detect_platform(replace(read_probe("rpi4"), affinity=2)).cores == 2.0


def test_flag_that_one_core_lacks_does_not_count() -> None:
    probe = read_probe("rpi5")
    cpuinfo = probe.cpuinfo.replace(" asimddp", "", 1)
    assert "asimddp" not in detect_platform(replace(probe, cpuinfo=cpuinfo)).cpu_flags


def test_big_and_little_cores_are_both_named() -> None:
    probe = read_probe("rpi5")
    cpuinfo = probe.cpuinfo.replace("CPU part\t: 0xd0b", "CPU part\t: 0xd05", 2)
    spec = detect_platform(replace(probe, cpuinfo=cpuinfo))
    assert spec.cpu_model == "Cortex-A55 + Cortex-A76"


def test_thirty_two_bit_python_on_a_64_bit_kernel_is_armv7() -> None:
    spec = detect_recorded("rpi4-32bit-userland")
    assert spec.arch is Arch.ARMV7
    assert spec.extra["kernel_machine"] == "aarch64"


def test_python_under_rosetta_is_x86_64_and_says_so() -> None:
    probe = read_probe("mac-mini-m2")
    sysctl = {**probe.sysctl, "sysctl.proc_translated": "1"}
    spec = detect_platform(replace(probe, machine="x86_64", sysctl=sysctl))
    assert (spec.arch, spec.extra["rosetta"], spec.accelerators) == (Arch.X86_64, True, ())


def test_mac_in_a_virtual_machine_has_no_neural_engine() -> None:
    probe = read_probe("mac-mini-m2")
    spec = detect_platform(replace(probe, sysctl={**probe.sysctl, "kern.hv_vmm_present": "1"}))
    assert not spec.has_accelerator(AcceleratorKind.APPLE_ANE)
    assert spec.has_accelerator(AcceleratorKind.APPLE_GPU)


def test_gpu_without_driver_is_reported_as_unusable_with_the_reason() -> None:
    nvidia = NvidiaFacts(error="libnvidia-ml.so.1 is not installed")
    spec = detect_platform(replace(read_probe("x86-server-t4"), nvidia=nvidia))
    (gpu,) = spec.accelerators
    assert not gpu.usable
    assert gpu.detail == "libnvidia-ml.so.1 is not installed"
    assert spec.hardware_class == "x86_64-avx512_vnni"


@pytest.mark.parametrize("name", ["jetson-orin-nano", "nuc-core-ultra"])
def test_device_without_permission_is_unusable(name: str) -> None:
    found = detect_platform(close_nodes(read_probe(name))).accelerators
    assert found
    assert all("no permission" in item.detail and not item.usable for item in found)


@pytest.mark.parametrize("name", ["jetson-orin-nano", "nuc-core-ultra"])
def test_device_that_a_container_does_not_pass_is_unusable(name: str) -> None:
    found = detect_platform(replace(read_probe(name), device_nodes=())).accelerators
    assert found
    assert all("container does not pass it" in item.detail for item in found)


def test_npu_without_its_user_space_driver_is_unusable() -> None:
    spec = detect_platform(replace(read_probe("nuc-core-ultra"), libraries=()))
    assert spec.hardware_class == "x86_64-avx_vnni+intel_gpu"


def test_coral_without_its_library_is_unusable() -> None:
    spec = detect_platform(replace(read_probe("rpi5"), libraries=()))
    (coral,) = spec.accelerators
    assert "libedgetpu" in coral.detail
    assert spec.hardware_class == "rpi5"


def test_coral_card_needs_its_node() -> None:
    probe = replace(
        read_probe("rpi5"), usb_ids=(), pci=(PciDevice("0x1ac1", "0x089a", "0x088000"),)
    )
    assert not detect_platform(probe).accelerators[0].usable
    with_node = replace(probe, device_nodes=(DeviceNode("/dev/apex_0", accessible=True),))
    assert detect_platform(with_node).accelerators[0].usable


def test_ascend_card_is_named_by_its_pci_id() -> None:
    nodes = ("/dev/davinci0", "/dev/davinci_manager")
    probe = replace(
        read_probe("container-half-core"),
        pci=(PciDevice("0x19e5", "0xd500", "0x120000", "devdrv_device_driver"),),
        device_nodes=tuple(DeviceNode(path, accessible=True) for path in nodes),
    )
    (npu,) = detect_platform(probe).accelerators
    assert (npu.kind, npu.name) == (AcceleratorKind.ASCEND_NPU, "Huawei Ascend 310P")
    assert npu.usable


@pytest.mark.parametrize(
    ("hints", "expected"),
    [
        (ContainerHints(), None),
        (ContainerHints(dockerenv=True), "docker"),
        (ContainerHints(init_cgroup="5:memory:/docker/0123"), "docker"),
        (ContainerHints(containerenv=True), "podman"),
        (ContainerHints(kubernetes=True, dockerenv=True), "kubernetes"),
        (ContainerHints(init_cgroup="0::/kubepods/pod1"), "kubernetes"),
        (ContainerHints(env="lxc"), "lxc"),
        (ContainerHints(env="systemd-nspawn"), "systemd-nspawn"),
    ],
)
def test_container_is_named_by_the_marks_it_leaves(
    hints: ContainerHints, expected: str | None
) -> None:
    assert detect_platform(replace(read_probe("rpi4"), container=hints)).container == expected


def test_placeholder_of_a_board_vendor_is_not_a_board_name() -> None:
    dmi = {"product_name": "To Be Filled By O.E.M.", "board_name": "B650M"}
    assert detect_platform(replace(read_probe("nuc-core-ultra"), dmi=dmi)).board == "B650M"


def test_empty_probe_gives_a_spec_and_no_exception() -> None:
    spec = detect_platform(ProbeData())
    assert (spec.os, spec.arch, spec.cores) == (Os.OTHER, Arch.OTHER, 1.0)
    assert (spec.cpu_model, spec.memory_mb, spec.hardware_class) == ("unknown", 0, "other")


def test_runtime_findings_are_kept() -> None:
    findings = (RuntimeFinding("ort", RuntimeStatus.PROVEN, "1.32.0"),)
    assert detect_platform(read_probe("rpi4"), findings).runtimes == findings
