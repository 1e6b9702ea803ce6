"""The service with real models in a real repository: versions, loads, switches, the three ways."""

import asyncio
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.errors import ModelNotFoundError, VersionNotFoundError
from agent.manifest import TensorEntry
from agent.repository import ModelRepository
from benchmarks.nets import write_cnn_version, write_mlp_version
from benchmarks.tiny_model import write_version
from console.models.train_digits import FOLDER as DIGITS
from platforms.artifact import Datatype
from platforms.errors import TensorError
from platforms.runtimes.base import Array
from platforms.spec import PlatformSpec
from tests.harness.known_box import describe_box
from tests.harness.models import write_endless_model
from tests.harness.waiting import wait_until
from worker.engine.batcher import BatchOptions, WaitRules
from worker.engine.control import InferError, RunControl
from worker.engine.costs import CostPolicy
from worker.engine.engine import Engine, InferRequest
from worker.engine.service import ModelStatus, Service, TensorRequest, TensorResponse
from worker.engine.serving import EngineService
from worker.engine.sessions import LoadedModel
from worker.errors import ModelUnavailableError, RequestRejectedError
from worker.processing.step import JobInput

X = np.array([[1, 2]], np.float32)
FOR_EVER = np.array([2**62])


@pytest.fixture(scope="module")
def spec() -> PlatformSpec:
    return describe_box()


@pytest.fixture
def repository(tmp_path: Path) -> ModelRepository:
    return ModelRepository(tmp_path / "models")


@pytest.fixture
def engine(spec: PlatformSpec) -> Engine:
    return Engine(spec, instances=2)


@pytest.fixture
def service(engine: Engine, repository: ModelRepository) -> Iterator[EngineService]:
    service = EngineService(engine, repository)
    yield service
    service.close()


