"""A config.pbtxt beside a real model, and what the engine makes of it."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.errors import VersionNotFoundError
from agent.repository import ModelRepository
from platforms.artifact import Datatype
from platforms.errors import TensorError
from platforms.spec import PlatformSpec, RuntimeFinding, RuntimeStatus
from tests.harness.known_box import describe_box
from tests.integration.test_serving import ask, write_scale
from worker.engine.batcher import BatchOptions, WaitRules
from worker.engine.configured import apply_config, configure, warm_up
from worker.engine.engine import Engine
from worker.engine.modelconfig.serving import QueuePolicy, ServingConfig, from_config
from worker.engine.modelconfig.text import parse_config
from worker.engine.responses import ResponseCache, compute_key
from worker.engine.serving import EngineService
from worker.engine.sessions import LoadedModel
from worker.errors import ModelUnavailableError

CONFIG = """
max_batch_size: 4
dynamic_batching {
  preferred_batch_size: [ 2 ]
  max_queue_delay_microseconds: 100
  default_queue_policy { max_queue_size: 7 default_timeout_microseconds: 2000000 }
}
instance_group [ { count: 3 kind: KIND_CPU } ]
response_cache { enable: true }
"""


@pytest.fixture
def spec() -> PlatformSpec:
    return describe_box()


def test_config_reaches_the_batcher_the_cache_and_the_client(
    spec: PlatformSpec, tmp_path: Path
) -> None:
    repository = ModelRepository(tmp_path / "models")
    repository.add(write_scale(tmp_path / "source", 3))
    (tmp_path / "models" / "scale" / "config.pbtxt").write_text(CONFIG)
    engine = Engine(spec, configure=configure)
    service = EngineService(engine, repository, cache=ResponseCache(1 << 20), make_key=compute_key)
    answers = [asyncio.run(service.infer(ask())) for _ in range(2)]
    assert [one.is_cached for one in answers] == [False, True]
    assert answers[1].outputs["y"].tolist() == [[3, 6]]
    (served,) = engine.list_served()
    options = served.batcher.options
    assert (options.instances, options.max_rows, options.queue.requests_max) == (3, 4, 7)
    assert (options.preferred_rows, options.max_queue_delay_s) == ((2,), 0.0001)
    assert (options.queue.timeout_s, options.queue.is_timeout_free) == (2.0, False)
    with pytest.raises(TensorError, match="4 rows, not 5"):
        asyncio.run(service.infer(ask(x=np.ones((5, 2), np.float32))))
    info = asyncio.run(service.get_info("scale"))
    assert info.max_batch_size == info.config["max_batch_size"] == 4
    assert info.inputs[0].datatype is Datatype.FP32
    assert info.config["edgeward"]["batching"]["max_rows"] == 4
    service.close()


def test_measured_batch_holds_below_the_configured_one() -> None:
    measured = BatchOptions(max_rows=8)
    assert apply_config(measured, ServingConfig(max_rows=32)).max_rows == 8
    assert apply_config(measured, ServingConfig(max_rows=4)).max_rows == 4
    assert not apply_config(measured, ServingConfig(max_rows=0)).is_batchable


def test_no_configuration_changes_nothing() -> None:
    options = BatchOptions(max_rows=8, instances=2)
    assert apply_config(options, ServingConfig()) == options


def test_order_of_answers_is_kept_by_one_run_at_a_time() -> None:
    options = BatchOptions(instances=4, max_rows=8, is_batchable=True)
    ordered = ServingConfig(preserve_ordering=True, instances=3)
    assert apply_config(options, ordered).instances == 1
    assert apply_config(options, ServingConfig(instances=3)).instances == 3


_FALLING_BACK = """
from dataclasses import replace

from platforms.artifact import ArtifactFormat
from platforms.runtimes.base import CPU_PROVIDER
from platforms.runtimes.ort import OrtRuntime
from platforms.runtimes.registry import RuntimeEntry

ENTRY = RuntimeEntry("gpu", "gpu_runtime:GpuRuntime", frozenset({ArtifactFormat.ONNX}), "gpu")


class GpuRuntime(OrtRuntime):
    name = "gpu"

    def _load(self, path, options):
        wanted = ("CUDAExecutionProvider", CPU_PROVIDER)
        return super()._load(path, replace(options, providers=wanted))
