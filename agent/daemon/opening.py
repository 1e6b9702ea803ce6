"""Opening the ledger at start: claimed, recovered where it is damaged, migrated.

Everything that may need room on the disk is tried again once after the reserve
was freed, so that an agent starts also on a disk that is full.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, select

from agent.clock import Clock
from agent.daemon.storage import Storage
from agent.errors import StorageFullError, StoreError
from agent.sdnotify import notify
from agent.store.database import free_room, migrate, shrink, transaction
from agent.store.ledger import Ledger
from agent.store.outbox import save_counter
from agent.store.recovery import Recovery, claim_ledger, prepare_ledger
from agent.store.transitions import JOBS

log = logging.getLogger(__name__)

_DAY_MS = 86_400_000
_REPORT_AT_ONCE = 10_000


@dataclass(frozen=True)
class Opened:
    """A ledger that may be used."""

    claim: int
    """File descriptor that keeps a second agent out; held for the life of the process."""
    recovery: Recovery | None
    """What was saved, where the file was damaged."""


def open_ledger(
    path: Path, engine: Engine, storage: Storage, begin: Callable[[Connection], None]
) -> Opened:
    """Bring the ledger to a state in which work can begin, and begin it.

    Args:
        path: its file.
        engine: the writer's engine on it.
        storage: the disk and its reserve.
        begin: the first transaction, such as counting this boot.

    Raises:
        StorageFullError: the disk is full, and there is no reserve to free.
        StoreDamagedError: the file is of a newer Edgeward.
        StoreError: another agent has it, or SQLite failed otherwise.
    """
    claim = claim_ledger(path)
    recovery: Recovery | None = None

    def attempt() -> None:
        nonlocal recovery
        found = prepare_ledger(path, is_low=storage.is_low(), on_progress=_extend_start)
        recovery = found or recovery
        migrate(engine)
        with transaction(engine) as tx:
            begin(tx)

    try:
        attempt()
    except StorageFullError:
        if not free_room(engine, storage.release):
            raise
        log.warning("the disk is full: the reserve is freed")
        attempt()
    _shrink(engine, storage)
    storage.maintain()
    return Opened(claim, recovery)


def _shrink(engine: Engine, storage: Storage) -> None:
    """Make the file smaller where most of it is free; the start goes on without."""
    try:
        freed = shrink(engine, storage.describe()["free_bytes"])
    except StoreError as exc:
        log.warning("the ledger's free pages stay in its file: %s", exc)
        return
    if freed:
        log.info("the ledger gave %d bytes back to the disk", freed)


def _extend_start() -> None:
    """Tell systemd that a long recovery is work, not a hang."""
    notify("EXTEND_TIMEOUT_USEC=120000000")


def report_recovery(tx: Connection, ledger: Ledger, clock: Clock, recovery: Recovery) -> None:
    """Begin to report anew after a recovery: numbers from 1, open jobs and recent ends again.

    The new ledger has an identity of its own, by which consoles begin anew too. Reports may have
    been on the pages that are gone.
    """
    save_counter(tx, "seq", 0)
    recent_ms = clock.wall_ms() - _DAY_MS
    query = (
        select(JOBS.c.job_id)
        .where(JOBS.c.ended_ms.is_(None) | (JOBS.c.ended_ms > recent_ms))
        .limit(_REPORT_AT_ONCE)
    )
    ledger.report_again(tx, list(tx.execute(query).scalars()), with_results=True)
    body: dict[str, Any] = {
        "code": "ledger_recovered",
        "message": "the ledger was damaged; what could be read was saved",
        **recovery.to_json(),
    }
    ledger.add_event(tx, "ledger_recovered", body)
