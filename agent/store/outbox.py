"""The outbox: records that wait for the console, in the same file as the ledger.

A record is written in the transaction of the change it reports. It gets its
number on the wire (`seq`) in the transaction before its first publish, so
numbers have no gaps, and what was once on the wire is never changed under its
number: a state or a progress is coalesced only while it has none. A record
leaves when the other side has acknowledged it, or with a gap record that names
its number (`agent.store.bounds`).

All functions run inside the caller's transaction.
"""

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    TableClause,
    bindparam,
    delete,
    func,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects.sqlite import Insert
from sqlalchemy.dialects.sqlite import insert as upsert

from agent.commands import encode
from agent.store.statements import Bulk, Statement
from agent.store.tables import Counter, OutboxRecord

_OUTBOX = OutboxRecord.__table__  # type: ignore[attr-defined]
_COUNTERS = Counter.__table__  # type: ignore[attr-defined]


# No state before the end is held longer (`outbox.coalesce_s` is some seconds).
_HOLD_MAX_MS = 60_000
# Each of the five classes has an eighth of the room for sure; the first ones have the rest.
_SHARES = 8


class Rank(IntEnum):
    """Flush order. Classes of docs/protocol.md: END and EARLY are P0, then P1, P2, P3."""

    END = 0
    """States that end a job, `reported`, audit."""
    RESULT = 1
    EARLY = 2
    """States before the end: may wait a moment to be replaced by a newer one."""
    EVENT = 3
    TELEMETRY = 4


class Record(NamedTuple):
    """One outbox record as the reporter sends it."""

    id: int
    seq: int | None
    rank: int
    topic: str
    type: str
    retained: bool
    ttl_s: int | None
    body: str
    created_ms: int


_INSERTED = ("rank", "kind", "job_id", "topic", "type", "retained", "ttl_s", "body", "created_ms")
_REPLACED = ("rank", "ttl_s", "body", "created_ms")
_COLUMNS = [_OUTBOX.c[name] for name in Record._fields]


def _insert_all(rows: TableClause, values: Mapping[str, ColumnElement[Any]]) -> Insert:
    # SQLite takes ON CONFLICT after a SELECT for a join condition unless there is a WHERE.
    source = select(*values.values()).select_from(rows).where(true())
    return upsert(_OUTBOX).from_select(list(values), source)


def _insert_or_replace(rows: TableClause, values: Mapping[str, ColumnElement[Any]]) -> Insert:
    statement = _insert_all(rows, values)
    return statement.on_conflict_do_update(
        index_elements=["job_id"],
        index_where=text("kind = 'state' AND seq IS NULL"),
        set_={name: statement.excluded[name] for name in _REPLACED},
    )


def _insert_or_update(rows: TableClause, values: Mapping[str, ColumnElement[Any]]) -> Insert:
    statement = _insert_all(rows, values)
    return statement.on_conflict_do_update(
        index_elements=["job_id"],
        index_where=text("kind = 'progress' AND seq IS NULL"),
        set_={name: statement.excluded[name] for name in _REPLACED},
    )


_UPSERT_STATE = Bulk(_INSERTED, _insert_or_replace)
_UPSERT_PROGRESS = Bulk(_INSERTED, _insert_or_update)
_INSERT = Bulk(_INSERTED, _insert_all)
_NUMBER = Bulk(
    ("id", "seq"),
    lambda rows, values: (
        update(_OUTBOX).where(_OUTBOX.c.id == values["id"]).values(seq=values["seq"])
    ),
)
_DELETE = Statement(
    delete(_OUTBOX).where(
        _OUTBOX.c.seq.in_(select(func.json_each(bindparam("b_seqs")).table_valued("value")))
    )
)
_DELETE_UPTO = Statement(delete(_OUTBOX).where(_OUTBOX.c.seq <= bindparam("b_upto", type_=Integer)))
_unsent = select(*_COLUMNS).where(_OUTBOX.c.seq.is_(None))
_SELECT_CLASS = Statement(
    _unsent.where(_OUTBOX.c.rank == bindparam("b_rank", type_=Integer))
    .order_by(_OUTBOX.c.id)
    .limit(bindparam("b_limit", type_=Integer))
)
_SELECT_EARLY = Statement(
    _unsent.where(
        _OUTBOX.c.rank == Rank.EARLY.value,
        # A clock that was set back must not hold a state until it has caught up.
        (_OUTBOX.c.created_ms <= bindparam("b_before"))
        | (_OUTBOX.c.created_ms > bindparam("b_before") + _HOLD_MAX_MS),
    )
    .order_by(_OUTBOX.c.id)
    .limit(bindparam("b_limit", type_=Integer))
)
_SELECT_SENT = Statement(
    select(*_COLUMNS)
    .where(_OUTBOX.c.seq > bindparam("b_after"), _OUTBOX.c.seq <= bindparam("b_upto"))
    .order_by(_OUTBOX.c.seq)
    .limit(bindparam("b_limit", type_=Integer))
)
_READ_COUNTER = Statement(select(_COUNTERS.c.value).where(_COUNTERS.c.name == bindparam("b_name")))


