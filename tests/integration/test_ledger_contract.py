"""What the ledger promises, case by case: dedupe, retries, crashes, order, time, progress.

The expected ends are typed out from docs/protocol.md, "Jobs".
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.commands import new_id
from agent.jobs import JobState, Lane
from agent.store import quarantine
from agent.store.database import transaction
from agent.store.ledger import Verdict
from tests.harness.clocks import FakeClock
from tests.harness.ledger import BACK_OFF_MS, Store, make_job

DAY_MS = 86_400_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "ledger.db")
    yield store
    store.close()


# --- defects that were found, each with its story ---


@pytest.mark.parametrize("order", ["duplicate first", "newer first"])
def test_duplicate_beside_the_job_that_replaces_it_does_not_take_back_the_end(
    store: Store, order: str
) -> None:
    old = make_job(new_id(), dedupe_key="k", dedupe="replace_queued")
    new = make_job(new_id(), dedupe_key="k", dedupe="replace_queued")
    store.accept_all(old)
    store.take()
    batch = [old, new] if order == "duplicate first" else [new, old]
    verdicts = store.accept_all(*batch).verdicts
    assert set(verdicts) == {Verdict.DUPLICATE, Verdict.ACCEPTED}
    assert store.state(old.job_id) == ("canceled", "replaced")
    assert store.pending_states(old.job_id)[-1] == ("canceled", 2)


def test_job_replaced_in_the_batch_it_came_with_reports_its_end(store: Store) -> None:
    old = make_job(new_id(), dedupe_key="k", dedupe="replace_queued")
    new = make_job(new_id(), dedupe_key="k", dedupe="replace_queued")
    store.accept_all(old, new, old)
    assert store.pending_states(old.job_id) == [("canceled", 2)]


def test_late_progress_of_a_lost_attempt_does_not_strand_its_job(store: Store) -> None:
    job_id = store.accept()
    store.dispatch("task-1")
    store.requeue("task-1")
    store.progress(job_id, attempt=1, done=3)
    store.clock.advance(BACK_OFF_MS)
    assert store.dispatch("task-2") == [job_id]


def test_progress_beside_a_retryable_error_does_not_strand_its_job(store: Store) -> None:
    job_id = store.accept()
    store.dispatch("task-1")
    store.fail(job_id)
    store.progress(job_id, attempt=1, done=3)
    store.clock.advance(BACK_OFF_MS)
    assert store.dispatch("task-2") == [job_id]


def test_retryable_error_that_is_reported_twice_counts_once(store: Store) -> None:
    job_id = store.accept(max_attempts=3)
    store.dispatch()
    for _ in range(3):
        assert store.fail(job_id, attempt=1) == []
    assert store.job(job_id)["failures"] == 1
    assert store.history(job_id) == [(1, "queued"), (2, "running"), (3, "queued")]


def test_retryable_error_of_an_attempt_given_up_as_lost_counts_once(store: Store) -> None:
    job_id = store.accept(max_attempts=2)
    store.dispatch()
    store.requeue("task-1")
    assert store.fail(job_id, attempt=1) == []
    assert store.state(job_id)[0] == "queued"
    assert (store.job(job_id)["interruptions"], store.job(job_id)["failures"]) == (1, 0)


def test_crash_frees_the_other_jobs_of_its_task(store: Store) -> None:
    ran, waited = store.accept(), store.accept()
    store.dispatch("task-1")
    store.crash("task-1", (ran, 1))
    store.clock.advance(BACK_OFF_MS)
    assert set(store.dispatch("task-2")) == {ran, waited}


def test_job_with_damaged_text_can_be_met_and_cancelled(store: Store) -> None:
    job_id = store.accept()
    damage = "UPDATE jobs SET body = CAST(x'7b22ff227d' AS TEXT) WHERE job_id = ?"
    store.run(lambda tx: tx.exec_driver_sql(damage, (job_id,)))
    other = make_job(job_id, body='{"model":"other"}', body_hash="hash-2")
    assert store.accept_all(other).verdicts == [Verdict.CONFLICT]
    assert [job.state for job in store.cancel(job_id)] == [JobState.CANCELED]


# --- dedupe_key: every policy, every state of the other job ---

QUEUED, DISPATCHED, RUNNING, WAITING, ENDED = "queued", "dispatched", "running", "waiting", "ended"
ACCEPTED = ("queued", None)
DROPPED = ("rejected", "dedupe_dropped")
REPLACED = ("canceled", "replaced")
KEPT: dict[str, tuple[str, str | None]] = {
    QUEUED: ("queued", None),
    DISPATCHED: ("queued", None),
    RUNNING: ("running", None),
    WAITING: ("queued", "input_error"),
    ENDED: ("succeeded", "ok"),
}


def bring_to(store: Store, job_id: str, stage: str) -> None:
    """Let the one job of a store come to a stage of its life."""
    if stage != QUEUED:
        assert store.dispatch("task-1") == [job_id]
    if stage == RUNNING:
        store.run(lambda tx: store.ledger.record_started(tx, ["task-1"]))
    if stage == WAITING:
        store.fail(job_id)
    if stage == ENDED:
        store.finish(job_id)


@pytest.mark.parametrize(
    ("policy", "stage", "new", "old"),
    [
        ("drop_new", QUEUED, DROPPED, KEPT[QUEUED]),
        ("drop_new", DISPATCHED, DROPPED, KEPT[DISPATCHED]),
        ("drop_new", RUNNING, DROPPED, KEPT[RUNNING]),
        ("drop_new", WAITING, DROPPED, KEPT[WAITING]),
        ("drop_new", ENDED, ACCEPTED, KEPT[ENDED]),
        ("replace_queued", QUEUED, ACCEPTED, REPLACED),
        ("replace_queued", DISPATCHED, ACCEPTED, REPLACED),
        ("replace_queued", RUNNING, ACCEPTED, KEPT[RUNNING]),
        ("replace_queued", WAITING, ACCEPTED, REPLACED),
        ("replace_queued", ENDED, ACCEPTED, KEPT[ENDED]),
        ("run_all", QUEUED, ACCEPTED, KEPT[QUEUED]),
        ("run_all", DISPATCHED, ACCEPTED, KEPT[DISPATCHED]),
        ("run_all", RUNNING, ACCEPTED, KEPT[RUNNING]),
        ("run_all", WAITING, ACCEPTED, KEPT[WAITING]),
        ("run_all", ENDED, ACCEPTED, KEPT[ENDED]),
    ],
)
def test_dedupe_policy_meets_a_job_of_the_same_key(
    store: Store,
    policy: str,
    stage: str,
    new: tuple[str, str | None],
    old: tuple[str, str | None],
) -> None:
    first = store.accept(dedupe_key="k", dedupe="run_all")
    bring_to(store, first, stage)
    second = make_job(new_id(), dedupe_key="k", dedupe=policy)
    accepted = store.accept_all(second)
    assert store.state(second.job_id) == new
    assert store.state(first) == old
    is_dropped = new == DROPPED
    assert accepted.verdicts == [Verdict.DROPPED if is_dropped else Verdict.ACCEPTED]
    assert [job.job_id for job in accepted.ended] == ([first] if old == REPLACED else [])


@pytest.mark.parametrize(
    ("policy", "states"),
    [
        ("drop_new", [ACCEPTED, DROPPED, DROPPED]),
        ("replace_queued", [REPLACED, REPLACED, ACCEPTED]),
        ("run_all", [ACCEPTED, ACCEPTED, ACCEPTED]),
    ],
)
def test_dedupe_policy_holds_inside_one_batch(
    store: Store, policy: str, states: list[tuple[str, str | None]]
) -> None:
    jobs = [make_job(new_id(), dedupe_key="k", dedupe=policy) for _ in range(3)]
    store.accept_all(*jobs)
    assert [store.state(job.job_id) for job in jobs] == states
    for job, state in zip(jobs, states, strict=True):
        assert store.pending_states(job.job_id)[-1][0] == state[0]


def test_replaced_task_may_still_run_and_is_asked_to_stop(store: Store) -> None:
    old = store.accept(dedupe_key="k", dedupe="run_all")
    store.dispatch("task-1")
    [ended] = store.accept_all(make_job(new_id(), dedupe_key="k", dedupe="replace_queued")).ended
    assert (ended.job_id, ended.task_id) == (old, "task-1")
    assert store.finish(old) == 0


def test_newest_replaces_all_that_wait_and_none_that_runs(store: Store) -> None:
    ran = store.accept(dedupe_key="k", dedupe="run_all")
    bring_to(store, ran, RUNNING)
    waiting = [store.accept(dedupe_key="k", dedupe="run_all") for _ in range(3)]
    newest = store.accept(dedupe_key="k", dedupe="replace_queued")
    assert [store.state(job_id) for job_id in waiting] == [REPLACED] * 3
    assert store.state(ran) == KEPT[RUNNING]
    assert store.state(newest) == ACCEPTED


def test_duplicate_of_a_dropped_job_meets_its_end_even_when_the_way_is_free(store: Store) -> None:
    first = store.accept(dedupe_key="k", dedupe="drop_new")
    dropped = make_job(new_id(), dedupe_key="k", dedupe="drop_new")
    store.accept_all(dropped)
    store.dispatch()
    store.finish(first)
    store.take()
    assert store.accept_all(dropped).verdicts == [Verdict.DUPLICATE]
    assert store.pending_states(dropped.job_id)[-1] == ("rejected", 1)
    assert store.state(store.accept(dedupe_key="k", dedupe="drop_new")) == ACCEPTED


def test_dropped_job_does_not_stand_in_the_way_of_others(store: Store) -> None:
    first = store.accept(dedupe_key="k", dedupe="drop_new")
    store.accept(dedupe_key="k", dedupe="drop_new")
    store.cancel(first)
    assert store.state(store.accept(dedupe_key="k", dedupe="drop_new")) == ACCEPTED


@pytest.mark.parametrize("key", ["other", None])
def test_other_keys_and_none_do_not_meet(store: Store, key: str | None) -> None:
    store.accept(dedupe_key="k", dedupe="drop_new")
    assert store.state(store.accept(dedupe_key=key, dedupe="drop_new")) == ACCEPTED


def test_duplicate_of_the_open_job_of_a_key_is_a_duplicate(store: Store) -> None:
    job = make_job(new_id(), dedupe_key="k", dedupe="drop_new")
    assert store.accept_all(job, job).verdicts == [Verdict.ACCEPTED, Verdict.DUPLICATE]
    assert store.state(job.job_id) == ACCEPTED


# --- attempts that end in an error or not at all ---


def play(store: Store, job_id: str, events: str) -> None:
    """Dispatch a job and end each attempt: e = retryable error, x = final error, l = lost."""
    for number, event in enumerate(events, 1):
        store.clock.advance(BACK_OFF_MS)
        assert store.dispatch(f"task-{number}") == [job_id], f"before attempt {number}"
        if event == "l":
            store.requeue(f"task-{number}")
        else:
            store.fail(job_id, number, retryable=event == "e")


@pytest.mark.parametrize(
    ("events", "changes", "end"),
    [
        ("e", {}, ("queued", "input_error")),
        ("eeee", {}, ("queued", "input_error")),
        ("eeeee", {}, ("failed", "input_error")),
        ("x", {}, ("failed", "input_error")),
        ("ex", {}, ("failed", "input_error")),
        ("e", {"max_attempts": 1}, ("failed", "input_error")),
        ("ee", {"max_attempts": 2}, ("failed", "input_error")),
        ("l", {}, ("queued", None)),
        ("lllll", {}, ("failed", "attempts_exhausted")),
        ("l", {"max_attempts": 1}, ("failed", "attempts_exhausted")),
        ("el", {"max_attempts": 3}, ("queued", "input_error")),
        ("ele", {"max_attempts": 3}, ("failed", "input_error")),
        ("lel", {"max_attempts": 3}, ("failed", "attempts_exhausted")),
        ("eel", {"max_attempts": 3}, ("failed", "attempts_exhausted")),
        ("e", {"options": '{"on_error":"fail"}'}, ("failed", "input_error")),
        ("le", {"options": '{"on_error":"fail"}'}, ("failed", "input_error")),
        ("l", {"options": '{"on_error":"fail"}'}, ("queued", None)),
        ("l", {"on_interrupt": "fail"}, ("failed", "interrupted")),
        ("el", {"on_interrupt": "fail"}, ("failed", "interrupted")),
        ("e", {"on_interrupt": "fail"}, ("queued", "input_error")),
    ],
)
def test_attempts_are_bounded_however_they_end(
    store: Store, events: str, changes: dict[str, Any], end: tuple[str, str | None]
) -> None:
    job_id = store.accept(**changes)
    play(store, job_id, events)
    assert store.state(job_id) == end
    store.clock.advance(BACK_OFF_MS)
    assert store.dispatch("later") == ([job_id] if end[0] == "queued" else [])


@pytest.mark.parametrize(
    ("options", "waits_s"),
    [(None, [1, 2, 4, 8]), ('{"retry_delay_s":10}', [10, 20, 40, 80])],
)
def test_retries_wait_twice_as_long_each_time(
    store: Store, options: str | None, waits_s: list[int]
) -> None:
    job_id = store.accept(options=options)
    for number, wait_s in enumerate(waits_s, 1):
        assert store.dispatch(f"task-{number}") == [job_id]
        store.fail(job_id, number)
        store.clock.advance(wait_s * 500 - 1)
        assert store.dispatch("early") == []
        store.clock.advance(wait_s * 500 + 1)


def test_interrupted_job_is_tried_again_at_once_and_then_after_a_wait(store: Store) -> None:
    job_id = store.accept()
    store.dispatch("task-1")
    store.requeue("task-1")
    assert store.dispatch("task-2") == [job_id]
    store.requeue("task-2")
    assert store.dispatch("task-3") == []
    store.clock.advance(1000)
    assert store.dispatch("task-3") == [job_id]


def test_waiting_job_can_be_cancelled_and_stays_so(store: Store) -> None:
    job_id = store.accept()
    play(store, job_id, "e")
    store.cancel(job_id)
    store.clock.advance(BACK_OFF_MS)
    assert store.dispatch("later") == []
    assert store.state(job_id) == ("canceled", "canceled")


def test_waiting_job_that_passes_its_deadline_expires(store: Store) -> None:
    job_id = store.accept(expires_boot_ms=store.clock.boot + BACK_OFF_MS + 100)
    play(store, job_id, "e")
    store.clock.advance(BACK_OFF_MS)
    assert len(store.run(store.ledger.schedule.expire)) == 1
    assert store.state(job_id) == ("expired", "deadline_passed")


def test_error_that_is_retried_says_why_in_its_state(store: Store) -> None:
    job_id = store.accept()
    play(store, job_id, "e")
    assert store.history(job_id) == [(1, "queued"), (2, "running"), (3, "queued")]
    [body] = [body for _, body in store.reports() if body["job_id"] == job_id]
    assert body["reason"] == {"code": "input_error", "message": "no luck"}


# --- crashes ---


def test_second_crash_ends_the_job_as_poison(store: Store) -> None:
    job_id = store.accept()
    store.dispatch("task-1")
    assert store.crash("task-1", (job_id, 1)) == []
    assert store.state(job_id) == ("queued", None)
    store.dispatch("task-2")
    assert len(store.crash("task-2", (job_id, 2))) == 1
    assert store.state(job_id) == ("failed", "poison_job")


def test_crash_of_a_running_job_is_named_in_its_history(store: Store) -> None:
    job_id = store.accept()
    bring_to(store, job_id, RUNNING)
    store.crash("task-1", (job_id, 1))
    assert store.state(job_id) == ("queued", "worker_crashed")


def test_same_crash_reported_twice_counts_once(store: Store) -> None:
    job_id = store.accept()
    store.dispatch("task-1")
    for _ in range(3):
        store.crash("task-1", (job_id, 1))
    assert store.state(job_id)[0] == "queued"
    assert (store.job(job_id)["crashes"], store.job(job_id)["interruptions"]) == (1, 1)


def test_crash_that_is_told_after_its_task_was_given_up_counts_once(store: Store) -> None:
    job_id = store.accept()
    store.dispatch("task-1")
    store.requeue("task-1")
    store.crash("task-1", (job_id, 1))
    assert (store.job(job_id)["crashes"], store.job(job_id)["interruptions"]) == (1, 1)
    store.dispatch("task-2")
    store.requeue("task-2")
    assert len(store.crash("task-2", (job_id, 2))) == 1
    assert store.state(job_id) == ("failed", "poison_job")


def test_crash_told_late_leaves_the_next_attempt_alone(store: Store) -> None:
    job_id = store.accept()
    store.dispatch("task-1")
    store.requeue("task-1")
    store.dispatch("task-2")
    store.crash("task-1", (job_id, 1))
    assert store.job(job_id)["task_id"] == "task-2"
    assert store.finish(job_id, attempt=2) == 1


def test_crash_leaves_ended_jobs_as_they_are(store: Store) -> None:
    job_id = store.accept()
    bring_to(store, job_id, ENDED)
    assert store.crash("task-1", (job_id, 1)) == []
    assert store.state(job_id) == KEPT[ENDED]


def test_crash_without_a_job_s_name_frees_the_jobs_of_its_task(store: Store) -> None:
    job_id = store.accept()
    store.dispatch("task-1")
    store.crash("task-1")
    assert store.dispatch("task-2") == [job_id]


def read_blocked(store: Store) -> set[tuple[str, str]]:
    return set(store.run(quarantine.read_quarantine))


def test_three_crashes_of_one_version_put_it_and_no_other_into_quarantine(store: Store) -> None:
    for version in ("1", "1", "2"):
        store.crash(new_id(), version=version)
    store.crash(new_id(), model="other")
    assert read_blocked(store) == set()
    store.crash(new_id(), version="1")
    assert read_blocked(store) == {("digits", "1")}
    events = [body for kind, body in store.reports() if kind == "event"]
    assert [(body["code"], body["model"], body["version"]) for body in events] == [
        ("model_quarantined", "digits", "1")
    ]
    store.crash(new_id(), version="1")
    assert len([kind for kind, _ in store.reports() if kind == "event"]) == 1


def test_crashes_over_more_than_ten_minutes_do_not_add_up(store: Store) -> None:
    for _ in range(6):
        store.crash(new_id())
        store.clock.advance(5 * 60_000)
    assert read_blocked(store) == set()


def test_crashes_from_before_the_clock_was_set_back_do_not_add_up(store: Store) -> None:
    for _ in range(2):
        store.crash(new_id())
    store.clock.wall -= 365 * DAY_MS
    store.crash(new_id())
    assert read_blocked(store) == set()


def test_crash_that_is_reported_again_counts_once(store: Store) -> None:
    for _ in range(5):
        store.crash("task-1")
    assert read_blocked(store) == set()


def test_released_version_has_three_crashes_before_it_again(store: Store) -> None:
    for _ in range(3):
        store.crash(new_id())
    assert store.run(lambda tx: quarantine.release(tx, "digits", "1"))
    assert not store.run(lambda tx: quarantine.release(tx, "digits", "1"))
    for _ in range(2):
        store.crash(new_id())
    assert read_blocked(store) == set()
    store.crash(new_id())
    assert read_blocked(store) == {("digits", "1")}


# --- order ---

AGING_MS = 60_000


def take_one(store: Store) -> str:
    """Dispatch the job that is next and end it."""
    with transaction(store.engine) as tx:
        [job] = store.ledger.schedule.find_ready(tx, Lane.INFERENCE, 1)
        store.ledger.schedule.assign(tx, [(new_id(), [job])])
    store.finish(job.job_id, job.attempt + 1)
    return job.job_id


@pytest.mark.parametrize("low", range(9))
def test_waiting_job_gains_a_level_of_priority_each_aging_time(store: Store, low: int) -> None:
    old = store.accept(priority=low)
    store.clock.advance((9 - low) * AGING_MS - 1)
    urgent = store.accept(priority=9)
    store.clock.advance(1)
    late = store.accept(priority=9)
    assert [take_one(store) for _ in range(3)] == [urgent, old, late]


def test_nothing_waits_for_ever_behind_a_stream_of_urgent_jobs(store: Store) -> None:
    patient = store.accept(priority=0)
    urgent_before = 0
    while urgent_before < 1000:
        store.accept(priority=9)
        store.clock.advance(AGING_MS // 60)
        if take_one(store) == patient:
            break
        urgent_before += 1
    assert urgent_before == 9 * 60


@pytest.mark.parametrize("reboot", [True, False])
def test_order_survives_reopening(tmp_path: Path, reboot: bool) -> None:
    path, clock = tmp_path / "ledger.db", FakeClock()
    store = Store(path, clock)
    ids = []
    for priority in (5, 0, 9, 5):
        ids.append(store.accept(priority=priority))
        clock.advance(10)
    store.close()
    if reboot:
        clock.boot, clock.boot_name = 0, "boot-2"
    for _ in range(3):
        store = Store(path, clock)
        store.close()
    store = Store(path, clock)
    ids += [store.accept(priority=5), store.accept(priority=9)]
    assert [take_one(store) for _ in ids] == [ids[n] for n in (2, 5, 0, 3, 4, 1)]
    store.close()


def test_jobs_of_a_dead_boot_stay_before_their_equals_of_many_boots(tmp_path: Path) -> None:
    path, clock = tmp_path / "ledger.db", FakeClock()
    ids = []
    for number in range(6):
        clock.boot, clock.boot_name = 10, f"boot-{number}"
        store = Store(path, clock)
        ids.append(store.accept())
        clock.advance(5)
        ids.append(store.accept())
        store.close()
    store = Store(path, clock)
    assert [take_one(store) for _ in ids] == ids
    store.close()


# --- progress ---


def read_progress(store: Store) -> list[dict[str, Any]]:
    return [body for kind, body in store.reports() if kind == "progress"]


def test_progress_waits_as_its_newest_only_and_moves_its_job_to_running(store: Store) -> None:
    job_id = store.accept()
    store.dispatch()
    for done in (1, 2, 3):
        store.progress(job_id, 1, done)
    [body] = read_progress(store)
    step = {"done": 3, "total": 9, "unit": "files", "eta_s": None}
    assert body == {"job_id": job_id, "attempt": 1, **step}
    assert store.history(job_id) == [(1, "queued"), (2, "running")]


def test_progress_on_the_wire_is_not_changed(store: Store) -> None:
    job_id = store.accept()
    store.dispatch()
    store.progress(job_id, 1, 1)
    store.take()
    store.progress(job_id, 1, 2)
    store.progress(job_id, 1, 3)
    assert [body["done"] for body in read_progress(store)] == [1, 3]


def test_progress_of_an_older_attempt_is_ignored(store: Store) -> None:
    job_id = store.accept()
    store.dispatch("task-1")
    store.requeue("task-1")
    store.dispatch("task-2")
    store.progress(job_id, 1, 5)
    assert read_progress(store) == []
    store.progress(job_id, 2, 1)
    assert [body["attempt"] for body in read_progress(store)] == [2]


@pytest.mark.parametrize("end", ["finished", "cancelled", "never known"])
def test_no_progress_follows_the_end(store: Store, end: str) -> None:
    job_id = store.accept()
    store.dispatch()
    if end == "finished":
        store.finish(job_id)
    elif end == "cancelled":
        store.cancel(job_id)
    store.progress(job_id if end != "never known" else new_id(), 1, 5)
    assert read_progress(store) == []


# --- clocks that jump ---

YEAR_MS = 365 * DAY_MS
JUMPS = {"+1 y": YEAR_MS, "−10 y": -10 * YEAR_MS, "to 1970": None, "not": 0}


def jump(clock: FakeClock, name: str) -> None:
    step = JUMPS[name]
    clock.wall = 0 if step is None else clock.wall + step


@pytest.mark.parametrize("name", JUMPS)
def test_not_before_and_deadline_hold_while_the_wall_clock_jumps(store: Store, name: str) -> None:
    clock = store.clock
    held = store.accept(
        not_before_ms=clock.wall + 10_000, ready_boot_ms=clock.boot + 10_000, priority=9
    )
    late = store.accept(expires_ms=clock.wall + 20_000, expires_boot_ms=clock.boot + 20_000)
    jump(clock, name)
    clock.boot += 9_999
    with transaction(store.engine) as tx:
        ready = store.ledger.schedule.find_ready(tx, Lane.INFERENCE, 9)
    assert [job.job_id for job in ready] == [late]
    clock.boot += 1
    with transaction(store.engine) as tx:
        ready = store.ledger.schedule.find_ready(tx, Lane.INFERENCE, 9)
    assert [job.job_id for job in ready] == [held, late]
    clock.boot += 9_999
    assert store.run(store.ledger.schedule.expire) == []
    clock.boot += 1
    assert [job.job_id for job in store.run(store.ledger.schedule.expire)] == [late]


@pytest.mark.parametrize("name", JUMPS)
def test_agent_that_starts_again_in_the_same_boot_keeps_to_the_boot_clock(
    tmp_path: Path, name: str
) -> None:
    clock = FakeClock()
    store = Store(tmp_path / "ledger.db", clock)
    held = store.accept(not_before_ms=clock.wall + 10_000, ready_boot_ms=clock.boot + 10_000)
    late = store.accept(expires_ms=clock.wall + 20_000, expires_boot_ms=clock.boot + 20_000)
    store.close()
    jump(clock, name)
    store = Store(tmp_path / "ledger.db", clock)
    clock.boot += 10_000
    assert set(store.dispatch()) == {held, late}
    clock.boot += 10_000
    assert [job.job_id for job in store.run(store.ledger.schedule.expire)] == [late]
    store.close()


def test_not_before_and_deadline_are_placed_anew_after_a_reboot(tmp_path: Path) -> None:
    clock = FakeClock()
    store = Store(tmp_path / "ledger.db", clock)
    held = store.accept(not_before_ms=clock.wall + 10_000, ready_boot_ms=clock.boot + 10_000)
    late = store.accept(expires_ms=clock.wall + 20_000, expires_boot_ms=clock.boot + 20_000)
    store.close()
    # Off for 5 s; the boot clock begins at 0.
    clock.wall, clock.boot, clock.boot_name = clock.wall + 5_000, 0, "boot-2"
    store = Store(tmp_path / "ledger.db", clock)
    with transaction(store.engine) as tx:
        ready = store.ledger.schedule.find_ready(tx, Lane.INFERENCE, 9)
    assert [job.job_id for job in ready] == [late]
    clock.advance(5_000)
    with transaction(store.engine) as tx:
        assert len(store.ledger.schedule.find_ready(tx, Lane.INFERENCE, 9)) == 2
    clock.advance(10_000)
    assert [job.job_id for job in store.run(store.ledger.schedule.expire)] == [late]
    assert store.state(held) == ACCEPTED
    store.close()


def test_back_off_ends_with_the_boot_it_was_counted_in(tmp_path: Path) -> None:
    clock = FakeClock()
    store = Store(tmp_path / "ledger.db", clock)
    job_id = store.accept(options='{"retry_delay_s":86400}')
    store.dispatch("task-1")
    store.fail(job_id)
    store.close()
    clock.boot, clock.boot_name = 0, "boot-2"
    store = Store(tmp_path / "ledger.db", clock)
    assert store.dispatch("task-2") == [job_id]
    store.close()
