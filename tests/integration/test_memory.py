"""Memory with real models: a budget that is kept, memory that returns, batches that give way."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.manifest import TensorEntry
from benchmarks.tiny_model import write_version
from platforms.artifact import Datatype
from platforms.runtimes.base import LoadOptions
from platforms.runtimes.registry import get_runtime
from platforms.spec import PlatformSpec
from tests.harness.known_box import describe_box
from worker.engine.engine import Engine
from worker.engine.memory import MemoryBudget, RowLimit, run_within
from worker.engine.sessions import LoadedModel, ModelKey, SessionCache, load_model
from worker.errors import MemoryBudgetError

WAIT_S = 60


def write_wide_model(folder: Path, megabytes: int) -> Path:
    """Write a version whose one weight has so many MB: [250, 1000 · MB] → its row's sum."""
    columns = 1000 * megabytes
    weight = np.random.default_rng(1).standard_normal((250, columns)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("ReduceMax", ["h", "axes"], ["y"], keepdims=1),
        ],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 250])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([1]), "axes")],
    )
    return write_version(
        folder,
        folder.parent.name,
        graph,
        (
            TensorEntry(name="x", datatype=Datatype.FP32, shape=(-1, 250)),
            TensorEntry(name="y", datatype=Datatype.FP32, shape=(-1, 1)),
        ),
    )


@pytest.fixture(scope="module")
def spec() -> PlatformSpec:
    return describe_box()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[ModelKey]:
    """Four models of 8 MB each."""
    root = tmp_path_factory.mktemp("models")
    for name in "abcd":
        write_wide_model(root / name / "1", 8)
    return [ModelKey.from_folder(root / name / "1") for name in "abcd"]


def load(cache: SessionCache, key: ModelKey, spec: PlatformSpec) -> LoadedModel:
    return cache.load(key, lambda: load_model(key.folder, spec, 1))


def make_cache(budget_mb: float, **options: Any) -> SessionCache:
    """Return a cache in which each model takes its file's 8 MB, 10 while it loads.

    What the C library has free at the moment would make it another figure in each run.
    """
    return SessionCache(MemoryBudget(budget_mb), read_mb=lambda: 0.0, **options)


def get_names(cache: SessionCache) -> list[str]:
    return [model.folder.parent.name for model in cache.get_models()]


def test_the_model_least_recently_used_goes_first(keys: list[ModelKey], spec: PlatformSpec) -> None:
    cache = make_cache(27)
    for key in keys[:3]:
        load(cache, key, spec)
    cache.find(keys[0])

    load(cache, keys[3], spec)

    assert get_names(cache) == ["a", "c", "d"]


def test_pinned_and_busy_models_stay(keys: list[ModelKey], spec: PlatformSpec) -> None:
    cache = make_cache(27, pinned=("a",), is_busy=lambda key: key.name == "b")
    for key in keys:
        load(cache, key, spec)

    assert get_names(cache) == ["a", "b", "d"]


def test_a_load_without_room_says_who_holds_the_budget(
    keys: list[ModelKey], spec: PlatformSpec
) -> None:
    cache = make_cache(11, pinned=("a",))
    load(cache, keys[0], spec)

    with pytest.raises(MemoryBudgetError, match=r"a 1 \(\d+ MB, pinned\).*worker\.memory_mb"):
        load(cache, keys[1], spec)

    assert get_names(cache) == ["a"]


def test_a_default_budget_gives_way_where_the_machine_has_room(
    keys: list[ModelKey], spec: PlatformSpec
) -> None:
    roomy = MemoryBudget(1.0, is_strict=False, read_available_mb=lambda: 10_000.0)
    tight = MemoryBudget(1.0, is_strict=False, read_available_mb=lambda: 1.0)

    assert load(SessionCache(roomy), keys[0], spec)
    with pytest.raises(MemoryBudgetError):
        load(SessionCache(tight), keys[0], spec)


def test_loads_that_compete_for_memory_take_turns_and_others_go_on(
    keys: list[ModelKey], spec: PlatformSpec
) -> None:
    cache = make_cache(15)
    go_on, is_loading = threading.Event(), threading.Event()

    def load_slowly() -> LoadedModel:
        is_loading.set()
        assert go_on.wait(WAIT_S)
        return load_model(keys[0].folder, spec, 1)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.load, keys[0], load_slowly)
        assert is_loading.wait(WAIT_S)
        second = threads.submit(load, cache, keys[1], spec)
        assert cache.find(keys[0]) is None
        assert not second.done()
        go_on.set()
        assert first.result(WAIT_S).name == "a"
        assert second.result(WAIT_S).name == "b"

    assert get_names(cache) == ["b"]


UNLOAD = """
import sys
from pathlib import Path
from tests.harness.known_box import describe_box
from tests.integration.test_memory import load
from worker.engine.memory import read_process_mb
from worker.engine.sessions import ModelKey, SessionCache
from tests.harness.known_box import describe_box
spec = describe_box(cores=1)
import onnxruntime
cache, key = SessionCache(), ModelKey.from_folder(Path(sys.argv[1]))
before = read_process_mb()
model = load(cache, key, spec)
loaded = read_process_mb()
cache.unload(key)
held = read_process_mb()
del model
print(loaded - before, held - before, read_process_mb() - before)
"""


