"""Whatever clocks, restarts and senders do: a job id is accepted at most once in all of history."""

import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sqlalchemy import text
from ulid import ULID

from agent.store.retention import floor_id, id_time_ms
from tests.harness.desk import MODEL, Desk

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
KEEP_DAYS = 3
BODY = {"handler": "infer", "model": MODEL, "input": {"data_b64": ""}}


class Retention(RuleBasedStateMachine):
    """A box with a bad clock, a console with another one, and every message sent again."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.desk = Desk(Path(self.folder.name), keep_ends_days=KEEP_DAYS, synchronous="OFF")
        self.true_ms = self.desk.clock.wall
        self.sent: list[str] = []
        self.accepted: Counter[str] = Counter()

    def teardown(self) -> None:
        self.desk.close()
        self.folder.cleanup()

    def submit(self, job_id: str, expiry_s: int | None) -> None:
        document = {"v": 1, "id": "m", "type": "job.submit", "body": BODY}
        topic = self.desk.topics.submit(job_id)
        result = self.desk.hear(self.desk.message(topic, json.dumps(document).encode(), expiry_s))
        self.accepted[job_id] += result.accepted

    @rule(age_days=st.integers(-400, 400), expiry_s=st.none() | st.just(3600))
    def submit_new(self, age_days: int, expiry_s: int | None) -> None:
        at_ms = max(0, self.true_ms - age_days * DAY_MS)
        job_id = str(ULID.from_timestamp(at_ms / 1000))
        self.sent.append(job_id)
        self.submit(job_id, expiry_s)

    @rule(expiry_s=st.none() | st.just(3600))
    def submit_fresh(self, expiry_s: int | None) -> None:
        self.submit_new(0, expiry_s)

    @rule(index=st.integers(0, 10**6), expiry_s=st.none() | st.just(3600))
    def submit_again(self, index: int, expiry_s: int | None) -> None:
        if self.sent:
            self.submit(self.sent[index % len(self.sent)], expiry_s)

    @rule()
    def submit_all_again(self) -> None:
        for job_id in self.sent:
            self.submit(job_id, None)

    @rule()
    def finish(self) -> None:
        store = self.desk.store
        query = text("SELECT job_id, attempt FROM jobs WHERE state = 'queued'")
        store.dispatch(f"task-{len(self.sent)}")
        for job_id, attempt in store.run(lambda tx: tx.execute(query).all()):
            self.desk.open_jobs -= store.finish(job_id, attempt)

    @rule(days=st.integers(0, 10))
    def live_on(self, days: int) -> None:
        self.true_ms += days * DAY_MS
        self.desk.clock.advance(days * DAY_MS)

    @rule(days=st.integers(-4000, 4000))
    def set_clock(self, days: int) -> None:
        self.desk.clock.wall = max(0, self.true_ms + days * DAY_MS)

    @rule()
    def correct_clock(self) -> None:
        self.desk.clock.wall = self.true_ms

    @rule(limit=st.sampled_from([1, 3, 3000]))
    def keep_house(self, limit: int) -> None:
        self.desk.store.run(self.desk.retention.advance)
        self.desk.store.run(lambda tx: self.desk.retention.forget(tx, limit))
        self.desk.store.run(lambda tx: self.desk.retention.strip(tx, limit))

    @rule()
    def restart(self) -> None:
        self.desk.restart()

    @invariant()
    def no_id_was_accepted_twice(self) -> None:
        assert all(count <= 1 for count in self.accepted.values())


TestRetention = Retention.TestCase
TestRetention.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    phases=(Phase.generate,),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path, keep_ends_days=KEEP_DAYS)


def send(desk: Desk, job_id: str) -> int:
    document = {"v": 1, "id": "m", "type": "job.submit", "body": BODY}
    message = desk.message(desk.topics.submit(job_id), json.dumps(document).encode())
    return desk.hear(message).accepted


@pytest.mark.parametrize("days", [365, -3650, -20_000])
def test_fresh_jobs_are_taken_while_the_clock_is_wrong_and_after(desk: Desk, days: int) -> None:
    true_ms = desk.clock.wall
    for step in range(3):
        desk.clock.wall = max(0, true_ms + (days * DAY_MS if step == 1 else 0))
        assert send(desk, str(ULID.from_timestamp(true_ms / 1000))) == 1
        desk.store.run(desk.retention.advance)
    desk.close()


def test_clock_a_year_ahead_forgets_nothing(desk: Desk) -> None:
    job_id = str(ULID.from_timestamp(desk.clock.wall / 1000))
    assert send(desk, job_id) == 1
    desk.store.dispatch()
    desk.store.finish(job_id)
    desk.clock.wall += 365 * DAY_MS
    desk.store.run(desk.retention.advance)
    assert desk.store.run(lambda tx: desk.retention.forget(tx, 100)) == 0
    desk.close()


def test_horizon_and_ids_agree_to_the_millisecond() -> None:
    for at_ms in (0, 1, 1_800_000_000_000, 2**48 - 1):
        first, last = floor_id(at_ms) + "0" * 16, floor_id(at_ms) + "Z" * 16
        assert id_time_ms(first) == id_time_ms(last) == at_ms


def test_bodies_of_jobs_that_ended_long_ago_are_emptied_and_all_else_is_kept(desk: Desk) -> None:
    ids = [str(ULID.from_timestamp(desk.clock.wall / 1000)) for _ in range(7)]
    for job_id in ids:
        send(desk, job_id)
    desk.store.dispatch()
    for job_id in ids[:5]:
        desk.store.finish(job_id)
    desk.clock.advance(2 * DAY_MS + 10)
    for _ in range(5):
        desk.store.run(lambda tx: desk.retention.strip(tx, 2))
    bodies = [desk.store.job(job_id)["body"] for job_id in ids]
    assert [bool(body) for body in bodies] == [False] * 5 + [True] * 2
    assert desk.store.job(ids[0])["result"] is None
    assert send(desk, ids[0]) == 0
    assert desk.history(ids[0])[-1] == ("succeeded", "ok")
    desk.close()


def keep_house(desk: Desk) -> None:
    desk.store.run(lambda tx: desk.retention.strip(tx, 100))


@pytest.mark.parametrize("is_restarted", [False, True])
def test_clock_that_jumps_a_year_ahead_empties_no_fresh_result(
    desk: Desk, is_restarted: bool
) -> None:
    # Chaos found it: every result of the last two days was gone once the clock had jumped.
    job_id = str(ULID.from_timestamp(desk.clock.wall / 1000))
    send(desk, job_id)
    desk.store.dispatch()
    desk.store.finish(job_id)
    keep_house(desk)

    desk.clock.wall += 365 * DAY_MS
    if is_restarted:
        desk.restart()
    for _ in range(47):
        desk.clock.advance(HOUR_MS)
        keep_house(desk)
        assert desk.store.job(job_id)["result"] is not None
    desk.clock.wall -= 365 * DAY_MS
    keep_house(desk)
    assert desk.store.job(job_id)["result"] is not None

    desk.clock.wall += 365 * DAY_MS
    for _ in range(49):
        desk.clock.advance(HOUR_MS)
        keep_house(desk)
    assert desk.store.job(job_id)["result"] is None
    desk.close()


def test_clock_that_comes_from_1970_to_now_is_believed_in_the_end(desk: Desk) -> None:
    now_ms, desk.clock.wall = desk.clock.wall, 0
    keep_house(desk)
    desk.clock.wall = now_ms
    job_id = str(ULID.from_timestamp(now_ms / 1000))
    send(desk, job_id)
    desk.store.dispatch()
    desk.store.finish(job_id)
    for _ in range(5 * 24):
        desk.clock.advance(HOUR_MS)
        keep_house(desk)
    assert desk.store.job(job_id)["result"] is None
    desk.close()


def test_job_that_ended_while_the_clock_was_years_behind_keeps_its_result(desk: Desk) -> None:
    # Chaos found it: once the clock was right again, the job had ended ten years ago.
    right_ms = desk.clock.wall
    job_id = str(ULID.from_timestamp(right_ms / 1000))
    send(desk, job_id)
    desk.store.dispatch()
    desk.clock.wall -= 3650 * DAY_MS
    desk.store.finish(job_id)
    keep_house(desk)
    desk.clock.wall = right_ms
    for _ in range(60):
        desk.clock.advance(HOUR_MS)
        keep_house(desk)
        is_due = desk.clock.wall - right_ms > 2 * DAY_MS
        assert is_due or desk.store.job(job_id)["result"] is not None
    desk.close()


def test_console_whose_clock_is_ahead_keeps_no_bodies_for_longer(desk: Desk) -> None:
    ids = [str(ULID.from_timestamp((desk.clock.wall + HOUR_MS + n) / 1000)) for n in range(3)]
    for job_id in ids:
        send(desk, job_id)
        desk.store.dispatch()
        desk.store.finish(job_id)
        desk.clock.advance(1000)
    for _ in range(2 * 24 + 3):
        desk.clock.advance(HOUR_MS)
        keep_house(desk)
    assert [desk.store.job(job_id)["result"] for job_id in ids] == [None] * 3
    desk.close()
