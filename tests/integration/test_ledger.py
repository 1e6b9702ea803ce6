"""The ledger's rules, on a real SQLite file; each test names the rule it proves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection

from agent.commands import new_id
from agent.jobs import JobState, Lane, Source
from agent.store import outbox
from agent.store.database import transaction
from agent.store.ledger import Verdict
from tests.harness.ledger import BACK_OFF_MS, BODY, Store, make_job


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "ledger.db")
    yield store
    store.engine.dispose()


def test_accepted_job_and_its_report_are_written_together(store: Store) -> None:
    job_id = store.accept()
    assert store.history(job_id) == [(1, "queued")]
    [(kind, body)] = store.reports()
    assert (kind, body["state"], body["rev"]) == ("state", "queued", 1)


def test_rolled_back_transaction_leaves_neither_job_nor_report(store: Store) -> None:
    def fail(tx: Connection) -> None:
        store.ledger.accept(tx, [make_job(new_id())])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.run(fail)
    assert store.reports() == []
    assert store.run(lambda tx: store.ledger.count_open(tx)) == {}


def test_same_id_and_body_again_reports_the_present_state(store: Store) -> None:
    job_id = store.accept()
    store.dispatch()
    store.finish(job_id)
    store.take()
    verdict = store.run(lambda tx: store.ledger.accept(tx, [make_job(job_id)])).verdicts
    assert verdict == [Verdict.DUPLICATE]
    state = [body for kind, body in store.reports() if kind == "state"][-1]
    assert (state["state"], state["rev"]) == ("succeeded", 3)
    assert len(store.history(job_id)) == 3


def test_repeated_state_is_the_same_record_but_for_its_number(store: Store) -> None:
    job_id = store.accept()
    store.dispatch()
    store.finish(job_id)
    store.take()
    store.clock.advance(60_000)
    store.accept(job_id=job_id)
    first, second = [body for kind, body in store.reports() if body.get("state") == "succeeded"]
    assert first == second


def test_same_body_in_another_spelling_is_a_duplicate(store: Store) -> None:
    job_id = store.accept(body='{"a":1,"b":2.0}')
    other = make_job(job_id, body='{"b":2.0, "a":1}', body_hash="hash-2")
    assert store.run(lambda tx: store.ledger.accept(tx, [other])).verdicts == [Verdict.DUPLICATE]


def test_same_id_with_another_body_leaves_the_original_and_an_event(store: Store) -> None:
    job_id = store.accept()
    other = make_job(job_id, body='{"model":"other"}', body_hash="hash-2")
    assert store.run(lambda tx: store.ledger.accept(tx, [other])).verdicts == [Verdict.CONFLICT]
    assert store.job(job_id)["body"] == BODY
    kind, event = store.reports()[-1]
    assert (kind, event["code"], event["job_id"]) == ("event", "id_conflict", job_id)


def test_duplicate_inside_one_batch_meets_the_first(store: Store) -> None:
    job = make_job(new_id())
    verdicts = store.run(lambda tx: store.ledger.accept(tx, [job, job])).verdicts
    assert verdicts == [Verdict.ACCEPTED, Verdict.DUPLICATE]
    assert len(store.history(job.job_id)) == 1


def test_cancel_before_the_submit_leaves_a_tombstone_that_wins(store: Store) -> None:
    job_id = new_id()
    store.run(lambda tx: store.ledger.cancel(tx, [job_id], Source.MQTT))
    assert store.history(job_id) == [(1, "canceled")]
    again = store.run(lambda tx: store.ledger.accept(tx, [make_job(job_id)]))
    assert again.verdicts == [Verdict.DUPLICATE]
    assert store.job(job_id)["state"] == "canceled"


@pytest.mark.parametrize("running", [False, True])
def test_cancel_ends_a_job_that_waits_or_runs_and_its_outcome_is_ignored(
    store: Store, running: bool
) -> None:
    job_id = store.accept()
    store.dispatch()
    if running:
        store.run(lambda tx: store.ledger.record_started(tx, ["task-1"]))
    ended = store.run(lambda tx: store.ledger.cancel(tx, [job_id], Source.MQTT))
    assert [job.state for job in ended] == [JobState.CANCELED]
    assert store.finish(job_id) == 0
    assert store.job(job_id)["state"] == "canceled"


def test_cancel_of_an_ended_job_changes_nothing_and_reports_it(store: Store) -> None:
    job_id = store.accept()
    store.dispatch()
    store.finish(job_id)
    store.take()
    assert store.run(lambda tx: store.ledger.cancel(tx, [job_id], Source.MQTT)) == []
    assert store.reports()[-1][1]["state"] == "succeeded"


def test_attempt_is_written_with_the_task_before_dispatch(store: Store) -> None:
    job_id = store.accept()
    store.dispatch("task-9")
    assert (store.job(job_id)["attempt"], store.job(job_id)["task_id"]) == (1, "task-9")
    assert store.dispatch("task-10") == []


def test_outcome_without_a_notice_of_the_start_passes_through_running(store: Store) -> None:
    job_id = store.accept()
    store.dispatch()
    assert store.finish(job_id) == 1
    assert store.history(job_id) == [(1, "queued"), (2, "running"), (3, "succeeded")]


def test_outcome_of_an_old_attempt_is_fenced(store: Store) -> None:
    job_id = store.accept()
    store.dispatch("task-1")
    store.requeue("task-1")
    store.dispatch("task-2")
    assert store.finish(job_id, attempt=1) == 0
    assert store.job(job_id)["state"] == "queued"
    assert store.finish(job_id, attempt=2) == 1


def test_second_outcome_of_the_same_attempt_adds_no_second_result(store: Store) -> None:
    job_id = store.accept()
    store.dispatch()
    assert store.finish(job_id) == 1
    assert store.finish(job_id) == 0
    assert [kind for kind, _ in store.reports()].count("result") == 1


def test_lost_running_attempt_goes_back_to_the_queue(store: Store) -> None:
    job_id = store.accept()
    store.dispatch()
    store.run(lambda tx: store.ledger.record_started(tx, ["task-1"]))
    store.requeue("task-1")
    assert store.history(job_id) == [(1, "queued"), (2, "running"), (3, "queued")]
    assert store.job(job_id)["reason_code"] == "worker_lost"
    assert store.dispatch("task-2") == [job_id]


def test_attempts_are_bounded(store: Store) -> None:
    job_id = store.accept(max_attempts=3)
    for number in range(3):
        assert store.dispatch(f"task-{number}") == [job_id]
        store.requeue(f"task-{number}")
        store.clock.advance(BACK_OFF_MS)
    assert store.job(job_id)["state"] == "failed"
    assert store.job(job_id)["reason_code"] == "attempts_exhausted"
    assert store.dispatch("task-4") == []


def test_attempt_that_never_ran_does_not_count(store: Store) -> None:
    job_id = store.accept(max_attempts=1)
    for number in range(5):
        store.dispatch(f"task-{number}")
        store.requeue(f"task-{number}", counts=False)
    assert store.job(job_id)["state"] == "queued"


def test_job_that_must_not_run_twice_fails_when_interrupted(store: Store) -> None:
    job_id = store.accept(on_interrupt="fail")
    store.dispatch()
    store.requeue("task-1")
    assert store.job(job_id)["reason_code"] == "interrupted"


def test_urgent_jobs_come_first_and_equal_ones_in_order_of_arrival(store: Store) -> None:
    ids = {
        name: store.accept(priority=priority)
        for name, priority in (("a", 5), ("b", 0), ("c", 9), ("d", 5))
    }
    assert store.dispatch() == [ids[name] for name in "cadb"]


def test_job_waits_for_its_not_before(store: Store) -> None:
    job_id = store.accept(ready_boot_ms=store.clock.boot + 1000)
    assert store.dispatch() == []
    store.clock.advance(1000)
    assert store.dispatch() == [job_id]


def test_deadline_counts_on_the_boot_clock_whatever_the_wall_clock_does(store: Store) -> None:
    job_id = store.accept(
        expires_ms=store.clock.wall + 1000, expires_boot_ms=store.clock.boot + 1000
    )
    store.clock.wall += 10**12
    assert store.run(store.ledger.schedule.expire) == []
    store.clock.wall -= 2 * 10**12
    store.clock.boot += 1000
    assert [job.job_id for job in store.run(store.ledger.schedule.expire)] == [job_id]
    assert store.job(job_id)["state"] == "expired"


def test_deadline_counts_on_the_wall_clock_after_a_reboot(store: Store) -> None:
    job_id = store.accept(
        expires_ms=store.clock.wall + 1000, expires_boot_ms=store.clock.boot + 1000
    )
    store.clock.boot_name, store.clock.boot = "boot-2", 0
    store.run(store.ledger.schedule.begin)
    assert store.run(store.ledger.schedule.expire) == []
    store.clock.advance(1000)
    assert [job.job_id for job in store.run(store.ledger.schedule.expire)] == [job_id]


def test_states_coalesce_until_they_are_on_the_wire_and_never_after(store: Store) -> None:
    first, second = store.accept(), store.accept()
    store.dispatch()
    store.finish(first)
    states = [body for kind, body in store.reports() if kind == "state"]
    assert [(body["job_id"], body["state"]) for body in states] == [
        (first, "succeeded"),
        (second, "queued"),
    ]
    store.take()
    store.finish(second)
    states = [body for kind, body in store.reports() if body.get("job_id") == second]
    assert [body.get("state") for body in states] == ["queued", "succeeded", None]


def test_numbers_on_the_wire_have_no_gaps_whatever_was_coalesced(store: Store) -> None:
    ids = [store.accept() for _ in range(5)]
    store.dispatch()
    for job_id in ids[:3]:
        store.finish(job_id)
    first = store.take(limit=4)
    second = store.take(limit=100)
    assert [record.seq for record in first + second] == list(range(1, 9))


def test_ends_go_before_results_and_states_before_the_end_last(store: Store) -> None:
    waiting, ended = store.accept(), store.accept()
    with transaction(store.engine) as tx:
        ready = store.ledger.schedule.find_ready(tx, Lane.INFERENCE, 10)
        store.ledger.schedule.assign(
            tx, [("task-1", [job for job in ready if job.job_id == ended])]
        )
    store.finish(ended)
    records = store.take()
    assert [record.type for record in records] == ["job.state", "job.result", "job.state"]
    assert ended in records[0].topic
    assert waiting in records[2].topic


def test_stream_of_results_does_not_starve_states_before_the_end(store: Store) -> None:
    store.accept()
    with transaction(store.engine) as tx:
        outbox.add_records(
            tx,
            [
                {
                    "rank": outbox.Rank.RESULT,
                    "kind": "result",
                    "job_id": None,
                    "topic": "t",
                    "type": "job.result",
                    "retained": False,
                    "ttl_s": None,
                    "body": "{}",
                    "created_ms": 0,
                }
            ]
            * 100,
        )
    assert "job.state" in [record.type for record in store.take(limit=16)]


def test_acknowledged_records_are_gone_and_others_stay(store: Store) -> None:
    for _ in range(3):
        store.accept()
    store.take()
    store.run(lambda tx: outbox.delete_acknowledged(tx, [1, 3]))
    kept = store.run(lambda tx: outbox.find_sent(tx, 0, 100, 100))
    assert [record.seq for record in kept] == [2]
