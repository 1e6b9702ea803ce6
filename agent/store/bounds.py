"""Bounds of the outbox: what gives way when a class has more than it may, and the gap records.

| class | bound | what gives way |
| --- | --- | --- |
| P0 states, reported | none | nothing |
| P1 results | bytes, age | the oldest; those of `keep_oldest` jobs stay and refuse new ones |
| P2 events | count | the oldest; gap records do not count and stay |
| P3 telemetry | count | of what is not published yet every second, three times; then the oldest |

Nothing is dropped in silence: what had no number on the wire yet is given one,
and a gap record names the numbers. So whoever counts what arrived and what the
gap records name has counted everything.

Gap records that nobody acknowledges are merged where the numbers they name
touch, so that they are never more than the records that are left between them.

All functions run inside the caller's transaction.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Connection, delete, func, select

from agent.faults import reach
from agent.store import outbox
from agent.store.outbox import Rank
from agent.store.records import KEPT_RESULT, build_event
from agent.store.tables import OutboxRecord
from agent.topics import Topics

_OUTBOX = OutboxRecord.__table__  # type: ignore[attr-defined]

_CLASS = {Rank.RESULT: "P1", Rank.EVENT: "P2", Rank.TELEMETRY: "P3"}
GAP = "gap"
# Room is made for more than one record, so that it is not made for each.
_LEAVE = 0.9
_AT_ONCE = 4096
_THINNINGS = 3
_THINNED = "telemetry_thinned"
_DAY_MS = 86_400_000
# More gap records than that are looked at, whether some can be one.
_GAPS = 256
_GAPS_LEFT = "gaps_left"
_IS_GAP = _OUTBOX.c.topic.like(f"%/{GAP}")


@dataclass(frozen=True)
class OutboxBounds:
    """How much of each class may wait for the console."""

    result_bytes: int
    result_days: int
    events: int
    telemetry: int


def enforce(
    tx: Connection,
    topics: Topics,
    bounds: OutboxBounds,
    now_ms: int,
    seen_ms: int | None = None,
) -> bool:
    """Drop what is over the bounds, with gap records; say whether results have no room.

    Looks at every record: for once in a while.

    Args:
        tx: the caller's transaction.
        topics: where gap records go.
        bounds: how much may wait.
        now_ms: wall time.
        seen_ms: the time that is surely not ahead, by which results grow old; else wall time.
    """
    aged_ms = (now_ms if seen_ms is None else seen_ms) - bounds.result_days * _DAY_MS
    _drop_old_results(tx, topics, aged_ms, now_ms)
    sizes = outbox.measure_classes(tx)
    results_full = False
    _, result_bytes = sizes.get(Rank.RESULT, (0, 0))
    if result_bytes > bounds.result_bytes:
        excess = result_bytes - int(bounds.result_bytes * _LEAVE)
        results_full = _drop_results(tx, topics, excess, now_ms) < excess
    # Gap records are events too; one that is dropped would be loss in silence.
    gaps = _count_gaps(tx)
    events = sizes.get(Rank.EVENT, (0, 0))[0] - gaps
    if events > bounds.events:
        rows = _oldest(tx, Rank.EVENT, events - int(bounds.events * _LEAVE))
        _drop(tx, topics, Rank.EVENT, rows, "outbox_full", now_ms)
    telemetry, _ = sizes.get(Rank.TELEMETRY, (0, 0))
    if telemetry > bounds.telemetry:
        _thin(tx, topics, telemetry, bounds.telemetry, now_ms)
    elif telemetry == 0:
        outbox.save_counter(tx, _THINNED, 0)
    if gaps > max(_GAPS, 2 * outbox.read_counter(tx, _GAPS_LEFT)):
        _merge_gaps(tx, topics, now_ms)
    # Also with room again: a box that is nearly full is treated as full, or `fail` would come late.
    return results_full or result_bytes > bounds.result_bytes * _LEAVE


def drop_new(
    tx: Connection, topics: Topics, results: Sequence[dict[str, Any]], now_ms: int
) -> None:
    """Give numbers to results that never enter a full outbox, and tell the console which."""
    first = outbox.read_counter(tx, "seq") + 1
    outbox.save_counter(tx, "seq", first + len(results) - 1)
    numbers = range(first, first + len(results))
    _tell(tx, topics, Rank.RESULT, numbers, "outbox_full", now_ms)


def _drop_old_results(tx: Connection, topics: Topics, before_ms: int, now_ms: int) -> None:
    query = (
        select(_OUTBOX.c.id, _OUTBOX.c.seq)
        .where(_OUTBOX.c.rank == Rank.RESULT.value, _OUTBOX.c.created_ms < before_ms)
        .order_by(_OUTBOX.c.id)
        .limit(_AT_ONCE)
    )
    rows = [(number, seq) for number, seq in tx.execute(query)]
    _drop(tx, topics, Rank.RESULT, rows, "too_old", now_ms)


def _drop_results(tx: Connection, topics: Topics, excess: int, now_ms: int) -> int:
    """Drop the oldest results that may be; return how many bytes that freed."""
    query = (
        select(_OUTBOX.c.id, _OUTBOX.c.seq, func.length(_OUTBOX.c.body))
        .where(_OUTBOX.c.rank == Rank.RESULT.value, _OUTBOX.c.kind != KEPT_RESULT)
        .order_by(_OUTBOX.c.id)
        .limit(_AT_ONCE)
    )
    rows: list[tuple[int, int | None]] = []
    freed = 0
    for number, seq, size in tx.execute(query):
        if freed >= excess:
            break
        rows.append((number, seq))
        freed += size
    _drop(tx, topics, Rank.RESULT, rows, "outbox_full", now_ms)
    return freed


def _oldest(tx: Connection, rank: Rank, count: int) -> list[tuple[int, int | None]]:
    query = (
        select(_OUTBOX.c.id, _OUTBOX.c.seq)
        .where(_OUTBOX.c.rank == rank.value, ~_IS_GAP)
        .order_by(_OUTBOX.c.id)
        .limit(min(count, _AT_ONCE))
    )
    return [(number, seq) for number, seq in tx.execute(query)]


def _thin(tx: Connection, topics: Topics, count: int, bound: int, now_ms: int) -> None:
    """Drop every second heartbeat, and the oldest ones once that was done often enough.

    What is on the wire already is not thinned: each would need a gap record of its own.
    """
    done = outbox.read_counter(tx, _THINNED)
    unsent = [row for row in _oldest(tx, Rank.TELEMETRY, bound * 2) if row[1] is None]
    if done < _THINNINGS and len(unsent) > bound // 2:
        outbox.save_counter(tx, _THINNED, done + 1)
        _drop(tx, topics, Rank.TELEMETRY, unsent[1::2], "thinned", now_ms)
    else:
        rows = _oldest(tx, Rank.TELEMETRY, max(bound // 4, count - bound))
        _drop(tx, topics, Rank.TELEMETRY, rows, "outbox_full", now_ms)


def _drop(
    tx: Connection,
    topics: Topics,
    rank: Rank,
    rows: Iterable[tuple[int, int | None]],
    reason: str,
    now_ms: int,
) -> None:
    """Delete records by their row ids, and tell the console the numbers that will not come."""
    chosen = list(rows)
    if not chosen:
        return
    last = outbox.read_counter(tx, "seq")
    numbers: list[int] = []
    for _, seq in chosen:
        if seq is None:
            last += 1
        numbers.append(last if seq is None else seq)
    outbox.save_counter(tx, "seq", last)
    dropped = f"dropped_{rank.name}"
    outbox.save_counter(tx, dropped, outbox.read_counter(tx, dropped) + len(chosen))
    _delete(tx, [number for number, _ in chosen])
    _tell(tx, topics, rank, numbers, reason, now_ms)
    reach("outbox.bounded")


def _delete(tx: Connection, ids: Sequence[int]) -> None:
    for start in range(0, len(ids), 500):
        tx.execute(delete(_OUTBOX).where(_OUTBOX.c.id.in_(ids[start : start + 500])))


def _tell(
    tx: Connection, topics: Topics, rank: Rank, numbers: Iterable[int], reason: str, now_ms: int
) -> None:
    """Write one gap record for each run of numbers without a break."""
    _write_gaps(tx, topics, [_Gap(seq, seq, _CLASS[rank], reason) for seq in numbers], now_ms)


class _Gap(NamedTuple):
    """Numbers that will not come."""

    first: int
    last: int
    kind: str
    """Class of docs/protocol.md; of several the most important one."""
    reason: str


def _write_gaps(tx: Connection, topics: Topics, gaps: Iterable[_Gap], now_ms: int) -> int:
    """Write gap records, touching ones as one; return how many that are."""
    joined = _join(gaps)
    events = [
        build_event(
            topics,
            GAP,
            {
                "class": gap.kind,
                "from_seq": gap.first,
                "to_seq": gap.last,
                "count": gap.last - gap.first + 1,
                "reason": gap.reason,
            },
            now_ms,
        )
        for gap in joined
    ]
    outbox.add_records(tx, events)
    return len(joined)


def _join(gaps: Iterable[_Gap]) -> list[_Gap]:
    joined: list[_Gap] = []
    for gap in sorted(gaps):
        last = joined[-1] if joined else None
        if last is not None and gap.first <= last.last + 1:
            reason = last.reason if last.reason == gap.reason else "merged"
            end, kind = max(last.last, gap.last), min(last.kind, gap.kind)
            joined[-1] = _Gap(last.first, end, kind, reason)
        else:
            joined.append(gap)
    return joined


def _count_gaps(tx: Connection) -> int:
    query = select(func.count()).where(_OUTBOX.c.rank == Rank.EVENT.value, _IS_GAP)
    return int(tx.execute(query).scalar_one())


def _merge_gaps(tx: Connection, topics: Topics, now_ms: int) -> None:
    """Replace the gap records by as few as name the same numbers, and their own."""
    query = select(_OUTBOX.c.id, _OUTBOX.c.seq, _OUTBOX.c.body).where(
        _OUTBOX.c.rank == Rank.EVENT.value, _IS_GAP
    )
    gaps: list[_Gap] = []
    replaced: list[int] = []
    for number, seq, body in tx.execute(query):
        try:
            named = json.loads(body)
            gap = _Gap(named["from_seq"], named["to_seq"], named["class"], named["reason"])
        except (ValueError, KeyError):
            # Damaged on the disk: it stays as it is.
            continue
        gaps.append(gap)
        replaced.append(number)
        if seq is not None:
            gaps.append(_Gap(seq, seq, _CLASS[Rank.EVENT], gap.reason))
    _delete(tx, replaced)
    outbox.save_counter(tx, _GAPS_LEFT, _write_gaps(tx, topics, gaps, now_ms))
