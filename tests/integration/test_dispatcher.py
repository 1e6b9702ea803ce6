"""Tasks on a real queue broker: sent, watched, and given up when nobody has them.

The dispatcher's turns are called one by one, on a clock that tests turn, so
that "not before its time, and then at once" can be said exactly; one test lets
its thread run.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from agent.clock import SystemClock
from agent.commands import hash_text, new_id
from agent.daemon.dispatch import Dispatcher, Task
from agent.daemon.messages import Message, TasksLost, TasksStarted, Wake
from agent.jobs import Lane, Source
from agent.sections import QueueSettings
from agent.store.database import migrate, open_engine, transaction
from agent.store.ledger import Ledger, NewJob
from agent.tasks import HEARTBEAT_PREFIX, heartbeat_key, lane_queue
from agent.topics import Topics
from tests.conftest import wait_until
from tests.harness.brokers import QueueProcess
from tests.harness.clocks import FakeClock

LOST_AFTER_MS = 2500
LANE = lane_queue(Lane.INFERENCE)


class Bench:
    """A dispatcher on a broker, with a client beside it that plays worker and bad luck."""

    def __init__(self, broker: QueueProcess, path: Path) -> None:
        self.broker = broker
        self.clock = FakeClock()
        self.engine: Engine = open_engine(path)
        migrate(self.engine)
        self.ledger = Ledger(Topics("dev"), self.clock)
        self.posted: list[Message] = []
        self.client: Any = broker.client()
        self.dispatcher = self.make_dispatcher()

    def make_dispatcher(self, **changes: Any) -> Dispatcher:
        limits = QueueSettings(lost_after_s=LOST_AFTER_MS / 1000)
        return Dispatcher(
            "dev",
            self.broker.url,
            changes.get("limits", limits),
            self.ledger,
            changes.get("clock", self.clock),
            self.posted.append,
        )

    def check(self) -> None:
        self.dispatcher._check()

    def send(self, count: int = 1) -> list[str]:
        """Send tasks as the thread does with what was handed to it."""
        tasks = [Task(new_id(), Lane.INFERENCE, f'{{"number":{n}}}') for n in range(count)]
        self.dispatcher.send(tasks)
        while not self.dispatcher._to_send.empty():
            task = self.dispatcher._to_send.get()
            assert isinstance(task, Task)
            self.dispatcher._send(task)
        return [task.task_id for task in tasks]

    def queued(self) -> list[str]:
        """Return the ids of the tasks in the lane's list, the oldest first."""
        found = self.client.lrange(LANE, 0, -1)
        return [json.loads(item)["headers"]["id"] for item in reversed(found)]

    def take(self) -> None:
        """Take every task from the broker, as a worker does that reserves them."""
        self.client.delete(LANE)

    def beat(self, worker: str, *held: str, started: tuple[str, ...] = (), slot: str = "s") -> None:
        body = {"worker": worker, "slot": slot, "held": held, "started": started}
        self.client.set(heartbeat_key(slot), json.dumps(body))

    def lost(self) -> list[TasksLost]:
        return [item for item in self.posted if isinstance(item, TasksLost)]

    def wait_limit(self) -> None:
        """Let the time go by after which a task that nobody knows of is lost."""
        self.clock.advance(LOST_AFTER_MS)
        self.check()

    def close(self) -> None:
        self.engine.dispose()
        self.client.close()


