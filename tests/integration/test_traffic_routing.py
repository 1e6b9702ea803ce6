"""One traffic for requests and jobs: shares, shadow, fallback; by the engine on real models."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from agent.config import Settings
from agent.errors import AgentError
from agent.repository import ModelRepository
from agent.tasks import VersionFigures
from agent.traffic import Traffic, write_traffic
from platforms.errors import PlatformError
from platforms.spec import PlatformSpec
from tests.harness.known_box import describe_box
from tests.harness.waiting import wait_until
from tests.integration.test_serving import X, add_scale, ask, write_scale
from worker.engine.costs import CostPolicy
from worker.engine.engine import Engine, ServedModel
from worker.engine.routing import TrafficRouter
from worker.engine.service import TensorResponse
from worker.engine.serving import EngineService
from worker.engine.sessions import LoadedModel, ModelKey
from worker.engine.shadow import Shadow, is_alike
from worker.engine.watch import EngineWatch
from worker.errors import WorkerError
from worker.metrics import ShadowCollector
from worker.runner import Runner
from worker.runs import Run


@pytest.fixture(scope="module")
def spec() -> PlatformSpec:
    return describe_box()


class Bench:
    """An engine with two versions of a model, and both ways into it."""

    def __init__(self, tmp_path: Path, spec: PlatformSpec) -> None:
        self.tmp_path = tmp_path
        self.settings = Settings(data_dir=tmp_path)
        self.repository = ModelRepository(self.settings.models_dir)
        self.engine = Engine(spec, instances=2, costs=CostPolicy(budget_s=0.05))
        self.router = TrafficRouter(self.settings.models_dir)
        self.shadow = Shadow(self.open_version)
        self.service = EngineService(
            self.engine, self.repository, router=self.router, shadow=self.shadow
        )
        self.runner = Runner(self.settings, lambda: self.engine, self.router, self.shadow)
        self.watch = EngineWatch(self.engine, self.router, self.shadow)
        add_scale(self.repository, tmp_path, 1.0)
        add_scale(self.repository, tmp_path, 2.0, activate=False)

    def open_version(self, model: str, version: str) -> tuple[ServedModel, LoadedModel]:
        key = ModelKey.from_folder(self.repository.get_folder(model, version))
        loaded = self.engine.load_key(key)
        return self.engine.get_served(key, loaded), loaded

    def share(self, traffic: Traffic | None) -> None:
        write_traffic(self.settings.models_dir / "scale", traffic)
        self.router._known.clear()
        if traffic is not None:
            # Nobody waits for a version to load, so that one is not in its share until it has.
            for number in traffic.shares:
                with suppress(AgentError, PlatformError, WorkerError):
                    self.open_version("scale", str(number))
                self.service._is_at_hand("scale", str(number))

    def answer(self, **options: Any) -> TensorResponse:
        request = ask(**options)
        return self.service.infer_inline(request) or asyncio.run(self.service.infer(request))

    def run_jobs(self, *ids: str, **body: Any) -> list[dict[str, Any]]:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}
        jobs = [
            {"id": one, "attempt": 1, "body": {"input": {"tensors": [tensor]}, **body}}
            for one in ids
        ]
        task = {"task": "t", "model": "scale", "version": None, "reply": "r", "jobs": jobs}
        return self.runner.run(Run(task, None, lambda _task, _job: None))

    def get_figures(self, version: str) -> VersionFigures:
        found = self.watch.read()
        assert found is not None
        return next(one for one in found[1] if one.version == version)

    def break_version(self, number: int) -> None:
        """Let a version load and fail at every run."""
        (self.settings.models_dir / "scale" / str(number) / "model.onnx").unlink()


@pytest.fixture
def bench(tmp_path: Path, spec: PlatformSpec) -> Iterator[Bench]:
    bench = Bench(tmp_path, spec)
    yield bench
    bench.service.close()


def test_without_a_file_the_active_version_answers_everybody(bench: Bench) -> None:
    assert {bench.answer().version for _ in range(20)} == {"1"}
    assert bench.watch.read() is None


def test_requests_and_jobs_share_one_traffic_by_the_same_keys(bench: Bench) -> None:
    bench.share(Traffic(shares={2: 30.0}))
    keys = [f"user {n}" for n in range(100)]
    by_request = [bench.answer(key=key).version for key in keys]
    by_job = [str(bench.run_jobs("a", key=key)[0]["result"]["version"]) for key in keys]
    assert by_request == by_job
    assert 15 < by_request.count("2") < 45


def test_answer_is_that_of_the_version_that_it_names(bench: Bench) -> None:
    bench.share(Traffic(shares={2: 50.0}))
    for _ in range(40):
        found = bench.answer()
        assert np.array_equal(found.outputs["y"], X * float(found.version))


def test_jobs_of_one_bundle_go_to_both_versions(bench: Bench) -> None:
    bench.share(Traffic(shares={2: 50.0}))
    outcomes = bench.run_jobs(*[f"job {n}" for n in range(64)])
    assert [one["id"] for one in outcomes] == [f"job {n}" for n in range(64)]
    versions = Counter(one["result"]["version"] for one in outcomes)
    assert set(versions) == {1, 2}
    for one in outcomes:
        first = one["result"]["output"]["outputs"][0]["data"]
        assert first == [1.0 * one["result"]["version"], 2.0 * one["result"]["version"]]


def test_retried_job_meets_the_same_version(bench: Bench) -> None:
    bench.share(Traffic(shares={2: 50.0}))
    for job_id in ("a", "b", "c", "d"):
        versions = {bench.run_jobs(job_id)[0]["result"]["version"] for _ in range(3)}
        assert len(versions) == 1


def test_request_that_names_a_version_gets_it(bench: Bench) -> None:
    bench.share(Traffic(shares={2: 100.0}))
    assert bench.answer().version == "2"
    assert bench.answer(version="1").version == "1"


def test_candidate_that_does_not_load_fails_nobody(bench: Bench) -> None:
    bench.break_version(2)
    bench.share(Traffic(shares={2: 50.0}, watch=(2,)))
    assert {bench.answer().version for _ in range(20)} == {"1"}
    outcomes = bench.run_jobs(*[f"job {n}" for n in range(16)])
    assert {one["state"] for one in outcomes} == {"succeeded"}
    assert {one["result"]["version"] for one in outcomes} == {1}
    assert bench.get_figures("2").failed >= 1


def test_active_version_that_fails_is_stood_in_for_by_the_fallback(bench: Bench) -> None:
    bench.repository.activate("scale", "2")
    bench.break_version(2)
    bench.share(Traffic(fallback=1, keep=(1,), watch=(2,)))
    assert {bench.answer().version for _ in range(10)} == {"1"}
    assert bench.run_jobs("a")[0]["result"]["version"] == 1
    assert bench.get_figures("2").failed >= 1


def test_nobody_waits_for_a_candidate_to_load(bench: Bench) -> None:
    assert bench.answer().version == "1"
    write_traffic(bench.settings.models_dir / "scale", Traffic(shares={2: 100.0}))
    bench.router._known.clear()
    assert bench.answer().version == "1"
    wait_until(lambda: bench.answer().version == "2", 10, "the candidate is loaded")


def test_fault_of_the_request_is_no_fault_of_the_candidate(bench: Bench) -> None:
    bench.share(Traffic(shares={2: 100.0}, watch=(2,)))
    bench.answer()
    wrong = np.zeros((1, 7), np.float32)
    for _ in range(5):
        with pytest.raises(Exception, match="x"):
            bench.answer(x=wrong)
    figures = bench.get_figures("2")
    assert (figures.success, figures.failed) == (1, 0)


def test_shadow_sees_copies_and_nobody_gets_its_answers(bench: Bench) -> None:
    add_scale(bench.repository, bench.tmp_path, -1.0, activate=False)
    bench.share(Traffic(shadow=3, watch=(1, 3)))
    for _ in range(20):
        assert bench.answer(x=np.array([[1, 2]], np.float32)).version == "1"
    bench.run_jobs("a", "b")
    wait_until(lambda: bench.shadow.read("scale", "3").compared >= 1, 10, "no copy was compared")
    figures = bench.get_figures("3")
    assert figures.agreed == 0
    assert figures.shadow_failed == 0
    registry = CollectorRegistry()
    registry.register(ShadowCollector(bench.shadow))
    labels = {"model": "scale", "version": "3"}
    read = registry.get_sample_value
    assert (read("edgeward_shadow_compared_total", labels) or 0) >= figures.compared
    assert read("edgeward_shadow_agreed_total", labels) == 0


def test_shadow_that_answers_alike_agrees(bench: Bench) -> None:
    source = write_scale(bench.tmp_path / "again", 1.0)
    bench.repository.add(source, activate=False)
    bench.share(Traffic(shadow=3, watch=(3,)))
    bench.answer()
    wait_until(lambda: bench.shadow.read("scale", "3").compared == 1, 10, "no copy was compared")
    assert bench.shadow.read("scale", "3").agreed == 1


def test_shadow_that_does_not_load_costs_nothing_but_its_count(bench: Bench) -> None:
    bench.break_version(2)
    bench.share(Traffic(shadow=2, watch=(2,)))
    assert bench.answer().version == "1"
    wait_until(lambda: bench.shadow.read("scale", "2").failed == 1, 10, "it was not tried")


def test_classes_decide_whether_answers_are_alike() -> None:
    right = {"y": np.array([[0.1, 0.9]], np.float32)}
    assert is_alike(right, {"y": np.array([[0.4, 0.6]], np.float32)})
    assert not is_alike(right, {"y": np.array([[0.6, 0.4]], np.float32)})
    assert not is_alike(right, {"z": right["y"]})
    assert not is_alike(right, {"y": np.zeros((1, 3), np.float32)})


def test_run_that_lasts_too_long_is_found(bench: Bench) -> None:
    bench.share(Traffic(shares={2: 100.0}, watch=(2,), hang_s=0.05))
    bench.answer()
    assert bench.watch.find_hung() is None
    served, _ = bench.open_version("scale", "2")
    with served.batcher.acquire():
        wait_until(lambda: bench.watch.find_hung() is not None, 10, "it was not found")
        hung = bench.watch.find_hung()
        assert hung is not None
        assert (hung.model, hung.version) == ("scale", "2")
    assert bench.watch.find_hung() is None


def test_latencies_are_told_by_version(bench: Bench) -> None:
    bench.share(Traffic(shares={2: 50.0}, watch=(1, 2)))
    for _ in range(50):
        bench.answer()
    found = [bench.get_figures(version) for version in ("1", "2")]
    assert sum(figures.success for figures in found) == 50
    for figures in found:
        assert sum(figures.latencies.values()) == figures.success >= 20
        json.dumps(figures.model_dump())
