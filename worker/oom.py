"""The kernel's counters of processes that it killed for want of memory.

Owns their reading and the answer to "was one killed in between?". The counter of
the process's own control group is exact; the machine's counts every process, so
it is asked only where the group's cannot be compared (cgroup v1, or a service
manager that made a new group for the new process).
"""

from dataclasses import dataclass
from pathlib import Path

from platforms.cgroup import UNIFIED, find_group_dirs, read_text

UNKNOWN = -1
_VMSTAT = Path("/proc/vmstat")
_KEY = "oom_kill"


@dataclass(frozen=True, slots=True)
class OomCount:
    """Both counters at one moment; −1 is unknown."""

    kills: int = UNKNOWN
    """Of the whole machine, since it booted."""
    group: int = UNKNOWN
    """Which control group the next number is of."""
    group_kills: int = UNKNOWN

    def has_grown_until(self, later: "OomCount") -> bool:
        """Say whether a process was killed between this moment and a later one of this boot."""
        if self.group != UNKNOWN and self.group == later.group:
            return self.group_kills < later.group_kills
        return UNKNOWN < self.kills < later.kills


def find_events_file(root: Path = Path("/")) -> Path | None:
    """Return `memory.events` of this process's control group, where it has one."""
    for folder in find_group_dirs(UNIFIED, root)[:1]:
        if (folder / "memory.events").is_file():
            return folder / "memory.events"
    return None


def read_oom(events: Path | None, vmstat: Path = _VMSTAT) -> OomCount:
    """Read the counters; about 50 µs."""
    kills = _find_count(read_text(vmstat))
    if events is None:
        return OomCount(kills)
    try:
        group = events.parent.stat().st_ino
    except OSError:
        return OomCount(kills)
    group_kills = _find_count(read_text(events))
    return OomCount(kills, UNKNOWN if group_kills == UNKNOWN else group, group_kills)


def _find_count(text: str | None) -> int:
    for line in (text or "").splitlines():
        name, _, value = line.partition(" ")
        if name == _KEY and value.isdigit():
            return int(value)
    return UNKNOWN