@pytest.fixture
def bench(queue_broker: QueueProcess, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(queue_broker, tmp_path / "ledger.db")
    bench.check()
    yield bench
    bench.close()


def test_first_contact_wakes_the_writer_once(bench: Bench) -> None:
    assert bench.posted == [Wake()]
    assert bench.dispatcher.broker.reachable
    bench.check()
    assert bench.posted == [Wake()]


def test_sent_tasks_wait_in_the_list_of_their_lane_in_order(bench: Bench) -> None:
    ids = bench.send(3)
    assert bench.queued() == ids
    assert bench.dispatcher.count_under_way() == 3


def test_task_that_waits_in_the_broker_is_never_lost(bench: Bench) -> None:
    bench.send(2)
    for _ in range(3):
        bench.wait_limit()
    assert bench.lost() == []


def test_task_that_nobody_has_is_lost_at_its_time_and_not_before(bench: Bench) -> None:
    ids = bench.send(2)
    bench.take()
    bench.clock.advance(LOST_AFTER_MS - 1)
    bench.check()
    assert bench.lost() == []
    bench.clock.advance(1)
    bench.check()
    [lost] = bench.lost()
    assert sorted(lost.task_ids) == sorted(ids)
    assert (lost.code, lost.counts) == ("worker_lost", True)
    assert bench.dispatcher.count_under_way() == 0
    bench.wait_limit()
    assert len(bench.lost()) == 1


def test_task_that_a_worker_holds_is_not_lost(bench: Bench) -> None:
    held, dropped = bench.send(2)
    bench.take()
    bench.beat("worker-1", held)
    for _ in range(3):
        bench.wait_limit()
    assert [item.task_ids for item in bench.lost()] == [(dropped,)]


def test_task_whose_worker_says_nothing_of_it_any_more_has_its_time_again(bench: Bench) -> None:
    [task_id] = bench.send()
    bench.take()
    bench.beat("worker-1", task_id)
    bench.wait_limit()
    bench.beat("worker-1")
    bench.check()
    bench.clock.advance(LOST_AFTER_MS - 1)
    bench.check()
    assert bench.lost() == []
    bench.clock.advance(1)
    bench.check()
    assert [item.task_ids for item in bench.lost()] == [(task_id,)]


def test_new_worker_in_the_slot_frees_what_the_old_one_held_at_once(bench: Bench) -> None:
    [task_id] = bench.send()
    bench.take()
    bench.beat("worker-1", task_id)
    bench.check()
    bench.beat("worker-2")
    bench.check()
    [lost] = bench.lost()
    assert (lost.task_ids, lost.code, lost.counts) == ((task_id,), "worker_lost", True)


def test_worker_whose_key_is_gone_frees_what_it_held_at_once(bench: Bench) -> None:
    [task_id] = bench.send()
    bench.take()
    bench.beat("worker-1", task_id)
    bench.check()
    assert bench.dispatcher.count_workers() == 1
    bench.client.delete(heartbeat_key("s"))
    bench.check()
    assert bench.dispatcher.count_workers() == 0
    assert [item.task_ids for item in bench.lost()] == [(task_id,)]


def test_freed_task_that_the_broker_has_again_is_not_lost(bench: Bench) -> None:
    [task_id] = bench.send()
    bench.beat("worker-1", task_id)
    bench.check()
    bench.beat("worker-2")
    bench.check()
    assert bench.lost() == []
    assert bench.queued() == [task_id]


def test_new_worker_that_holds_the_task_keeps_it(bench: Bench) -> None:
    [task_id] = bench.send()
    bench.take()
    bench.beat("worker-1", task_id)
    bench.check()
    bench.beat("worker-2", task_id)
    bench.wait_limit()
    assert bench.lost() == []


def test_task_with_an_outcome_is_not_watched(bench: Bench) -> None:
    [task_id] = bench.send()
    bench.take()
    bench.dispatcher.forget([task_id])
    bench.wait_limit()
    assert bench.lost() == []


def test_task_that_is_not_sent_yet_cannot_be_lost(bench: Bench) -> None:
    bench.dispatcher.send([Task("task-1", Lane.INFERENCE, "{}")])
    bench.wait_limit()
    assert bench.lost() == []


def test_task_of_the_last_run_is_lost_if_nobody_has_it(bench: Bench) -> None:
    [queued] = bench.send()
    again = bench.make_dispatcher()
    again.adopt([(queued, Lane.INFERENCE), ("gone", Lane.INFERENCE)])
    bench.dispatcher = again
    bench.check()
    assert bench.lost() == []
    bench.wait_limit()
    assert [item.task_ids for item in bench.lost()] == [("gone",)]


def test_flushed_broker_has_lost_what_no_worker_holds_and_no_attempt_counts(bench: Bench) -> None:
    held, queued = bench.send(2)
    bench.beat("worker-1", held)
    bench.check()
    bench.client.flushall()
    bench.beat("worker-1", held)
    bench.check()
    [lost] = bench.lost()
    assert (lost.task_ids, lost.code, lost.counts) == ((queued,), "queue_restarted", False)


def test_broker_killed_and_started_again_is_noticed_as_flushed(bench: Bench) -> None:
    [task_id] = bench.send()
    bench.broker.kill()
    bench.check()
    assert not bench.dispatcher.broker.reachable
    bench.broker.start()
    bench.check()
    [lost] = bench.lost()
    assert (lost.task_ids, lost.code, lost.counts) == ((task_id,), "queue_restarted", False)
    assert bench.posted.count(Wake()) == 2
    assert bench.send() == bench.queued()


def test_unreachable_broker_gives_the_task_back_and_ends_selecting(bench: Bench) -> None:
    job = NewJob(new_id(), Source.MQTT, "{}", hash_text("{}"), "infer", Lane.INFERENCE, "digits")
    with transaction(bench.engine) as tx:
        bench.ledger.accept(tx, [job])
    bench.broker.kill()
    [task_id] = bench.send()
    [lost] = bench.lost()
    assert (lost.task_ids, lost.code, lost.counts) == ((task_id,), "queue_unreachable", False)
    assert bench.dispatcher.count_under_way() == 0
    with transaction(bench.engine) as tx:
        assert not bench.dispatcher.select(tx).tasks
    bench.broker.start()
    bench.check()
    with transaction(bench.engine) as tx:
        assert len(bench.dispatcher.select(tx).tasks) == 1


def test_start_of_a_task_is_told_once(bench: Bench) -> None:
    first, second = bench.send(2)
    bench.beat("worker-1", first, second, started=(first,))
    bench.check()
    bench.check()
    bench.beat("worker-1", first, second, started=(first, second))
    bench.check()
    started = [item for item in bench.posted if isinstance(item, TasksStarted)]
    assert [item.task_ids for item in started] == [(first,), (second,)]


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"7",
        b"[]",
        b"{}",
        b'{"worker":"w","slot":"x"}',
        b'{"worker":"w","slot":"x","held":7,"started":[]}',
        b'{"worker":"w","slot":[],"held":[],"started":[]}',
        b'{"worker":"w","slot":"x","held":[[]],"started":[]}',
    ],
)
def test_key_of_somebody_else_among_the_heartbeats_is_ignored(bench: Bench, value: bytes) -> None:
    [task_id] = bench.send()
    bench.take()
    bench.client.set(HEARTBEAT_PREFIX + "foreign", value)
    bench.client.lpush(HEARTBEAT_PREFIX + "list", "x")
    bench.beat("worker-1", task_id)
    bench.wait_limit()
    assert bench.dispatcher.count_workers() == 1
    assert bench.lost() == []
    assert bench.dispatcher.broker.reachable


def test_tasks_of_another_device_on_the_same_broker_are_not_ours(bench: Bench) -> None:
    bench.beat("worker-1", "theirs", started=("theirs",))
    bench.check()
    bench.beat("worker-2")
    bench.wait_limit()
    assert bench.lost() == []
    assert bench.dispatcher.count_under_way() == 0


def test_thread_sends_and_finds_what_is_lost_until_it_is_stopped(bench: Bench) -> None:
    dispatcher = bench.make_dispatcher(clock=SystemClock(), limits=QueueSettings(lost_after_s=0.05))
    dispatcher.start()
    wait_until(lambda: dispatcher.broker.reachable, 10, "the broker is reached")
    dispatcher.send([Task("task-1", Lane.INFERENCE, "{}")])
    wait_until(lambda: bench.queued() == ["task-1"], 10, "the task is sent")
    bench.take()
    wait_until(bench.lost, 20, "the task is found lost")
    assert bench.lost()[0].task_ids == ("task-1",)
    dispatcher.stop()
    assert not dispatcher.is_alive()
