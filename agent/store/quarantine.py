"""Model versions that crash their workers: counted, and after three no longer served.

The crash-loop breaker. A version that crashed workers `LIMIT` times within
`PERIOD_MS` is quarantined until a person releases it: a worker that only
crashes helps nobody, and the other models of the box want to run.

All functions run inside the caller's transaction.
"""

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects.sqlite import insert as upsert

from agent.store.tables import Crash, Quarantine

_CRASHES = Crash.__table__  # type: ignore[attr-defined]
_QUARANTINE = Quarantine.__table__  # type: ignore[attr-defined]

LIMIT = 3
PERIOD_MS = 600_000
_DAY_MS = 86_400_000

ModelVersion = tuple[str, str]


def record_crash(
    tx: Connection, task_id: str, model: str, version: str, signal: str, at_ms: int
) -> bool:
    """Count the crash of a task; say whether it has put the version into quarantine just now."""
    row = {"task_id": task_id, "model": model, "version": version, "signal": signal}
    tx.execute(upsert(_CRASHES).values(**row, at_ms=at_ms).on_conflict_do_nothing())
    # Also those "after" this one: the clock was set back, and nobody knows how long ago they were.
    old = (_CRASHES.c.at_ms < at_ms - _DAY_MS) | (_CRASHES.c.at_ms > at_ms)
    tx.execute(delete(_CRASHES).where(old))
    of_version = (_CRASHES.c.model == model) & (_CRASHES.c.version == version)
    recent = _CRASHES.c.at_ms > at_ms - PERIOD_MS
    query = select(func.count()).select_from(_CRASHES).where(of_version, recent)
    if int(tx.execute(query).scalar_one()) < LIMIT or (model, version) in read_quarantine(tx):
        return False
    reason = f"crashed its worker {LIMIT} times within {PERIOD_MS // 60_000} min, last by {signal}"
    entry = upsert(_QUARANTINE).values(model=model, version=version, reason=reason, since_ms=at_ms)
    tx.execute(entry.on_conflict_do_nothing())
    return True


def read_quarantine(tx: Connection) -> dict[ModelVersion, str]:
    """Return the versions in quarantine, with why."""
    query = select(_QUARANTINE.c.model, _QUARANTINE.c.version, _QUARANTINE.c.reason)
    return {(model, version): reason for model, version, reason in tx.execute(query)}


def release(tx: Connection, model: str, version: str) -> bool:
    """Serve a version again and forget its crashes; say whether it was in quarantine."""
    found = (model, version) in read_quarantine(tx)
    for table in (_QUARANTINE, _CRASHES):
        tx.execute(delete(table).where(table.c.model == model, table.c.version == version))
    return found
