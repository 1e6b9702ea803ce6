"""`edgeward explain model`: what it says is what the engine made of the same files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from agent.config import Settings
from agent.manifest import Manifest, Serving, read_manifest
from agent.platformfile import load_platform
from agent.repository import ModelRepository
from benchmarks.nets import write_mlp_version
from console.model_explanation import Setting, find_costs, list_settings
from platforms.runtimes.registry import RUNTIME_FORMATS
from platforms.selection import Candidate, select_artifact
from tests.harness.commands import run_edgeward
from tests.harness.known_box import seed_platform
from worker.engine.batcher import BatchOptions
from worker.engine.configured import configure
from worker.engine.costs import CostPolicy
from worker.engine.engine import Engine

CONFIG = """
max_batch_size: 8
dynamic_batching {
  max_queue_delay_microseconds: 500
  priority_levels: 2 default_priority_level: 2
  default_queue_policy { max_queue_size: 9 default_timeout_microseconds: 500000 }
  priority_queue_policy {
    key: 1 value { timeout_action: DELAY default_timeout_microseconds: 1000 }
  }
}
"""


class Box:
    """A box with one model, and what its engine made of it."""

    def __init__(self, data_dir: Path) -> None:
        seed_platform(data_dir)
        self.settings = Settings(data_dir=data_dir)
        self.spec = load_platform(data_dir)
        write_mlp_version(data_dir / "source", "mlp")
        repository = ModelRepository(self.settings.models_dir)
        self.folder = repository.add(data_dir / "source", "mlp").folder
        (self.settings.models_dir / "mlp" / "config.pbtxt").write_text(CONFIG)

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    def load(self) -> BatchOptions:
        """Load the model as a worker does, measured, and return how it is batched."""
        policy = CostPolicy(budget_s=0.2, folder=self.settings.costs_dir)
        cores = max(1, int(self.spec.cores))
        engine = Engine(self.spec, cores, costs=policy, configure=configure)
        engine.load(self.folder)
        (served,) = engine.list_served()
        return served.batcher.options

    def choose(self) -> Candidate:
        specs = self.manifest.artifact_specs()
        return select_artifact(specs, self.spec, RUNTIME_FORMATS).get_chosen()

    def list_settings(self, manifest: Manifest | None = None) -> dict[str, Setting]:
        manifest = manifest or self.manifest
        kept = find_costs(self.settings, self.spec, self.choose(), manifest).kept
        found = list_settings(self.settings, self.spec, self.folder, manifest, kept)
        return {one.name: one for one in found}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Box, BatchOptions]:
    box = Box(tmp_path_factory.mktemp("box"))
    return box, box.load()


def test_what_is_shown_is_what_the_engine_uses(measured: tuple[Box, BatchOptions]) -> None:
    box, options = measured
    found = box.list_settings()
    assert found["instances"].value == options.instances
    assert found["max_rows"].value == options.max_rows
    assert found["request_rows_max"].value == options.request_rows_max == 8
    assert found["queue"].value["requests_max"] == options.queue.requests_max == 9
    urgent = found["queue of priority 1"].value
    assert (urgent["timeout_s"], urgent["timeout_action"]) == (0.001, "delay")
    origins = {name: one.origin for name, one in found.items()}
    assert origins["instances"] == origins["response_cache"] == "default"
    assert origins["queue"] == origins["priority_levels"] == "config.pbtxt"
    # The limit of the file or the curve, whichever is less.
    assert origins["max_rows"] in ("measured", "config.pbtxt")


def test_the_manifest_s_word_is_the_last(measured: tuple[Box, BatchOptions]) -> None:
    box, _ = measured
    serving = Serving.model_validate({"instances": 1, "response_cache": True})
    found = box.list_settings(box.manifest.model_copy(update={"serving": serving}))
    assert found["response_cache"] == Setting("response_cache", True, "manifest", "yes")
    assert found["queue"].origin == "config.pbtxt"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cpu_model": "another"}, "cpu model"),
        ({"cores": 64.0}, "cores"),
        ({"runtimes": ()}, "runtime version"),
    ],
)
def test_a_curve_of_another_box_or_runtime_does_not_count(
    measured: tuple[Box, BatchOptions], change: dict[str, object], word: str
) -> None:
    box, _ = measured
    chosen, changed = box.choose(), replace(box.spec, **change)  # type: ignore[arg-type]
    if "runtimes" in change:
        (known,) = [one for one in box.spec.runtimes if one.name == chosen.runtime]
        changed = replace(box.spec, runtimes=(replace(known, version="0.1"),))
    found = find_costs(box.settings, changed, chosen, box.manifest)
    assert found.kept is None
    assert "not measured yet" in found.note
    assert f"is of another {word}: " in found.note


def test_a_load_leaves_no_doubt_about_the_provider(measured: tuple[Box, BatchOptions]) -> None:
    box, _ = measured
    chosen = box.choose()
    for provider, is_there in (("CPUExecutionProvider", True), ("CUDAExecutionProvider", False)):
        loaded = {"provider": provider, "is_batchable": True}
        found = find_costs(box.settings, box.spec, chosen, box.manifest, loaded)
        assert (found.kept is not None) is is_there


def test_command_tells_it_with_a_load_and_a_picture(
    measured: tuple[Box, BatchOptions], tmp_path: Path
) -> None:
    box, options = measured
    where = ("--data-dir", box.settings.data_dir)
    picture = tmp_path / "costs.svg"
    done = run_edgeward("explain", "model", "mlp:1", "--load", "--plot", picture, "--json", *where)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["serving"]["max_rows"] == options.max_rows
    assert found["batching"]["points"][0][0] == 1
    assert len(found["batching"]["rows_per_s"]) == len(found["batching"]["points"])
    assert Path(found["batching"]["file"]).parent == box.settings.costs_dir
    assert (found["loaded"]["runtime"], found["loaded"]["findings"]) == ("ort", [])
    assert found["batching"]["reason"] in picture.read_text()
    text = run_edgeward("explain", "model", "mlp", *where).stdout
    assert "largest batch made" in text
    assert "9 requests at most, each for 0.5 s, then refused" in text
    assert run_edgeward("explain", "model", "mlp:1", "1", *where).returncode == 2


def test_configuration_that_contradicts_itself_is_part_of_the_answer(tmp_path: Path) -> None:
    box = Box(tmp_path)
    (box.settings.models_dir / "mlp" / "config.pbtxt").write_text("sequence_batching { }")
    where = ("--data-dir", tmp_path)
    done = run_edgeward("explain", "model", "mlp", "--json", *where)
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["serving"]["error"] == "unsupported_config"
    assert found["batching"] is None
    # Nothing to draw is no success, and what could never be drawn is told first.
    plotted = run_edgeward("explain", "model", "mlp", "--plot", tmp_path / "p.svg", *where)
    assert plotted.returncode == 1
    assert "no plot: not measured yet" in plotted.stderr
    assert run_edgeward("explain", "model", "mlp", "--plot", "p.txt", *where).returncode != 0


def test_concurrency_of_the_settings_makes_threads_and_instances(
    measured: tuple[Box, BatchOptions],
) -> None:
    box, _ = measured
    spec = replace(box.spec, cores=8.0)
    settings = box.settings.model_copy(
        update={"worker": box.settings.worker.model_copy(update={"concurrency": 2})}
    )
    found = list_settings(settings, spec, box.folder, box.manifest, None, is_batchable=False)
    values = {one.name: one.value for one in found}
    # Two at a time of four threads each.
    assert (values["instances"], values["is_batching"]) == (2, False)
