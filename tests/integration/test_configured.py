"""A config.pbtxt beside a real model, and what the engine makes of it."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from agent.repository import ModelRepository
from platforms.artifact import Datatype
from platforms.errors import TensorError
from platforms.runtimes.proof import prove_runtime
from platforms.spec import Arch, Os, PlatformSpec
from tests.integration.test_serving import ask, write_scale
from worker.engine.batcher import BatchOptions
from worker.engine.configured import apply_config, configure
from worker.engine.engine import Engine
from worker.engine.modelconfig.serving import QueuePolicy, ServingConfig
from worker.engine.responses import ResponseCache, compute_key
from worker.engine.serving import EngineService

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
    return PlatformSpec(
        os=Os.LINUX,
        os_version="",
        arch=Arch.X86_64,
        cpu_model="",
        cpu_flags=(),
        cores=2.0,
        cores_machine=2,
        memory_mb=4000,
        memory_machine_mb=4000,
        python_version="3.11",
        runtimes=(prove_runtime("ort"),),
    )


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
    assert (options.instances, options.max_rows, options.queue_requests) == (3, 4, 7)
    assert (options.preferred_rows, options.max_queue_delay_s) == ((2,), 0.0001)
    assert (options.default_timeout_s, options.is_timeout_free) == (2.0, False)
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


def test_queue_without_a_timeout_lets_requests_name_theirs() -> None:
    config = ServingConfig(queue=QueuePolicy(timeout_s=0))
    assert apply_config(BatchOptions(), config).choose_timeout_s(3) == 3
