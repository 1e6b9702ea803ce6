"""Preflight on recorded boxes: each check in each state that it can have."""

from dataclasses import replace
from typing import Any

import pytest

from platforms import preflight
from platforms.detect import detect_platform
from platforms.preflight import Check, CheckStatus, check_platform
from platforms.probe import ClockFacts, ProbeData, StoreFacts
from platforms.spec import PlatformSpec, RuntimeFinding, RuntimeStatus
from tests.unit.recorded import NAMES, detect_recorded, read_probe

PROVEN = (RuntimeFinding("ort", RuntimeStatus.PROVEN, "1.32.0"),)
GOOD_STORE = StoreFacts(writable=True, fsync_ms=0.8)
ORDER = [
    "os",
    "python",
    "container",
    "cpu",
    "memory",
    "accelerators",
    "runtimes",
    "disk-space",
    "disk-kind",
    "store",
    "clock",
]


def with_disk(probe: ProbeData, **changes: Any) -> ProbeData:
    return replace(probe, disk=replace(probe.disk, **changes))


def all_checks(name: str) -> dict[str, Check]:
    probe = read_probe(name)
    spec = detect_platform(probe, PROVEN)
    return {check.name: check for check in check_platform(spec, probe, GOOD_STORE)}


@pytest.mark.parametrize("name", NAMES)
def test_checks_come_in_reading_order_for_every_box(name: str) -> None:
    assert list(all_checks(name)) == ORDER


@pytest.mark.parametrize("name", ["x86-server-t4", "rpi4", "rpi5", "jetson-orin-nano"])
def test_healthy_box_passes_every_check(name: str) -> None:
    assert {check.status for check in all_checks(name).values()} == {CheckStatus.OK}


def test_mac_passes_although_it_has_no_time_service_to_ask() -> None:
    assert all_checks("mac-mini-m2")["clock"].status is CheckStatus.OK


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_not_ok_names_a_remedy(name: str) -> None:
    probe = read_probe(name)
    spec = detect_platform(replace(probe, device_nodes=(), libraries=()))
    checks = check_platform(spec, probe, StoreFacts(writable=False, error="Permission denied"))
    assert any(check.status is CheckStatus.FAIL for check in checks)
    assert all(check.remedy for check in checks if check.status is not CheckStatus.OK)


def test_unknown_system_fails() -> None:
    assert preflight.check_os(detect_platform(ProbeData())).status is CheckStatus.FAIL


def test_thirty_two_bit_system_on_a_64_bit_chip_is_warned_of() -> None:
    check = all_checks("rpi4-32bit-userland")["os"]
    assert check.status is CheckStatus.WARN
    assert "64-bit system" in check.remedy


@pytest.mark.parametrize(("name", "value"), [("rosetta", True), ("libc", "musl")])
def test_python_that_finds_no_wheels_is_warned_of(name: str, value: object) -> None:
    spec = replace(detect_recorded("nuc-core-ultra"), extra={name: value})
    assert preflight.check_os(spec).status is CheckStatus.WARN


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("3.10.9", CheckStatus.FAIL),
        ("3.11.0", CheckStatus.OK),
        ("3.14.2", CheckStatus.OK),
        ("3.15.0a1", CheckStatus.WARN),
        ("", CheckStatus.FAIL),
    ],
)
def test_python_is_judged_by_its_version(version: str, status: CheckStatus) -> None:
    spec = replace(detect_recorded("rpi4"), python_version=version)
    assert preflight.check_python(spec).status is status


def test_container_with_less_than_a_core_is_warned_of() -> None:
    check = all_checks("container-half-core")["container"]
    assert check.status is CheckStatus.WARN
    assert check.summary == "in a container (docker); 0.5 of 16 cores"


def test_x86_without_avx2_is_warned_of() -> None:
    spec = replace(detect_recorded("nuc-core-ultra"), cpu_flags=("avx",))
    assert preflight.check_cpu(spec).status is CheckStatus.WARN


def test_armv7_without_neon_fails() -> None:
    spec = replace(detect_recorded("rpi4-32bit-userland"), cpu_flags=())
    assert preflight.check_cpu(spec).status is CheckStatus.FAIL


@pytest.mark.parametrize(
    ("memory_mb", "status"),
    [(299, CheckStatus.FAIL), (300, CheckStatus.WARN), (900, CheckStatus.OK)],
)
def test_memory_is_judged_by_what_the_cgroup_allows(memory_mb: int, status: CheckStatus) -> None:
    spec = replace(detect_recorded("rpi4"), memory_mb=memory_mb)
    check = preflight.check_memory(spec, read_probe("rpi4"))
    assert check.status is status
    assert "allowed of the machine's 3978" in check.summary


def test_accelerator_without_its_driver_is_warned_of_with_the_way_to_mend_it() -> None:
    probe = replace(read_probe("nuc-core-ultra"), libraries=())
    check = preflight.check_accelerators(detect_platform(probe))
    assert check.status is CheckStatus.WARN
    assert "intel-level-zero-npu" in check.remedy
    assert "driver i915" in check.summary


