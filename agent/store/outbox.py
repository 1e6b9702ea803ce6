"""The outbox: records that wait for the console, in the same file as the ledger.

A record is written in the transaction of the change it reports. It gets its
number on the wire (`seq`) in the transaction before its first publish, so
numbers have no gaps, and what was once on the wire is never changed under its
number: a state is coalesced only while it has none. A record leaves when the
other side has acknowledged it.

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


_UPSERT_STATE = Bulk(_INSERTED, _insert_or_replace)
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
_unsent = select(*_COLUMNS).where(_OUTBOX.c.seq.is_(None))
_SELECT_URGENT = Statement(
    _unsent.where(_OUTBOX.c.rank != Rank.EARLY.value)
    .order_by(_OUTBOX.c.rank, _OUTBOX.c.id)
    .limit(bindparam("b_limit", type_=Integer))
)
_SELECT_EARLY = Statement(
    _unsent.where(_OUTBOX.c.rank == Rank.EARLY.value, _OUTBOX.c.created_ms <= bindparam("b_before"))
    .order_by(_OUTBOX.c.id)
    .limit(bindparam("b_limit", type_=Integer))
)
_SELECT_SENT = Statement(
    select(*_COLUMNS)
    .where(_OUTBOX.c.seq > bindparam("b_after"), _OUTBOX.c.seq <= bindparam("b_upto"))
    .order_by(_OUTBOX.c.seq)
    .limit(bindparam("b_limit", type_=Integer))
)
_HAS_UNSENT = Statement(select(_OUTBOX.c.id).where(_OUTBOX.c.seq.is_(None)).limit(1))


def add_states(tx: Connection, rows: Sequence[dict[str, object]]) -> None:
    """Write job states, each replacing the job's state that is not on the wire yet."""
    _UPSERT_STATE.run(tx, rows)


def add_records(tx: Connection, rows: Sequence[dict[str, object]]) -> None:
    """Write results, events and other records."""
    _INSERT.run(tx, rows)


def take_unsent(tx: Connection, limit: int, early_before_ms: int, first_seq: int) -> list[Record]:
    """Number the next records to publish and return them in the order to send.

    States before the end wait until `early_before_ms`, and then have an eighth
    of the room at least, so that a stream of results cannot starve them.

    Args:
        tx: the caller's transaction.
        limit: how many at most.
        early_before_ms: states before the end created later than this stay.
        first_seq: the number of the first one.
    """
    early = _read(tx, _SELECT_EARLY, b_before=early_before_ms, b_limit=limit)
    room = limit - min(len(early), max(1, limit // 8))
    urgent = _read(tx, _SELECT_URGENT, b_limit=room)
    chosen = urgent + early[: limit - len(urgent)]
    numbered = [Record(row[0], seq, *row[2:]) for seq, row in enumerate(chosen, first_seq)]
    if numbered:
        _NUMBER.run(tx, [{"id": row.id, "seq": row.seq} for row in numbered])
        save_counter(tx, "seq", first_seq + len(numbered) - 1)
    return numbered


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


def count_records(tx: Connection) -> int:
    """Return how many records wait or are unacknowledged."""
    return int(tx.execute(select(func.count()).select_from(_OUTBOX)).scalar_one())


def read_counter(tx: Connection, name: str) -> int:
    """Return a counter, 0 where it was never saved."""
    query = select(_COUNTERS.c.value).where(_COUNTERS.c.name == name)
    return int(tx.execute(query).scalar() or 0)


def save_counter(tx: Connection, name: str, value: int) -> None:
    """Save a counter."""
    statement = upsert(_COUNTERS).values(name=name, value=value)
    tx.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"value": value}))


def has_unsent(tx: Connection) -> bool:
    """Say whether a record waits for its first publish."""
    return bool(_HAS_UNSENT.fetch(tx))