"""


def test_fall_back_to_the_cpu_is_told_once_per_load_and_shown_to_clients(
    spec: PlatformSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    info = tmp_path / "site" / "gpu_runtime-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gpu-runtime\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgeward.runtimes]\ngpu = gpu_runtime:ENTRY\n")
    (tmp_path / "site" / "gpu_runtime.py").write_text(_FALLING_BACK)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    proven = RuntimeFinding("gpu", RuntimeStatus.PROVEN)
    repository = ModelRepository(tmp_path / "models")
    repository.add(write_scale(tmp_path / "source", 3))
    engine = Engine(replace(spec, runtimes=(proven,)), configure=configure)
    service = EngineService(engine, repository)

    for _ in range(2):
        assert asyncio.run(service.infer(ask())).outputs["y"].tolist() == [[3, 6]]

    said = "asked for CUDAExecutionProvider, running on CPUExecutionProvider"
    (warning,) = [one for one in caplog.records if one.levelname == "WARNING"]
    assert "scale 1.0.0 (model.onnx on" in warning.getMessage()
    assert said in warning.getMessage()
    shown = asyncio.run(service.get_info("scale")).config["edgeward"]["runtime"]
    assert shown["provider"] == "CPUExecutionProvider"
    assert said in shown["findings"][0]
    assert sum(shown["assignment"].values()) >= 1
    service.close()


def test_rules_of_each_priority_reach_the_batcher() -> None:
    text = """
    max_batch_size: 4
    dynamic_batching {
      priority_levels: 3 default_priority_level: 2
      default_queue_policy { max_queue_size: 9 default_timeout_microseconds: 500000 }
      priority_queue_policy { key: 1 value {
        timeout_action: DELAY default_timeout_microseconds: 1000 allow_timeout_override: true
      } }
    }
    """
    options = apply_config(BatchOptions(), from_config(parse_config(text)))
    assert (options.priority_levels, options.default_priority) == (3, 2)
    assert options.get_rules(1) == WaitRules(128, 0.001, is_timeout_free=True, is_delaying=True)
    usual = WaitRules(9, 0.5, is_timeout_free=False, is_delaying=False)
    assert [options.get_rules(level) for level in (2, 3)] == [usual, usual]
    assert [options.choose_priority(asked) for asked in (0, 1, 3, 4)] == [2, 1, 3, 2]


def test_queue_without_a_timeout_lets_requests_name_theirs() -> None:
    config = ServingConfig(queue=QueuePolicy(timeout_s=0))
    assert apply_config(BatchOptions(), config).queue.choose_timeout_s(3) == 3


def test_warm_up_runs_before_the_model_serves_and_its_failure_is_the_loads(
    spec: PlatformSpec, tmp_path: Path
) -> None:
    repository = ModelRepository(tmp_path / "models")
    repository.add(write_scale(tmp_path / "source", 3))
    place = tmp_path / "models" / "scale"
    warm = """
    model_warmup [ {
      name: "first" batch_size: 2 count: 3
      inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 2 ] random_data: true } }
    } ]
    """
    (place / "config.pbtxt").write_text(warm)
    runs: list[str] = []

    def warm_up_and_tell(model: LoadedModel) -> None:
        warm_up(model)
        runs.append(model.name)

    service = EngineService(Engine(spec, configure=configure, warm_up=warm_up_and_tell), repository)
    assert asyncio.run(service.infer(ask())).outputs["y"].tolist() == [[3, 6]]
    assert runs == ["scale"]

    (place / "config.pbtxt").write_text(warm.replace("dims: [ 2 ]", "dims: [ 5 ]"))
    other = EngineService(Engine(spec, configure=configure, warm_up=warm_up), repository)
    with pytest.raises(ModelUnavailableError, match="does not load"):
        asyncio.run(other.infer(ask()))


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("", ["1", "2", "3"]),
        ("version_policy { latest { num_versions: 2 } }", ["1", "2", "3"]),
        ("version_policy { latest { num_versions: 1 } }", ["1", "3"]),
        ("version_policy { specific { versions: [ 2 ] } }", ["1", "2"]),
    ],
)
def test_version_policy_says_what_may_be_asked_for_beside_the_active_version(
    spec: PlatformSpec, tmp_path: Path, policy: str, served: list[str]
) -> None:
    repository = ModelRepository(tmp_path / "models")
    for factor in (1, 2, 3):
        repository.add(write_scale(tmp_path / "source" / str(factor), factor))
    repository.activate("scale", "1")
    (tmp_path / "models" / "scale" / "config.pbtxt").write_text(policy)
    service = EngineService(Engine(spec, configure=configure), repository)
    assert [entry.version for entry in service.list_index()] == served
    assert list(asyncio.run(service.get_info("scale")).versions) == served
    for version in ("1", "2", "3"):
        request = replace(ask(), version=version)
        if version in served:
            assert asyncio.run(service.infer(request)).version == version
        else:
            assert not service.is_model_ready("scale", version)
            with pytest.raises(VersionNotFoundError, match="version_policy"):
                asyncio.run(service.infer(request))


def test_runtimes_are_proven_once_and_not_before_a_model_loads(
    spec: PlatformSpec, tmp_path: Path
) -> None:
    proofs: list[int] = []

    def prove() -> PlatformSpec:
        proofs.append(1)
        return spec

    repository = ModelRepository(tmp_path / "models")
    for name in ("one", "two"):
        repository.add(write_scale(tmp_path / "source" / name, 3, name))
    service = EngineService(Engine(replace(spec, runtimes=()), prove=prove), repository)
    assert service.is_ready()
    assert len(service.list_index()) == 2
    assert not proofs
    for name in ("one", "two"):
        asyncio.run(service.infer(ask(name)))
    assert len(proofs) == 1
