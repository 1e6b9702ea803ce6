"""Stopping real runs of ONNX Runtime from another thread: who is meant stops, no one else."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.tiny_model import write_tiny_model
from platforms.errors import RunStoppedError
from platforms.runtimes.base import LoadOptions, RunStop
from platforms.runtimes.registry import get_runtime
from tests.harness.known_box import describe_box
from tests.harness.models import write_endless_model
from tests.harness.waiting import wait_until
from worker.engine.control import InferError, JobIds, RunControl
from worker.engine.engine import Engine, InferOutcome, InferRequest
from worker.processing.step import JobInput

FOR_EVER = 2**62
CANCELED = InferError("canceled", "no longer wanted", retryable=False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    spec = describe_box()
    return Engine(spec)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    write_endless_model(tmp_path / "endless" / "1")
    return tmp_path / "endless" / "1"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def ask(job_id: str, times: int) -> InferRequest:
    tensor = {"name": "x", "datatype": "INT64", "shape": [1], "data": [times]}
    return InferRequest(job_id, JobInput(tensors=[tensor]))


def is_at(control: RunControl, *job_ids: str) -> Callable[[], bool]:
    # With a switch, so in the run itself and no longer on the way to it.
    return lambda: control.see().job_ids == job_ids and control._stop is not None


def find_codes(outcomes: list[InferOutcome]) -> list[str]:
    return [one.error.code if one.error else "ok" for one in outcomes]


def test_switch_ends_a_run_in_another_thread_and_the_session_lives_on(
    endless: Path, pool: ThreadPoolExecutor
) -> None:
    session = get_runtime("ort").load(endless / "model.onnx", LoadOptions(threads=1))
    stop, begun = RunStop(), threading.Event()

    def run() -> Any:
        begun.set()
        return session.run({"x": np.array([FOR_EVER])}, stop)

    running = pool.submit(run)
    assert begun.wait(10)
    stop.set()
    with pytest.raises(RunStoppedError):
        running.result(10)
    assert session.run({"x": np.array([3])}, RunStop())["y"].tolist() == [3]


def test_switch_that_was_set_before_lets_no_run_begin(endless: Path) -> None:
    session = get_runtime("ort").load(endless / "model.onnx", LoadOptions(threads=1))
    stop = RunStop()
    stop.set()
    stop.set()
    with pytest.raises(RunStoppedError):
        session.run({"x": np.array([FOR_EVER])}, stop)


def test_switch_set_between_the_check_and_the_run_is_seen() -> None:
    stop, ended = RunStop(), []
    stop.set()
    stop.connect(lambda: ended.append(1))
    assert ended == [1]


def test_job_stopped_in_its_run_leaves_its_neighbours_alone(
    engine: Engine, endless: Path, pool: ThreadPoolExecutor
) -> None:
    control = RunControl()
    requests = [ask("a", 1), ask("b", FOR_EVER), ask("c", 2)]
    running = pool.submit(engine.infer, endless, requests, control)
    wait_until(is_at(control, "b"), 30, "the endless job runs")
    control.stop(["b"], CANCELED)
    assert find_codes(running.result(30)) == ["ok", "canceled", "ok"]


def test_job_stopped_before_its_turn_never_runs(
    engine: Engine, endless: Path, pool: ThreadPoolExecutor
) -> None:
    control = RunControl()
    requests = [ask("a", FOR_EVER), ask("b", FOR_EVER)]
    running = pool.submit(engine.infer, endless, requests, control)
    wait_until(is_at(control, "a"), 30, "the first runs")
    control.stop(["b"], CANCELED)
    control.stop(["a"], CANCELED)
    outcomes = running.result(30)
    assert find_codes(outcomes) == ["canceled", "canceled"]
    assert outcomes[1].infer_ms == 0


def test_stop_for_one_of_a_stacked_run_lets_the_others_run_again(
    engine: Engine, tmp_path: Path
) -> None:
    """The stop comes at the moment the stacked run begins: the earliest that can hit it."""
    write_tiny_model(tmp_path / "tiny" / "1")
    entered: list[JobIds] = []

    def watch(job_ids: JobIds, is_loading: bool) -> None:
        entered.append(job_ids)
        if len(job_ids) == 3 and not is_loading:
            control.stop(["b"], CANCELED)

    control = RunControl(watch)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}
    requests = [InferRequest(job_id, JobInput(tensors=[tensor])) for job_id in "abc"]
    outcomes = engine.infer(tmp_path / "tiny" / "1", requests, control)
    assert find_codes(outcomes) == ["ok", "canceled", "ok"]
    assert [one.batch_rows for one in outcomes] == [2, 0, 2]
    assert ("a", "c") in entered


def test_interrupted_stack_runs_one_by_one(engine: Engine, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny" / "1")

    class Impatient(RunControl):
        def begin(self) -> RunStop:
            stop = super().begin()
            if len(self.see().job_ids) > 1:
                self.interrupt(self.see())
            return stop

    control = Impatient()
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.5] * 64}
    requests = [InferRequest(job_id, JobInput(tensors=[tensor])) for job_id in "ab"]
    outcomes = engine.infer(tmp_path / "tiny" / "1", requests, control)
    assert find_codes(outcomes) == ["ok", "ok"]
    assert [one.batch_rows for one in outcomes] == [1, 1]


def test_interruption_meant_for_an_earlier_run_does_not_reach_the_next() -> None:
    control = RunControl()
    control.enter("ab")
    seen = control.see()
    control.enter("ab")
    stop = control.begin()
    control.interrupt(seen)
    assert not stop.is_set


def test_time_beside_others_is_nobody_s_and_time_alone_adds_up() -> None:
    control = RunControl()
    control.enter("a")
    control.enter("ab")
    control.enter("a")
    first = control.see().spent_s
    assert first > 0
    control.enter("b")
    assert control.see().spent_s == 0
    control.enter("a")
    assert control.see().spent_s > first


def test_many_stops_at_random_moments_lose_no_job(
    engine: Engine, endless: Path, pool: ThreadPoolExecutor
) -> None:
    for _ in range(20):
        control = RunControl()
        requests = [ask(str(n), 200) for n in range(10)]
        running: Future[Any] = pool.submit(engine.infer, endless, requests, control)
        for n in range(0, 10, 2):
            control.stop([str(n)], CANCELED)
        codes = find_codes(running.result(30))
        assert codes[1::2] == ["ok"] * 5
        assert set(codes[::2]) <= {"ok", "canceled"}
