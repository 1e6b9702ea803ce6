"""What gives way in a full outbox, by class and by the job's `on_full`; and what never does."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.commands import new_id
from agent.store import bounds, outbox
from agent.store.bounds import OutboxBounds
from agent.store.outbox import Rank
from agent.store.records import build_event, build_result, build_telemetry
from tests.harness.ledger import Store

LIMITS = OutboxBounds(result_bytes=1000, result_days=30, events=10, telemetry=20)
DAY_MS = 86_400_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "ledger.db")
    yield store
    store.close()


def enforce(store: Store) -> bool:
    full: bool = store.run(lambda tx: bounds.enforce(tx, store.topics, LIMITS, store.clock.wall))
    store.ledger.results_full = full
    return full


def add(store: Store, rows: list[dict[str, Any]]) -> None:
    store.run(lambda tx: outbox.add_records(tx, rows))


def add_results(store: Store, count: int, *, keep: bool = False) -> None:
    row = build_result(store.topics, "job", '"' + "x" * 98 + '"', store.clock.wall, keep=keep)
    store.run(lambda tx: outbox.add_records(tx, [row] * count))


def count_class(store: Store, rank: Rank) -> int:
    return int(store.run(outbox.measure_classes).get(rank, (0, 0))[0])


def read_gaps(store: Store) -> list[tuple[str, int, int, str]]:
    return [
        (body["class"], body["from_seq"], body["to_seq"], body["reason"])
        for _, body in store.reports()
        if "from_seq" in body
    ]


def finish(store: Store, on_full: str) -> str:
    job_id = store.accept(options=f'{{"on_full":"{on_full}"}}')
    store.dispatch(new_id())
    store.finish(job_id)
    return job_id


def test_oldest_results_go_first_and_are_named(store: Store) -> None:
    add_results(store, 8)
    store.take()
    add_results(store, 4)
    enforce(store)
    assert read_gaps(store) == [("P1", 1, 3, "outbox_full")]
    assert count_class(store, Rank.RESULT) == 9


def test_results_beyond_their_age_go_and_make_room(store: Store) -> None:
    add_results(store, 9)
    store.clock.advance(31 * DAY_MS)
    add_results(store, 5)
    assert enforce(store) is False
    assert read_gaps(store) == [("P1", 1, 9, "too_old")]
    assert count_class(store, Rank.RESULT) == 5


def test_results_that_are_to_be_kept_stay_and_refuse_new_ones(store: Store) -> None:
    add_results(store, 12, keep=True)
    assert enforce(store) is True
    assert count_class(store, Rank.RESULT) == 12
    job_id = finish(store, "keep_oldest")
    assert store.state(job_id) == ("succeeded", "ok")
    assert count_class(store, Rank.RESULT) == 12
    assert read_gaps(store) == [("P1", 1, 1, "outbox_full")]


@pytest.mark.parametrize(
    ("on_full", "end", "results"),
    [
        ("keep_newest", ("succeeded", "ok"), 13),
        ("keep_oldest", ("succeeded", "ok"), 12),
        ("fail", ("failed", "outbox_full"), 12),
    ],
)
def test_job_says_what_becomes_of_its_result_in_a_full_outbox(
    store: Store, on_full: str, end: tuple[str, str], results: int
) -> None:
    add_results(store, 12, keep=True)
    enforce(store)
    assert store.state(finish(store, on_full)) == end
    assert count_class(store, Rank.RESULT) == results


@pytest.mark.parametrize("on_full", ["keep_newest", "keep_oldest", "fail"])
def test_job_s_result_is_kept_while_there_is_room(store: Store, on_full: str) -> None:
    enforce(store)
    assert store.state(finish(store, on_full)) == ("succeeded", "ok")
    assert count_class(store, Rank.RESULT) == 1


def test_states_are_never_dropped(store: Store) -> None:
    ids = [store.accept() for _ in range(500)]
    enforce(store)
    assert len(store.take(1000)) == len(ids)
    assert read_gaps(store) == []


def test_heartbeats_of_a_long_time_offline_are_thinned_three_times_and_then_the_oldest_go(
    store: Store,
) -> None:
    reasons = []
    for _ in range(6):
        missing = 21 - count_class(store, Rank.TELEMETRY)
        row = build_telemetry(store.topics, "{}", store.clock.wall)
        add(store, [row] * missing)
        before = len(read_gaps(store))
        enforce(store)
        reasons += [gap[3] for gap in read_gaps(store)[before:]]
        assert count_class(store, Rank.TELEMETRY) <= 20
    assert reasons == ["thinned"] * 3 + ["outbox_full"] * 3


def test_gap_records_do_not_push_out_events_and_are_not_pushed_out(store: Store) -> None:
    event = build_event(store.topics, "e", {}, store.clock.wall)
    for _ in range(20):
        store.run(lambda tx: outbox.add_records(tx, [event] * 3))
        store.accept()
        store.take()
        enforce(store)
    kept = Counter(
        "gap" if "from_seq" in body else "event"
        for kind, body in store.reports()
        if kind == "event"
    )
    assert 9 <= kept["event"] <= 10
    named = {n for _, first, last, _ in read_gaps(store) for n in range(first, last + 1)}
    assert len(named) == 60 - kept["event"]


def test_many_gap_records_become_few(store: Store) -> None:
    row: dict[str, Any] = build_telemetry(store.topics, "{}", store.clock.wall)
    for _ in range(400):
        store.run(lambda tx: bounds.drop_new(tx, store.topics, [row], store.clock.wall))
    store.take(1000)
    assert len(read_gaps(store)) == 400
    enforce(store)
    assert read_gaps(store) == [("P1", 1, 800, "outbox_full")]


@pytest.mark.parametrize("limit", [8, 16, 64])
def test_every_class_has_its_share_of_the_room(store: Store, limit: int) -> None:
    add_results(store, 100)
    for row in (
        build_event(store.topics, "e", {}, store.clock.wall),
        build_telemetry(store.topics, "{}", store.clock.wall),
        {**build_result(store.topics, "j", "{}", 0), "rank": Rank.END, "type": "end"},
        {**build_result(store.topics, "j", "{}", 0), "rank": Rank.EARLY, "type": "early"},
    ):
        add(store, [row] * 100)
    taken = Counter(Rank(record.rank) for record in store.take(limit))
    assert sum(taken.values()) == limit
    assert all(taken[rank] >= limit // 8 for rank in Rank)
    assert taken[Rank.END] == max(taken.values())
