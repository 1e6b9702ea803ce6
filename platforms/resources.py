"""Live readings for heartbeats: load, memory, disk, temperature, power mode.

Owns what changes from minute to minute; what the box *is* belongs to `probe`.
Reads some small files of proc and sysfs and starts no process, so that a heartbeat
may ask every second. A reading that the box does not offer is None.
"""

import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from platforms.cgroup import UNIFIED, find_group_dirs, read_text
from platforms.probe import ThermalZone, probe_power_mode, probe_thermal

_ROOT = Path("/")
_PLAUSIBLE_CELSIUS = (-40.0, 150.0)
"""Zones without a sensor behind them answer −273 or 200."""


@dataclass(frozen=True)
class Resources:
    """What the box spends and has left. MB are 10⁶ bytes."""

    cpu_percent: float
    """0–100 of the whole machine, since the last call in this thread; 0 on the first."""
    memory_used_mb: int
    memory_available_mb: int
    disk_free_mb: int | None
    temperature_c: float | None
    """Of the hottest zone."""
    power_mode: str | None


@dataclass(frozen=True)
class _Memory:
    used: int
    available: int


def read_resources(path: Path, root: Path = _ROOT) -> Resources:
    """Read the box now; `path` is the store's folder, whose disk is reported.

    `root` points at a recorded tree for the files of proc and sysfs.
    """
    memory = _read_memory(root)
    return Resources(
        cpu_percent=psutil.cpu_percent(interval=None),
        memory_used_mb=memory.used // 10**6,
        memory_available_mb=memory.available // 10**6,
        disk_free_mb=_read_disk_free_mb(path),
        temperature_c=find_hottest(probe_thermal(root)),
        power_mode=probe_power_mode(root),
    )


def find_hottest(zones: tuple[ThermalZone, ...]) -> float | None:
    """Return the highest plausible temperature in °C."""
    low, high = _PLAUSIBLE_CELSIUS
    return max((zone.celsius for zone in zones if low < zone.celsius < high), default=None)


def read_is_on_mains() -> bool | None:
    """Say whether the box runs on mains power; None where it has no battery to tell by."""
    find = getattr(psutil, "sensors_battery", None)
    battery = find() if find is not None else None
    return None if battery is None else battery.power_plugged


def read_energy_uj(root: Path = _ROOT) -> int | None:
    """Return a counter of the energy that the processors have taken, µJ; None where there is none.

    Of all packages; it begins anew after some minutes up to hours.
    Source: Linux, Documentation/power/powercap/powercap.rst.
    """
    zones = sorted((root / "sys/class/powercap").glob("intel-rapl:?"))
    readings = [read_text(zone / "energy_uj") for zone in zones]
    numbers = [int(text) for text in readings if text is not None and text.strip().isdigit()]
    return sum(numbers) if numbers and len(numbers) == len(zones) else None


def _read_memory(root: Path) -> _Memory:
    """Return the memory of whatever is nearest to its limit: the machine, or a cgroup level."""
    machine = psutil.virtual_memory()
    levels = [_Memory(machine.total - machine.available, machine.available)]
    for limit_file, usage_file, stat_file, cache_key in _find_memory_files(root):
        limit, usage = read_text(limit_file) or "", read_text(usage_file) or ""
        if limit.isdigit() and usage.isdigit() and int(limit) < machine.total:
            # The kernel drops clean file pages before it kills: they count as available.
            used = max(0, int(usage) - _read_stat(stat_file, cache_key))
            levels.append(_Memory(used, max(0, int(limit) - used)))
    return min(levels, key=lambda level: level.available)


@cache
def _find_memory_files(root: Path) -> tuple[tuple[Path, Path, Path, str], ...]:
    """Return limit, usage and statistics of every level, and the name of its file cache."""
    unified = find_group_dirs(UNIFIED, root)
    if unified:
        names = ("memory.max", "memory.current", "memory.stat", "inactive_file")
        folders = unified
    else:
        names = (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "memory.stat",
            "total_inactive_file",
        )
        folders = find_group_dirs("memory", root)
    limit, usage, stat, key = names
    return tuple((folder / limit, folder / usage, folder / stat, key) for folder in folders)


def _read_stat(path: Path, key: str) -> int:
    for line in (read_text(path) or "").splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return 0


def _read_disk_free_mb(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free // 10**6
    except OSError:
        return None