def _replace_counter(rows: TableClause, values: Mapping[str, ColumnElement[Any]]) -> Insert:
    source = select(*values.values()).select_from(rows).where(true())
    statement = upsert(_COUNTERS).from_select(list(values), source)
    return statement.on_conflict_do_update(
        index_elements=["name"], set_={"value": statement.excluded["value"]}
    )


_SAVE_COUNTER = Bulk(("name", "value"), _replace_counter)
_HAS_UNSENT = Statement(select(_OUTBOX.c.id).where(_OUTBOX.c.seq.is_(None)).limit(1))


def add_states(tx: Connection, rows: Sequence[dict[str, object]]) -> None:
    """Write job states, each replacing the job's state that is not on the wire yet."""
    _UPSERT_STATE.run(tx, rows)


def add_progress(tx: Connection, rows: Sequence[dict[str, object]]) -> None:
    """Write progress, each replacing the job's progress that is not on the wire yet."""
    _UPSERT_PROGRESS.run(tx, rows)


def add_records(tx: Connection, rows: Sequence[dict[str, object]]) -> None:
    """Write results, events and other records."""
    _INSERT.run(tx, rows)


def take_unsent(tx: Connection, limit: int, early_before_ms: int) -> list[Record]:
    """Number the next records to publish and return them in the order to send.

    Each class that has something to send gets an eighth of the room at least,
    so that none is starved by those before it. States before the end wait
    until `early_before_ms`.

    Args:
        tx: the caller's transaction.
        limit: how many at most.
        early_before_ms: states before the end created later than this stay.
    """
    share = max(1, limit // _SHARES)
    classes: list[list[Record]] = []
    taken = 0
    for rank in Rank:
        wanted = max(share, limit - taken)
        if rank is Rank.EARLY:
            found = _read(tx, _SELECT_EARLY, b_before=early_before_ms, b_limit=wanted)
        else:
            found = _read(tx, _SELECT_CLASS, b_rank=rank.value, b_limit=wanted)
        classes.append(found)
        taken += len(found)
    chosen = [row for rows in _trim(classes, limit, share) for row in rows]
    if not chosen:
        return []
    first_seq = read_counter(tx, "seq") + 1
    numbered = [Record(row[0], seq, *row[2:]) for seq, row in enumerate(chosen, first_seq)]
    _NUMBER.run(tx, [{"id": row.id, "seq": row.seq} for row in numbered])
    save_counter(tx, "seq", first_seq + len(numbered) - 1)
    return numbered


def _trim(classes: list[list[Record]], limit: int, share: int) -> list[list[Record]]:
    """Cut the classes to `limit` records in all, none of them below its share."""
    surplus = sum(map(len, classes)) - limit
    for rows in classes:
        cut = max(0, min(surplus, len(rows) - share))
        if cut:
            del rows[len(rows) - cut :]
            surplus -= cut
    # With less room than classes there is not a share for each: the first ones go first.
    for rows in reversed(classes):
        if surplus <= 0:
            break
        cut = min(surplus, len(rows))
        del rows[len(rows) - cut :]
        surplus -= cut
    return classes


def _read(tx: Connection, query: Statement, **params: int) -> list[Record]:
    return [Record._make(row) for row in query.fetch(tx, **params)]


def find_sent(tx: Connection, after: int, upto: int, limit: int) -> list[Record]:
    """Return records on the wire but not acknowledged, with `after` < seq ≤ `upto`."""
    return _read(tx, _SELECT_SENT, b_after=after, b_upto=upto, b_limit=limit)


def delete_acknowledged(tx: Connection, seqs: Iterable[int]) -> None:
    """Remove records that the other side has."""
    chosen = list(seqs)
    if chosen:
        _DELETE.run(tx, b_seqs=encode(chosen))


def delete_upto(tx: Connection, seq: int) -> None:
    """Remove every record that is numbered up to `seq`: the console has them."""
    _DELETE_UPTO.run(tx, b_upto=seq)


def measure_classes(tx: Connection) -> dict[Rank, tuple[int, int]]:
    """Return how many records each class holds, and the bytes of their bodies."""
    query = select(
        _OUTBOX.c.rank, func.count(), func.coalesce(func.sum(func.length(_OUTBOX.c.body)), 0)
    ).group_by(_OUTBOX.c.rank)
    return {Rank(rank): (count, size) for rank, count, size in tx.execute(query)}


def find_oldest(tx: Connection) -> int | None:
    """Return the lowest number that is still here, or None where no record has one."""
    query = select(func.min(_OUTBOX.c.seq)).where(_OUTBOX.c.seq.is_not(None))
    found = tx.execute(query).scalar()
    return None if found is None else int(found)


def count_records(tx: Connection) -> int:
    """Return how many records wait or are unacknowledged."""
    return int(tx.execute(select(func.count()).select_from(_OUTBOX)).scalar_one())


def read_counter(tx: Connection, name: str) -> int:
    """Return a counter, 0 where it was never saved."""
    found = _READ_COUNTER.fetch(tx, b_name=name)
    return int(found[0][0]) if found else 0


def save_counter(tx: Connection, name: str, value: int) -> None:
    """Save a counter."""
    _SAVE_COUNTER.run(tx, [{"name": name, "value": value}])


def has_unsent(tx: Connection) -> bool:
    """Say whether a record waits for its first publish."""
    return bool(_HAS_UNSENT.fetch(tx))