def write_scale(folder: Path, factor: float, name: str = "scale") -> Path:
    """Write a version folder of `y = factor · x`, float32[N, 2]."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "f"], ["y"])],
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(np.array([factor], np.float32), "f")],
    )
    x, y = (TensorEntry(name=one, datatype=Datatype.FP32, shape=(-1, 2)) for one in "xy")
    write_version(folder, name, graph, (x, y))
    return folder


def add_scale(repository: ModelRepository, tmp_path: Path, factor: float, **options: Any) -> str:
    source = write_scale(tmp_path / "source" / str(factor), factor)
    return str(repository.add(source, **options).number)


def ask(model: str = "scale", x: Array = X, **options: Any) -> TensorRequest:
    return TensorRequest(model, {"x": x}, **options)


def infer(service: EngineService, request: TensorRequest) -> TensorResponse:
    return asyncio.run(service.infer(request))


def answer(service: EngineService, request: TensorRequest) -> TensorResponse:
    """Answer as a front end does."""
    return service.infer_inline(request) or infer(service, request)


def test_engine_service_is_a_service(service: Service) -> None:
    assert service.is_ready()


def test_request_loads_the_active_version_and_is_answered(
    service: EngineService, repository: ModelRepository, tmp_path: Path
) -> None:
    number = add_scale(repository, tmp_path, 3)
    response = infer(service, ask())
    assert (response.model, response.version, response.is_cached) == ("scale", number, False)
    assert response.outputs["y"].tolist() == [[3, 6]]


def test_version_is_taken_by_number(
    service: EngineService, repository: ModelRepository, tmp_path: Path
) -> None:
    for factor in (3, 4):
        add_scale(repository, tmp_path, factor)
    answers = {n: infer(service, ask(version=n)).outputs["y"].tolist() for n in ("1", "2")}
    assert answers == {"1": [[3, 6]], "2": [[4, 8]]}
    assert infer(service, ask()).version == "2"


def test_unknown_models_and_versions_are_named(
    service: EngineService, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    for model in ("nope", "../models/scale", ""):
        with pytest.raises(ModelNotFoundError):
            infer(service, ask(model))
        assert not service.is_model_ready(model)
    with pytest.raises(VersionNotFoundError):
        infer(service, ask(version="9"))
    with pytest.raises(ModelNotFoundError):
        asyncio.run(service.get_info("nope"))
    with pytest.raises(ModelNotFoundError):
        service.get_stats("nope")
    assert service.is_model_ready("scale")
    assert not service.is_model_ready("scale", "9")


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"z": X},
        {"x": X.astype(np.float64)},
        {"x": np.zeros((1, 3), np.float32)},
        {"x": np.zeros((0, 2), np.float32)},
        {"x": np.float32(1) * np.ones((), np.float32)},
    ],
)
@pytest.mark.parametrize("is_inline", [False, True])
def test_inputs_that_do_not_fit_are_refused(
    spec: PlatformSpec,
    repository: ModelRepository,
    tmp_path: Path,
    inputs: Mapping[str, Array],
    is_inline: bool,
) -> None:
    add_scale(repository, tmp_path, 3)
    service = EngineService(Engine(spec, costs=CostPolicy() if is_inline else None), repository)
    infer(service, ask())
    request = TensorRequest("scale", inputs)
    with pytest.raises(TensorError):
        answer(service, request)
    (stats,) = service.get_stats("scale")
    assert (stats.success.count, stats.fail.count) == (1, 1)
    service.close()


def test_only_wanted_outputs_come_back(
    service: EngineService, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    assert list(infer(service, ask(outputs=("y",))).outputs) == ["y"]
    with pytest.raises(TensorError, match="no output 'z'"):
        infer(service, ask(outputs=("y", "z")))


def test_nan_passes_as_the_protocol_allows_but_not_in_a_job(
    service: EngineService, engine: Engine, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    answer = infer(service, ask(x=np.array([[np.nan, np.inf]], np.float32))).outputs["y"]
    assert np.isnan(answer[0, 0])
    assert np.isinf(answer[0, 1])
    tensors = [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1e39, 1]}]
    (outcome,) = engine.infer(
        repository.get_folder("scale"), [InferRequest("j", JobInput(tensors=tensors))]
    )
    assert outcome.error


def test_two_requests_load_a_model_once(
    service: EngineService, engine: Engine, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)

    async def run() -> list[TensorResponse]:
        return await asyncio.gather(*(service.infer(ask()) for _ in range(20)))

    assert len(asyncio.run(run())) == 20
    assert len(engine.cache.get_models()) == 1


def test_tiny_measured_model_runs_inline_once_it_is_loaded(
    spec: PlatformSpec, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    # Measured for real, and then as on a quiet box: a busy one could find it slow.
    folder = tmp_path / "costs"
    service = EngineService(Engine(spec, costs=CostPolicy(folder=folder)), repository)
    infer(service, ask())
    service.close()
    (kept,) = folder.iterdir()
    kept.write_text(json.dumps({"points": [[1, 0.01], [2, 0.011], [4, 0.5]]}))
    engine = Engine(spec, costs=CostPolicy(folder=folder))
    service = EngineService(engine, repository)
    assert service.infer_inline(ask()) is None
    infer(service, ask())
    (served,) = engine.list_served()
    # The answer is there a moment before its instance is free again.
    wait_until(lambda: not served.batcher.busy, 10, "its instance is free")
    response = service.infer_inline(ask())
    assert response
    assert response.outputs["y"].tolist() == [[3, 6]]
    # Four rows took longer than the loop may be held up; a busy instance means someone computes.
    assert service.infer_inline(ask(x=np.ones((2, 2), np.float32)))
    assert service.infer_inline(ask(x=np.ones((4, 2), np.float32))) is None
    with served.batcher.acquire():
        assert service.infer_inline(ask()) is None
    (stats,) = service.get_stats("scale")
    assert (stats.success.count, stats.inference_count, stats.execution_count) == (3, 4, 3)
    service.close()


def test_unmeasured_model_never_runs_inline(
    service: EngineService, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    infer(service, ask())
    assert service.infer_inline(ask()) is None


def test_new_active_version_takes_over_without_a_failed_request(
    service: EngineService, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    seen: list[str] = []

    async def client(number: int) -> None:
        while not seen or seen[-1] != "2":
            response = await service.infer(ask(x=np.full((1, 2), number, np.float32)))
            factor = {"1": 3, "2": 4}[response.version]
            assert response.outputs["y"].tolist() == [[factor * number] * 2]
            seen.append(response.version)

    async def run() -> None:
        clients = [asyncio.create_task(client(n)) for n in range(8)]
        while len(seen) < 50:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(add_scale, repository, tmp_path, 4)
        await asyncio.wait_for(asyncio.gather(*clients), 60)

    asyncio.run(run())
    assert seen[0] == "1"
    assert infer(service, ask()).version == "2"


def test_replaced_version_is_freed_and_runs_on_it_finish(
    service: EngineService, engine: Engine, repository: ModelRepository, tmp_path: Path
) -> None:
    write_endless_model(tmp_path / "endless")
    repository.add(tmp_path / "endless")
    x = np.array([5])

    async def run() -> None:
        await service.infer(ask("endless", x))
        running = asyncio.create_task(service.infer(ask("endless", FOR_EVER)))
        (served,) = engine.list_served()
        while not served.batcher.busy:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(repository.add, tmp_path / "endless")
        while (await service.infer(ask("endless", x))).version != "2":
            await asyncio.sleep(0.01)
        assert [model.folder.name for model in engine.cache.get_models()] == ["2"]
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())


def test_version_that_does_not_load_leaves_the_old_one_answering(
    service: EngineService, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    infer(service, ask())
    damaged = add_scale(repository, tmp_path, 4)
    folder = repository.get_folder("scale", damaged)
    # Hard-linked to its blob, which must not be touched: a new file takes its place.
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").write_bytes(b"no model")

    async def run() -> None:
        while all(item.status is not ModelStatus.UNAVAILABLE for item in service.list_index()):
            assert (await service.infer(ask())).version == "1"
            await asyncio.sleep(0.005)
        assert (await service.infer(ask())).version == "1"
        assert service.is_model_ready("scale")
        assert not service.is_model_ready("scale", damaged)
        with pytest.raises(ModelUnavailableError, match="does not load"):
            await service.infer(ask(version=damaged))

    asyncio.run(asyncio.wait_for(run(), 60))
    states = {entry.version: entry.status for entry in service.list_index()}
    assert states == {"1": ModelStatus.READY, "2": ModelStatus.UNAVAILABLE}
    assert [entry.version for entry in service.list_index(is_ready=True)] == ["1"]


def test_removed_model_is_gone(
    service: EngineService, engine: Engine, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    infer(service, ask())
    repository.remove("scale")

    async def run() -> None:
        while True:
            await service.infer(ask())
            await asyncio.sleep(0.01)

    with pytest.raises(ModelNotFoundError):
        asyncio.run(asyncio.wait_for(run(), 60))
    assert not engine.cache.get_models()
    assert service.list_index() == []


def test_unloaded_model_is_unavailable_until_it_is_loaded_again(
    service: EngineService, engine: Engine, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)

    async def run() -> None:
        await service.infer(ask())
        await service.unload("scale")
        await service.unload("unknown")
        assert not engine.cache.get_models()
        for request in (ask(), ask(version="1")):
            with pytest.raises(ModelUnavailableError, match="unloaded"):
                await service.infer(request)
            with pytest.raises(ModelUnavailableError, match="unloaded"):
                service.infer_inline(request)
        assert not service.is_model_ready("scale")
        (entry,) = service.list_index()
        assert (entry.status, entry.reason) == (ModelStatus.UNAVAILABLE, "unloaded")
        await service.load("scale")
        assert engine.cache.get_models()
        assert (await service.infer(ask())).version == "1"
        with pytest.raises(ModelNotFoundError):
            await service.load("unknown")

    asyncio.run(run())


def test_info_says_what_clients_need(
    spec: PlatformSpec, repository: ModelRepository, tmp_path: Path
) -> None:
    repository.add(DIGITS)
    add_scale(repository, tmp_path, 3)
    add_scale(repository, tmp_path, 4)
    service = EngineService(Engine(spec, costs=CostPolicy()), repository)
    info = asyncio.run(service.get_info("scale"))
    assert (info.name, info.version, info.versions) == ("scale", "2", ("1", "2"))
    assert info.platform == "onnxruntime_onnx"
    assert [one.shape for one in (*info.inputs, *info.outputs)] == [(-1, 2), (-1, 2)]
    assert info.max_batch_size >= 1
    (entry,) = info.config["input"]
    assert (entry["name"], entry["data_type"], entry["dims"]) == ("x", "TYPE_FP32", [2])
    batching = info.config["edgeward"]["batching"]
    assert json.loads(json.dumps(batching)) == batching
    assert batching["points"][0][0] == 1
    assert batching["max_rows"] >= 1
    assert batching["reason"]
    labels = asyncio.run(service.get_info("digits")).labels
    assert list(labels.values()) == [tuple("0123456789")]
    service.close()


def test_model_without_a_batch_axis_takes_requests_one_by_one(
    service: EngineService, repository: ModelRepository, tmp_path: Path
) -> None:
    write_endless_model(tmp_path / "endless")
    repository.add(tmp_path / "endless")

    async def run() -> list[TensorResponse]:
        asked = (service.infer(ask("endless", np.array([n]))) for n in range(5))
        return await asyncio.gather(*asked)

    assert [one.outputs["y"].tolist() for one in asyncio.run(run())] == [[n] for n in range(5)]
    info = asyncio.run(service.get_info("endless"))
    assert info.max_batch_size == 0
    assert info.config["input"][0]["dims"] == [1]


def test_full_queue_is_refused_while_a_run_lasts(
    service: EngineService, engine: Engine, repository: ModelRepository, tmp_path: Path
) -> None:
    write_endless_model(tmp_path / "endless")
    repository.add(tmp_path / "endless")
    one = np.array([1])

    async def run() -> None:
        await service.infer(ask("endless", one))
        (served,) = engine.list_served()
        instances, limit = (
            served.batcher.options.instances,
            served.batcher.options.queue.requests_max,
        )
        runs = [
            asyncio.create_task(service.infer(ask("endless", FOR_EVER))) for _ in range(instances)
        ]
        while served.batcher.busy < instances or served.batcher.pending:
            await asyncio.sleep(0.001)
        waits = [asyncio.create_task(service.infer(ask("endless", one))) for _ in range(limit)]
        while served.batcher.pending < limit:
            await asyncio.sleep(0.001)
        assert service.get_stats("endless")[0].pending == limit
        with pytest.raises(RequestRejectedError):
            await service.infer(ask("endless", one))
        for task in runs:
            task.cancel()
        assert len(await asyncio.wait_for(asyncio.gather(*waits), 60)) == limit

    asyncio.run(run())


def test_queue_jobs_share_the_copy_and_the_instances_with_requests(
    service: EngineService, engine: Engine, repository: ModelRepository, tmp_path: Path
) -> None:
    write_endless_model(tmp_path / "endless")
    folder = repository.add(tmp_path / "endless").folder
    tensor = {"name": "x", "datatype": "INT64", "shape": [1], "data": [2]}
    job = InferRequest("job", JobInput(tensors=[tensor]))

    async def run() -> None:
        await service.infer(ask("endless", np.array([1])))
        (served,) = engine.list_served()
        runs = [asyncio.create_task(service.infer(ask("endless", FOR_EVER))) for _ in range(2)]
        while served.batcher.busy < 2:
            await asyncio.sleep(0.001)
        controls = [RunControl(), RunControl()]
        jobs = [
            asyncio.create_task(asyncio.to_thread(engine.infer, folder, [job], control))
            for control in controls
        ]
        for control in controls:
            # It waits for its model: no watchdog may take that for a hang.
            while not (control.see().is_loading and control._stop is not None):
                await asyncio.sleep(0.001)
        controls[0].stop(["job"], InferError("canceled", "", retryable=False))
        (stopped,) = await asyncio.wait_for(jobs[0], 60)
        assert stopped.error
        assert stopped.error.code == "canceled"
        for task in runs:
            task.cancel()
        (done,) = await asyncio.wait_for(jobs[1], 60)
        assert done.value["outputs"][0]["data"] == [2]

    asyncio.run(run())
    assert len(engine.cache.get_models()) == 1


def test_jobs_count_like_requests(
    service: EngineService, engine: Engine, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    tensors = [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]
    jobs = [InferRequest(str(n), JobInput(tensors=tensors)) for n in range(5)]
    assert all(one.ok for one in engine.infer(repository.get_folder("scale"), jobs))
    infer(service, ask())
    (stats,) = service.get_stats("scale")
    assert (stats.inference_count, stats.execution_count, stats.success.count) == (6, 2, 6)
    assert {one.batch_size for one in stats.batches} == {1, 5}
    assert stats.last_inference_ms > 0
    assert service.get_stats() == [stats]


def test_jobs_are_cut_to_the_measured_batch(
    spec: PlatformSpec, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    engine = Engine(spec)
    folder = repository.get_folder("scale")
    tensors = [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]
    two = [{"name": "x", "datatype": "FP32", "shape": [5, 2], "data": list(range(10))}]
    jobs = [InferRequest(str(n), JobInput(tensors=tensors)) for n in range(5)]
    engine.infer(folder, jobs)
    (served,) = engine.list_served()
    served.batcher.limit_rows(2)
    outcomes = engine.infer(folder, [*jobs, InferRequest("wide", JobInput(tensors=two))])
    assert [one.batch_rows for one in outcomes] == [2, 2, 2, 2, 1, 2]
    assert outcomes[-1].value["outputs"][0]["data"] == [3.0 * n for n in range(10)]


def test_configuration_has_the_last_word(
    spec: PlatformSpec, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)

    def configure(model: LoadedModel, options: BatchOptions) -> BatchOptions:
        assert model.name == "scale"
        return replace(options, max_rows=2, queue=WaitRules(1))

    engine = Engine(spec, configure=configure)
    engine.load(repository.get_folder("scale"))
    (served,) = engine.list_served()
    assert (served.batcher.max_rows, served.batcher.options.queue.requests_max) == (2, 1)


class DictCache:
    """A cache as the service sees one."""

    def __init__(self) -> None:
        self.kept: dict[bytes, tuple[str, Mapping[str, Array]]] = {}

    def find(self, key: bytes) -> Mapping[str, Array] | None:
        return self.kept[key][1] if key in self.kept else None

    def insert(self, key: bytes, owner: str, outputs: Mapping[str, Array]) -> bool:
        self.kept[key] = (owner, outputs)
        return True

    def drop(self, owner: str) -> int:
        doomed = [key for key, (mine, _) in self.kept.items() if mine == owner]
        for key in doomed:
            del self.kept[key]
        return len(doomed)


def make_key(model: str, sha256: str, wanted: Iterable[str], inputs: Mapping[str, Array]) -> bytes:
    return repr((model, sha256, sorted(wanted))).encode() + inputs["x"].tobytes()


def test_cached_answer_is_no_run_and_is_counted(
    spec: PlatformSpec, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    engine = Engine(spec, configure=lambda _, options: replace(options, is_cached=True))
    cache = DictCache()
    service = EngineService(engine, repository, cache=cache, make_key=make_key)
    answers = [answer(service, ask()) for _ in range(3)]
    assert [one.is_cached for one in answers] == [False, True, True]
    assert {json.dumps(one.outputs["y"].tolist()) for one in answers} == {"[[3.0, 6.0]]"}
    (stats,) = service.get_stats("scale")
    assert (stats.success.count, stats.execution_count) == (3, 1)
    assert (stats.cache_hit.count, stats.cache_miss.count) == (2, 1)
    asyncio.run(service.unload("scale"))
    assert not cache.kept
    service.close()


def test_model_that_asks_for_no_cache_is_always_run(
    engine: Engine, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    service = EngineService(engine, repository, cache=DictCache(), make_key=make_key)
    assert not any(answer(service, ask()).is_cached for _ in range(2))
    service.close()


def test_request_of_more_rows_than_configured_is_refused(
    spec: PlatformSpec, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    engine = Engine(spec, configure=lambda _, options: replace(options, request_rows_max=2))
    service = EngineService(engine, repository)
    assert infer(service, ask(x=np.ones((2, 2), np.float32)))
    with pytest.raises(TensorError, match="2 rows, not 3"):
        infer(service, ask(x=np.ones((3, 2), np.float32)))
    service.close()


def test_loop_goes_on_while_a_slow_model_loads_and_runs(
    spec: PlatformSpec, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    write_cnn_version(tmp_path / "cnn", side=32, width=0.25)
    repository.add(tmp_path / "cnn")
    service = EngineService(Engine(spec, costs=CostPolicy(budget_s=0.2)), repository)
    x = np.zeros((1, 3, 32, 32), np.float32)

    async def run() -> int:
        answered = 0
        slow = asyncio.create_task(service.infer(TensorRequest("cnn", {"x": x})))
        while not slow.done():
            await service.infer(ask())
            answered += 1
        assert (await slow).outputs["y"].shape == (1, 1000)
        return answered

    asyncio.run(service.infer(ask()))
    assert asyncio.run(run()) > 1
    service.close()


def test_many_clients_batch_and_each_gets_its_own_answer(
    service: EngineService, repository: ModelRepository, tmp_path: Path
) -> None:
    write_mlp_version(tmp_path / "mlp", hidden=16)
    repository.add(tmp_path / "mlp")
    rng = np.random.default_rng(1)
    asked = [rng.standard_normal((1 + n % 3, 64)).astype(np.float32) for n in range(100)]

    async def run() -> list[TensorResponse]:
        await service.load("mlp")
        return await asyncio.gather(*(service.infer(ask("mlp", x)) for x in asked))

    answers = asyncio.run(run())
    for x, answer in zip(asked, answers, strict=True):
        alone = infer(service, ask("mlp", x)).outputs["y"]
        np.testing.assert_allclose(answer.outputs["y"], alone, rtol=1e-4, atol=1e-5)


def test_two_event_loops_share_a_service(
    service: EngineService, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)

    def client(number: int) -> bool:
        async def run() -> bool:
            x = np.full((1, 2), number, np.float32)
            answers = await asyncio.gather(*(service.infer(ask(x=x)) for _ in range(20)))
            return all(one.outputs["y"].tolist() == [[3 * number] * 2] for one in answers)

        return asyncio.run(run())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(client, range(8)))


def test_closed_service_takes_nothing(
    service: EngineService, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    infer(service, ask())
    service.close()
    assert not service.is_ready()
    with pytest.raises(ModelUnavailableError):
        infer(service, ask())


def test_version_added_again_under_its_number_is_another_one(
    service: EngineService, repository: ModelRepository, tmp_path: Path
) -> None:
    add_scale(repository, tmp_path, 3)
    infer(service, ask(version="1"))
    repository.remove("scale")
    shutil.rmtree(tmp_path / "source")
    add_scale(repository, tmp_path, 5)

    def is_new() -> bool:
        return bool((infer(service, ask(version="1")).outputs["y"] == [[5, 10]]).all())

    wait_until(is_new, 30, "the new files answer")
