"""What becomes one task: bundles by model and size, windows by lane."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from agent.commands import hash_text, new_id
from agent.daemon.dispatch import Dispatcher, Task, _cut
from agent.daemon.messages import Message
from agent.jobs import Lane, Reason, Source
from agent.sections import QueueSettings
from agent.store.database import migrate, open_engine, transaction
from agent.store.ledger import Ledger, NewJob, ReadyJob
from agent.topics import Topics
from tests.harness.clocks import FakeClock

BODY = '{"x":1}'
OVERHEAD = 256


def make_ready(number: int, *, interruptions: int = 0, body: str = BODY) -> ReadyJob:
    return ReadyJob(
        seq=number,
        job_id=f"job-{number}",
        attempt=0,
        interruptions=interruptions,
        handler="infer",
        model="digits",
        version=None,
        run_timeout_s=120.0,
        created_ms=0,
        body_hash=hash_text(body),
        options=None,
        body=body.encode(),
    )


def cut(jobs: list[ReadyJob], size: int = 3, max_bytes: int = 10_000) -> list[list[int]]:
    return [[job.seq for job in bundle] for bundle in _cut(jobs, size, max_bytes)]


class Bench:
    """A dispatcher that is never started, on a real ledger, with a broker said to be there."""

    def __init__(self, path: Path, **limits: Any) -> None:
        self.clock = FakeClock()
        self.engine: Engine = open_engine(path)
        migrate(self.engine)
        self.ledger = Ledger(Topics("dev"), self.clock)
        self.posted: list[Message] = []
        self.dispatcher = Dispatcher(
            "dev",
            "redis+socket:///nowhere.sock",
            QueueSettings(**limits),
            self.ledger,
            self.clock,
            self.posted.append,
        )
        self.dispatcher.broker.reachable = True

    def accept(self, count: int = 1, **changes: Any) -> list[str]:
        body = str(changes.get("body", BODY))
        job = NewJob("", Source.MQTT, body, hash_text(body), "infer", Lane.INFERENCE, "digits")
        jobs = [job._replace(job_id=new_id(), **changes) for _ in range(count)]
        with transaction(self.engine) as tx:
            self.ledger.accept(tx, jobs)
        return [job.job_id for job in jobs]

    def select(self) -> list[Task]:
        with transaction(self.engine) as tx:
            return list(self.dispatcher.select(tx).tasks)

    def feed(self) -> None:
        """Put so many tasks under way that the workers have enough to do."""
        self.dispatcher.send(Task(f"busy-{number}", Lane.INFERENCE, "") for number in range(4))

    def lose(self, task_ids: list[str]) -> None:
        with transaction(self.engine) as tx:
            self.ledger.requeue(tx, task_ids, Reason("worker_lost"), counts=True)
        self.dispatcher.forget(task_ids)

    def tasks(self) -> dict[str, tuple[Lane, int, int]]:
        with transaction(self.engine) as tx:
            return self.ledger.find_tasks(tx)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def make(path: Path) -> Iterator[Any]:
    made: list[Bench] = []

    def build(**limits: Any) -> Bench:
        made.append(Bench(path, **limits))
        return made[-1]

    yield build
    for bench in made:
        bench.engine.dispose()


def read(task: Task) -> Any:
    return json.loads(task.payload)


def sizes(tasks: list[Task]) -> list[int]:
    return [len(read(task)["jobs"]) for task in tasks]


def test_jobs_are_cut_into_bundles_of_the_size_in_order() -> None:
    assert cut([make_ready(number) for number in range(7)]) == [[0, 1, 2], [3, 4, 5], [6]]


def test_no_jobs_make_no_bundle() -> None:
    assert cut([]) == []


def test_interrupted_job_goes_alone_wherever_it_stands() -> None:
    for at, expected in (
        (0, [[0], [1, 2, 3], [4]]),
        (1, [[0], [1], [2, 3, 4]]),
        (2, [[0, 1], [2], [3, 4]]),
        (4, [[0, 1, 2], [3], [4]]),
    ):
        jobs = [make_ready(number, interruptions=int(number == at)) for number in range(5)]
        assert cut(jobs) == expected


def test_bundle_has_at_most_its_bytes_and_always_one_job() -> None:
    cost = len(BODY) + OVERHEAD
    jobs = [make_ready(number) for number in range(4)]
    assert cut(jobs, max_bytes=2 * cost) == [[0, 1], [2, 3]]
    assert cut(jobs, max_bytes=2 * cost - 1) == [[0], [1], [2], [3]]
    large = make_ready(9, body="x" * 5000)
    assert cut([jobs[0], large, jobs[1]], max_bytes=2 * cost) == [[0], [9], [1]]


def test_task_carries_all_that_its_worker_needs(make: Any) -> None:
    bench = make()
    [job_id] = bench.accept(run_timeout_s=7.5, version="2", body='{"input":{"data_b64":"é"}}')
    [task] = bench.select()
    assert read(task) == {
        "v": 1,
        "task": task.task_id,
        "device": "dev",
        "reply": "outcomes.dev",
        "handler": "infer",
        "model": "digits",
        "version": "2",
        "jobs": [
            {
                "id": job_id,
                "attempt": 1,
                "timeout_s": 7.5,
                "progress_timeout_s": None,
                "body": {"input": {"data_b64": "é"}},
            }
        ],
    }


def test_selected_jobs_are_in_the_ledger_as_under_way_before_they_are_sent(make: Any) -> None:
    bench = make()
    bench.accept(8)
    tasks = bench.select()
    assert {task: jobs for task, (_, jobs, _) in bench.tasks().items()} == {
        task.task_id: 2 for task in tasks
    }
    assert bench.dispatcher.count_under_way() == 0
    assert bench.select() == []


def test_few_jobs_are_spread_over_tasks_while_the_workers_are_idle(make: Any) -> None:
    for count, expected in ((1, [1]), (3, [1, 1, 1]), (8, [2, 2, 2, 2]), (9, [3, 3, 3])):
        bench = make(window_tasks=64)
        ids = bench.accept(count)
        tasks = bench.select()
        assert sizes(tasks) == expected
        assert [job["id"] for task in tasks for job in read(task)["jobs"]] == ids


def test_bundle_has_at_most_its_jobs(make: Any) -> None:
    bench = make(bundle_jobs=5)
    bench.accept(100)
    tasks = bench.select()
    assert max(sizes(tasks)) == 5


@pytest.mark.parametrize(("spare", "expected"), [(0, [2] * 8), (-1, [1] * 16), (1, [2] * 8)])
def test_bundle_of_a_task_has_at_most_its_bytes(make: Any, spare: int, expected: list[int]) -> None:
    body = '"' + "x" * 600 + '"'
    bench = make(bundle_bytes=2 * (len(body) + OVERHEAD) + spare)
    bench.accept(16, body=body)
    assert sizes(bench.select()) == expected


def test_window_bounds_the_tasks_of_a_lane_and_opens_with_each_end(make: Any) -> None:
    bench = make(window_tasks=3, bundle_jobs=2)
    bench.accept(100)
    tasks = bench.select()
    assert sizes(tasks) == [2, 2, 2]
    bench.dispatcher.send(tasks)
    assert bench.select() == []
    bench.dispatcher.forget([tasks[0].task_id])
    assert len(bench.select()) == 1


def test_full_window_of_one_lane_does_not_close_another(make: Any) -> None:
    bench = make(window_tasks=1)
    bench.accept()
    bench.dispatcher.send(bench.select())
    bench.accept()
    bench.accept(lane=Lane.BATCH)
    assert [task.lane for task in bench.select()] == [Lane.BATCH]


def test_tasks_taken_over_from_the_last_run_count_in_the_window(make: Any) -> None:
    bench = make(window_tasks=2)
    bench.dispatcher.adopt([("old-1", Lane.INFERENCE), ("old-2", Lane.INFERENCE)])
    bench.accept(lane=Lane.INFERENCE)
    assert bench.dispatcher.count_under_way() == 2
    assert bench.select() == []


def test_interrupted_job_travels_alone(make: Any) -> None:
    bench = make()
    ids = bench.accept(16)
    tasks = bench.select()
    assert sizes(tasks) == [4, 4, 4, 4]
    bench.lose([tasks[1].task_id])
    again = bench.select()
    assert sizes(again) == [1, 1, 1, 1]
    assert [read(task)["jobs"][0]["id"] for task in again] == ids[4:8]
    assert {read(task)["jobs"][0]["attempt"] for task in again} == {2}


def test_models_versions_and_handlers_are_not_mixed(make: Any) -> None:
    bench = make()
    kinds = [
        {"model": "digits"},
        {"model": "cats"},
        {"model": "digits", "version": "1"},
        {"model": "digits", "handler": "infer.batch"},
    ]
    for kind in kinds * 2:
        bench.accept(**kind)
    bench.feed()
    bench.clock.advance(1000)
    tasks = bench.select()
    assert sizes(tasks) == [2, 2, 2, 2]
    assert [
        (read(task)["model"], read(task)["version"], read(task)["handler"]) for task in tasks
    ] == [
        ("digits", None, "infer"),
        ("cats", None, "infer"),
        ("digits", "1", "infer"),
        ("digits", None, "infer.batch"),
    ]


def test_bundle_that_is_not_full_grows_a_moment_while_the_workers_are_busy(make: Any) -> None:
    bench = make(bundle_jobs=4)
    bench.accept(6)
    bench.feed()
    assert sizes(bench.select()) == [4]
    bench.clock.advance(49)
    assert bench.select() == []
    bench.accept(1)
    bench.clock.advance(1)
    assert sizes(bench.select()) == [3]


def test_clock_that_was_set_back_holds_no_job(make: Any) -> None:
    bench = make(bundle_jobs=4)
    bench.accept()
    bench.feed()
    bench.clock.wall -= 3_600_000
    assert sizes(bench.select()) == [1]


def test_slow_model_has_small_bundles(make: Any) -> None:
    bench = make(bundle_jobs=32)
    bench.accept(64)
    bench.dispatcher.observe_speed("digits", 100)
    assert max(sizes(bench.select())) == 2
    other = make(bundle_jobs=32)
    other.lose(list(other.tasks()))
    other.accept(64, model="slower")
    other.dispatcher.observe_speed("slower", 10_000)
    assert max(sizes(other.select())) == 1


def test_nothing_is_selected_while_the_broker_is_away(make: Any) -> None:
    bench = make()
    bench.accept()
    bench.dispatcher.broker.reachable = False
    assert bench.select() == []
    assert bench.tasks() == {}
    bench.dispatcher.broker.reachable = True
    assert sizes(bench.select()) == [1]
