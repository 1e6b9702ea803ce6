"""Live readings on this machine, and within a memory limit laid out in a tree."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from platforms.probe import ThermalZone
from platforms.resources import find_hottest, read_resources


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_this_machine_gives_plausible_readings(tmp_path: Path) -> None:
    found = read_resources(tmp_path)
    total_mb = psutil.virtual_memory().total // 10**6
    assert 0 <= found.cpu_percent <= 100
    assert 0 < found.memory_used_mb < total_mb
    assert 0 < found.memory_available_mb < total_mb
    assert found.disk_free_mb is not None
    assert found.disk_free_mb >= 0


def test_disk_of_a_missing_folder_is_unknown(tmp_path: Path) -> None:
    assert read_resources(tmp_path / "missing").disk_free_mb is None


def test_box_without_sensors_has_neither_temperature_nor_power_mode(tmp_path: Path) -> None:
    found = read_resources(tmp_path, tmp_path)
    assert (found.temperature_c, found.power_mode) == (None, None)


def test_memory_is_what_a_v2_limit_leaves_and_file_cache_counts_as_available(
    tmp_path: Path,
) -> None:
    group = tmp_path / "sys/fs/cgroup/edge.slice"
    write(tmp_path / "proc/self/cgroup", "0::/edge.slice\n")
    write(tmp_path / "sys/fs/cgroup/cgroup.controllers", "memory\n")
    write(group / "memory.max", "200000000\n")
    write(group / "memory.current", "150000000\n")
    write(group / "memory.stat", "anon 90000000\ninactive_file 60000000\n")
    found = read_resources(tmp_path, tmp_path)
    assert (found.memory_used_mb, found.memory_available_mb) == (90, 110)


def test_memory_is_what_a_v1_limit_leaves(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/memory"
    write(tmp_path / "proc/self/cgroup", "4:memory:/\n")
    write(group / "memory.limit_in_bytes", "100000000\n")
    write(group / "memory.usage_in_bytes", "90000000\n")
    write(group / "memory.stat", "inactive_file 1\ntotal_inactive_file 20000000\n")
    found = read_resources(tmp_path, tmp_path)
    assert (found.memory_used_mb, found.memory_available_mb) == (70, 30)


def test_limit_above_the_machines_memory_is_none(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/memory"
    write(tmp_path / "proc/self/cgroup", "4:memory:/\n")
    write(group / "memory.limit_in_bytes", "9223372036854771712\n")
    write(group / "memory.usage_in_bytes", "1\n")
    assert read_resources(tmp_path, tmp_path).memory_used_mb > 1


@pytest.mark.parametrize(
    ("celsius", "expected"),
    [((), None), ((40.5, 61.0, 12.0), 61.0), ((-273.0, 200.0), None), ((-273.0, -5.0), -5.0)],
)
def test_hottest_plausible_zone_is_the_temperature(
    celsius: tuple[float, ...], expected: float | None
) -> None:
    assert find_hottest(tuple(ThermalZone("zone", value) for value in celsius)) == expected


def test_importing_platforms_brings_no_numpy_and_no_runtime() -> None:
    modules = "platforms.probe, platforms.detect, platforms.resources, platforms.selection"
    code = (
        f"import sys, {modules}, platforms.preflight;"
        "print(sorted({'numpy', 'torch', 'onnxruntime', 'redis'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
