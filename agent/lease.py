"""Leases: somebody on the box asks that nothing disturbs just now, and until when.

An operation in a clinic, a shift's end, a measurement: a program or a person takes a lease, and no
version is changed and no work with a maintenance window begins until it is given back or over. A
lease that nobody gives back ends by itself, where a lock file would hold updates back for ever.

Owns the leases' files, one each, so that they are taken and read without the agent. Invariants: a
lease never lasts longer than it was taken for, whatever the wall clock does and however often the
machine restarts.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.clock import Clock
from agent.errors import LeaseError
from agent.fileio import make_folders, write_atomic
from agent.manifest import NAME_PATTERN

LONGEST_S = 7 * 86_400.0
_FILE_MAX_BYTES = 4096


class Lease(BaseModel):
    """One lease."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    why: str = Field(default="", max_length=256)
    duration_s: float = Field(gt=0, le=LONGEST_S)
    until_ms: int
    """Wall time of its end; only this boot's clock is asked while the machine stays up."""
    boot_id: str
    until_boot_ms: int

    def compute_left_s(self, clock: Clock) -> float:
        """Return for how many seconds it still holds; 0 where it is over."""
        if self.boot_id == clock.boot_id():
            left_ms: float = self.until_boot_ms - clock.boot_ms()
        else:
            # A clock that was set back at the start must not make it longer than it was.
            left_ms = min(self.until_ms - clock.wall_ms(), self.duration_s * 1000 - clock.boot_ms())
        return max(0.0, left_ms / 1000)


def take_lease(folder: Path, clock: Clock, name: str, duration_s: float, why: str = "") -> Lease:
    """Take a lease, or take it anew under the same name; durable.

    Args:
        folder: of all leases.
        clock: wall and boot time.
        name: who takes it.
        duration_s: for how long, at most `LONGEST_S`.
        why: for people.

    Raises:
        LeaseError: a bad name or duration, or it cannot be written.
    """
    span_ms = int(duration_s * 1000)
    try:
        lease = Lease(
            name=name,
            why=why,
            duration_s=duration_s,
            until_ms=clock.wall_ms() + span_ms,
            boot_id=clock.boot_id(),
            until_boot_ms=clock.boot_ms() + span_ms,
        )
    except ValidationError as exc:
        first = exc.errors()[0]
        msg = f"lease: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise LeaseError(msg) from exc
    try:
        make_folders(folder)
        write_atomic(_locate(folder, name), lease.model_dump_json())
    except OSError as exc:
        msg = f"the lease {name} cannot be written below {folder}: {exc.strerror}"
        raise LeaseError(msg) from exc
    return lease


def release_lease(folder: Path, name: str) -> bool:
    """Give a lease back; say whether there was one.

    Raises:
        LeaseError: its file cannot be removed.
    """
    try:
        _locate(folder, name).unlink()
    except FileNotFoundError:
        return False
    except OSError as exc:
        msg = f"the lease {name} cannot be removed: {exc.strerror}"
        raise LeaseError(msg) from exc
    return True


def list_leases(folder: Path, clock: Clock) -> list[Lease]:
    """Return the leases that hold now, by name. One that cannot be read holds nothing."""
    if not folder.is_dir():
        return []
    found = (_read(path) for path in sorted(folder.glob("*.json")))
    return [lease for lease in found if lease is not None and lease.compute_left_s(clock) > 0]


def _locate(folder: Path, name: str) -> Path:
    return folder / f"{Path(name).name}.json"


def _read(path: Path) -> Lease | None:
    try:
        if path.stat().st_size > _FILE_MAX_BYTES:
            return None
        return Lease.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