def test_box_without_accelerators_is_fine() -> None:
    assert preflight.check_accelerators(detect_recorded("rpi4")).status is CheckStatus.OK


def test_no_proven_runtime_fails() -> None:
    missing = (RuntimeFinding("ort", RuntimeStatus.MISSING),)
    spec = replace(detect_recorded("rpi4"), runtimes=missing)
    check = preflight.check_runtimes(spec)
    assert check.status is CheckStatus.FAIL
    assert "edgeward[onnx]" in check.remedy


def test_broken_runtime_beside_a_proven_one_is_warned_of() -> None:
    broken = RuntimeFinding("openvino", RuntimeStatus.BROKEN, detail="died with SIGILL")
    spec = replace(detect_recorded("rpi4"), runtimes=(*PROVEN, broken))
    check = preflight.check_runtimes(spec)
    assert check.status is CheckStatus.WARN
    assert "died with SIGILL" in check.remedy


def test_missing_runtime_beside_a_proven_one_is_fine() -> None:
    missing = RuntimeFinding("openvino", RuntimeStatus.MISSING)
    spec = replace(detect_recorded("rpi4"), runtimes=(*PROVEN, missing))
    assert preflight.check_runtimes(spec).status is CheckStatus.OK


@pytest.mark.parametrize(
    ("free_bytes", "status"),
    [
        (None, CheckStatus.WARN),
        (199_000_000, CheckStatus.FAIL),
        (200_000_000, CheckStatus.WARN),
        (2_000_000_000, CheckStatus.OK),
    ],
)
def test_disk_is_judged_by_what_is_free(free_bytes: int | None, status: CheckStatus) -> None:
    probe = with_disk(read_probe("rpi4"), free_bytes=free_bytes)
    assert preflight.check_disk_space(probe).status is status


@pytest.mark.parametrize(
    ("filesystem", "status"),
    [
        ("nfs4", CheckStatus.FAIL),
        ("cifs", CheckStatus.FAIL),
        ("tmpfs", CheckStatus.WARN),
        ("overlay", CheckStatus.WARN),
        ("ext4", CheckStatus.OK),
        (None, CheckStatus.OK),
    ],
)
def test_filesystem_must_keep_what_it_was_told(filesystem: str | None, status: CheckStatus) -> None:
    probe = with_disk(read_probe("rpi4"), filesystem=filesystem)
    assert preflight.check_disk_kind(probe).status is status


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"card_type": "SD"}, "SD card (mmcblk0)"),
        ({"card_type": "MMC"}, "eMMC (mmcblk0)"),
        ({"card_type": None, "device": "sda", "rotational": True}, "hard disk (sda)"),
        ({"card_type": None, "device": "nvme0n1"}, "solid-state disk (nvme0n1)"),
        ({"card_type": None, "device": "vda", "rotational": True}, "disk vda"),
        ({"card_type": None, "device": None}, "disk of unknown kind"),
    ],
)
def test_disk_is_described_by_what_is_known_of_it(changes: dict[str, Any], words: str) -> None:
    check = preflight.check_disk_kind(with_disk(read_probe("rpi4"), **changes))
    assert check.summary == f"{words}, ext4"


def test_store_that_takes_no_writes_fails_with_the_reason() -> None:
    store = StoreFacts(writable=False, error="Permission denied")
    check = preflight.check_store(read_probe("rpi4"), store)
    assert check.status is CheckStatus.FAIL
    assert check.summary == "/var/lib/edgeward: Permission denied"


def test_read_only_filesystem_is_to_be_mounted_read_write() -> None:
    probe = with_disk(read_probe("rpi4"), read_only=True)
    store = StoreFacts(writable=False, error="Read-only file system")
    assert "read-write" in preflight.check_store(probe, store).remedy


@pytest.mark.parametrize(
    ("fsync_ms", "status"),
    [(None, CheckStatus.WARN), (50.1, CheckStatus.WARN), (50.0, CheckStatus.OK)],
)
def test_store_is_judged_by_its_fsync(fsync_ms: float | None, status: CheckStatus) -> None:
    store = StoreFacts(writable=True, fsync_ms=fsync_ms)
    assert preflight.check_store(read_probe("rpi4"), store).status is status


@pytest.mark.parametrize(
    ("clock", "status"),
    [
        (ClockFacts(1_792_000_000.0, True, "timesyncd"), CheckStatus.OK),
        (ClockFacts(1_792_000_000.0, False, "adjtimex"), CheckStatus.WARN),
        (ClockFacts(1_792_000_000.0, None), CheckStatus.WARN),
        (ClockFacts(1_500_000_000.0, True, "timesyncd"), CheckStatus.FAIL),
        (ClockFacts(), CheckStatus.FAIL),
    ],
)
def test_clock_is_judged_by_its_keeper_and_its_year(clock: ClockFacts, status: CheckStatus) -> None:
    spec: PlatformSpec = detect_recorded("rpi4")
    assert preflight.check_clock(spec, replace(read_probe("rpi4"), clock=clock)).status is status