def run_child(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_memory_of_an_unloaded_model_returns_when_its_last_user_lets_go(tmp_path: Path) -> None:
    write_wide_model(tmp_path / "big" / "1", 64)

    output = run_child(UNLOAD, str(tmp_path / "big" / "1"))

    loaded, held, after = map(float, output.split())
    assert loaded > 50
    assert held > 0.8 * loaded
    assert after < 0.5 * loaded


def write_hungry_model(folder: Path, axis: int | None = 1000) -> Path:
    """Write a model that needs 8 MB or more for each row: an outer product, then its maximum."""
    wide = np.ones((1, 2000), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Exp", ["h"], ["e"]),
            helper.make_node("ReduceMax", ["e", "axes"], ["y"], keepdims=0),
        ],
        "hungry",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", axis, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", axis])],
        [numpy_helper.from_array(wide, "w"), numpy_helper.from_array(np.array([2]), "axes")],
    )
    return write_version(
        folder,
        "hungry",
        graph,
        (
            TensorEntry(name="x", datatype=Datatype.FP32, shape=(-1, axis or -1, 1)),
            TensorEntry(name="y", datatype=Datatype.FP32, shape=(-1, axis or -1)),
        ),
    )


STARVE = """
import resource, sys
from pathlib import Path
import numpy as np
import psutil
from platforms.runtimes.base import LoadOptions
from platforms.runtimes.registry import get_runtime
from worker.engine.memory import RowLimit, run_within
session = get_runtime("ort").load(Path(sys.argv[1]), LoadOptions(threads=1))
x = np.arange(128 * 1000, dtype=np.float32).reshape(128, 1000, 1) / 1e6
run_within(session, {"x": x[:1]}, RowLimit())
used = psutil.Process().memory_info().vms
limit = RowLimit()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * 10**6,) * 2)
y = run_within(session, {"x": x}, limit)["y"]
print(limit.rows, y.shape, bool(np.allclose(y, np.exp(x[:, :, 0]))))
print(session.run({"x": x[:1]})["y"].shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is not kept elsewhere")
def test_a_batch_that_runs_out_of_memory_is_halved_and_the_limit_remembered(
    tmp_path: Path,
) -> None:
    path = write_hungry_model(tmp_path / "hungry" / "1")

    lines = run_child(STARVE, str(path), "700").splitlines()

    rows, rest = lines[0].split(" ", 1)
    assert 1 <= int(rows) <= 64
    assert rest == "(128, 1000) True"
    assert lines[1] == "(1, 1000)"


LONE = """
import resource, sys
from pathlib import Path
import numpy as np
import psutil
from platforms.runtimes.base import LoadOptions
from platforms.runtimes.registry import get_runtime
from worker.engine.memory import RowLimit, run_within
from worker.errors import OutOfMemoryError
session = get_runtime("ort").load(Path(sys.argv[1]), LoadOptions(threads=1))
used, limit = psutil.Process().memory_info().vms, RowLimit()
x = np.zeros((4, 100_000, 1), np.float32)
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 10**6,) * 2)
try:
    run_within(session, {"x": x}, limit)
except OutOfMemoryError as exc:
    print(exc.code, limit.rows)
print(session.run({"x": x[:1, :1000]})["y"].shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is not kept elsewhere")
def test_a_single_row_that_does_not_fit_is_an_error_and_the_process_lives(tmp_path: Path) -> None:
    path = write_hungry_model(tmp_path / "hungry" / "1", axis=None)

    assert run_child(LONE, str(path)).splitlines() == ["out_of_memory 1", "(1, 1000)"]


def test_a_batch_that_fits_runs_whole_and_leaves_no_limit(tmp_path: Path) -> None:
    path = write_hungry_model(tmp_path / "hungry" / "1")
    session = get_runtime("ort").load(path, LoadOptions(threads=1))
    limit = RowLimit()

    outputs = run_within(session, {"x": np.zeros((3, 1000, 1), np.float32)}, limit)

    assert outputs["y"].shape == (3, 1000)
    assert limit.rows is None


def test_engine_keeps_its_models_inside_the_budget_and_evicts_the_idle_one(
    tmp_path: Path, spec: PlatformSpec
) -> None:
    for name in "ab":
        write_wide_model(tmp_path / name / "1", 30)
    first, second = (ModelKey.from_folder(tmp_path / name / "1") for name in "ab")
    # Each takes between 30 and 40 MB, and twice that while it loads.
    engine = Engine(spec, budget=MemoryBudget(50.0))

    model = engine.load_key(first)
    engine.load_key(second)

    assert engine.cache.find(first) is None
    assert engine.cache.find(second) is not None
    # Who still has it goes on; the next one to ask loads it again.
    assert model.session.run({"x": np.zeros((1, 250), np.float32)})["y"].shape == (1, 1)
    del model
    assert engine.load_key(first).name == "a"
