"""What the ledger promises, case by case: dedupe, retries, crashes, order, time, progress.

The expected ends are typed out from docs/protocol.md, "Jobs".
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.commands import new_id
from agent.jobs import JobState
from agent.store.ledger import Verdict
from tests.harness.ledger import BACK_OFF_MS, Store, make_job


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "ledger.db")
    yield store
    store.close()


# --- defects that were found, each with its story -------------------------------------------


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
