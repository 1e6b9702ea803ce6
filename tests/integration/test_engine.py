"""The engine with real models: right answers, one outcome each, one copy of each model."""

import importlib
import logging
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from agent.errors import ManifestError
from agent.manifest import (
    ArtifactEntry,
    Manifest,
    Step,
    TensorEntry,
    compute_sha256,
    read_manifest,
    write_manifest,
)
from console.models.samples import load_digit_split, write_digit_samples
from console.models.train_digits import FOLDER as DIGITS
from platforms.artifact import ArtifactFormat, Datatype, Precision
from platforms.spec import PlatformSpec
from platforms.threads import compute_threads
from tests.harness.known_box import describe_box
from worker.engine.engine import Engine, InferOutcome, InferRequest
from worker.engine.sessions import LoadedModel, ModelKey, SessionCache, load_model
from worker.processing.step import JobInput

ONNX_TYPES = {
    Datatype.FP32: TensorProto.FLOAT,
    Datatype.INT64: TensorProto.INT64,
}


@pytest.fixture(scope="module")
def spec() -> PlatformSpec:
    return describe_box()


@pytest.fixture
def engine(spec: PlatformSpec) -> Engine:
    return Engine(spec)


def write_version(
    folder: Path,
    nodes: list[Any],
    taken: tuple[Datatype, list[Any]] = (Datatype.FP32, ["N", 2]),
    given: tuple[Datatype, list[Any]] = (Datatype.FP32, ["N", 2]),
    **changes: Any,
) -> Path:
    """Write a version of one input `x` and one output `y`, made of ONNX nodes."""
    tensors = [
        helper.make_tensor_value_info(name, ONNX_TYPES[datatype], shape)
        for name, (datatype, shape) in (("x", taken), ("y", given))
    ]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    folder.mkdir(parents=True)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    entries = [
        TensorEntry(
            name=name,
            datatype=datatype,
            shape=tuple(axis if isinstance(axis, int) else -1 for axis in shape),
        )
        for name, (datatype, shape) in (("x", taken), ("y", given))
    ]
    manifest = Manifest(
        schema="edgeward.manifest/v1",
        name="m",
        version="1.0",
        inputs=tuple(entries[:1]),
        outputs=tuple(entries[1:]),
        artifacts=(
            ArtifactEntry(
                file=path.name,
                format=ArtifactFormat.ONNX,
                precision=Precision.FP32,
                sha256=compute_sha256(path),
                size_bytes=path.stat().st_size,
            ),
        ),
    )
    write_manifest(manifest.model_copy(update=changes), folder)
    return folder


def ask(data: list[Any], shape: list[int] | None = None, datatype: str = "FP32") -> InferRequest:
    tensor = {
        "name": "x",
        "shape": shape or [1, len(data)],
        "datatype": datatype,
        "data": data,
    }
    return InferRequest(f"job-{data}", JobInput(tensors=[tensor]))


def values(outcomes: list[InferOutcome]) -> list[Any]:
    """Return each outcome's output data, or its error's code."""
    return [one.error.code if one.error else one.value["outputs"][0]["data"] for one in outcomes]


RELU = [helper.make_node("Relu", ["x"], ["y"])]
LOG = [helper.make_node("Log", ["x"], ["y"])]


def test_digits_reads_held_out_pictures_as_well_as_its_manifest_says(
    engine: Engine, tmp_path: Path
) -> None:
    samples = write_digit_samples(tmp_path, 450)
    requests = [
        InferRequest(one.path.name, JobInput(data=one.path.read_bytes())) for one in samples
    ]
    outcomes = engine.infer(DIGITS, requests)
    right = [o.value[0]["label"] == str(s.label) for o, s in zip(outcomes, samples, strict=True)]
    accuracy = sum(right) / len(right)
    assert accuracy >= 0.97
    assert f"Held-out accuracy {accuracy:.4f} (fp32)" in read_manifest(DIGITS).description
    assert {one.artifact for one in outcomes} == {"digits.onnx"}


def test_digits_in_int8_agrees_with_fp32(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "digits" / "1"
    shutil.copytree(DIGITS, folder)
    manifest = read_manifest(folder)
    write_manifest(manifest.model_copy(update={"artifacts": manifest.artifacts[1:]}), folder)
    pixels = load_digit_split().held_out_images.reshape(450, 64) / 255
    tensors = [
        {"name": "pixels", "datatype": "FP32", "shape": [1, 64], "data": row.tolist()}
        for row in pixels
    ]
    requests = [InferRequest("j", JobInput(tensors=[tensor])) for tensor in tensors]
    whole, small = engine.infer(DIGITS, requests), engine.infer(folder, requests)
    assert {one.artifact for one in small} == {"digits.int8.onnx"}
    same = [a.value[0]["label"] == b.value[0]["label"] for a, b in zip(whole, small, strict=True)]
    assert sum(same) / len(same) >= 0.99


def test_bundle_answers_as_each_request_alone(engine: Engine, tmp_path: Path) -> None:
    samples = write_digit_samples(tmp_path, 32)
    requests = [
        InferRequest(one.path.name, JobInput(data=one.path.read_bytes())) for one in samples
    ]
    together = engine.infer(DIGITS, requests)
    alone = [engine.infer(DIGITS, [request])[0] for request in requests]
    assert {one.batch_rows for one in together} == {32}
    assert {one.batch_rows for one in alone} == {1}
    for a, b in zip(together, alone, strict=True):
        assert [one["label"] for one in a.value] == [one["label"] for one in b.value]
        pairs = zip(a.value, b.value, strict=True)
        assert max(abs(one["score"] - other["score"]) for one, other in pairs) <= 1e-5


def test_outcome_says_which_model_answered_and_how_long_it_took(
    engine: Engine, tmp_path: Path
) -> None:
    folder = write_version(tmp_path / "m" / "3", RELU)
    (outcome,) = engine.infer(folder, [ask([-1, 2])])
    assert outcome.ok
    assert outcome.value == {
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [0.0, 2.0]}]
    }
    assert (outcome.model, outcome.version, outcome.artifact) == ("m", "1.0", "m.onnx")
    assert min(outcome.pre_ms, outcome.infer_ms, outcome.post_ms) > 0
    model = engine.load(folder)
    assert (model.runtime, model.provider) == ("ort", "CPUExecutionProvider")
    assert model.artifact.sha256 == compute_sha256(folder / "m.onnx")
    assert model.load_ms > 0


def test_job_s_own_parameters_reach_the_postprocessing(engine: Engine, tmp_path: Path) -> None:
    (sample,) = write_digit_samples(tmp_path, 1)
    request = InferRequest("j", JobInput(data=sample.path.read_bytes()), {"top_k": 7})
    assert len(engine.infer(DIGITS, [request])[0].value) == 7


def test_bad_input_fails_alone(engine: Engine, tmp_path: Path) -> None:
    folder = write_version(tmp_path / "m" / "1", RELU)
    requests = [ask([1, 2]), ask([1, 2, 3]), ask([3, 4]), InferRequest("none", JobInput())]
    outcomes = engine.infer(folder, requests)
    assert values(outcomes) == [[1, 2], "bad_input_data", [3, 4], "bad_input_data"]
    assert [one.job_id for one in outcomes] == [one.job_id for one in requests]
    assert [one.batch_rows for one in outcomes] == [2, 0, 2, 0]


def test_request_that_breaks_the_stacked_run_fails_alone(engine: Engine, tmp_path: Path) -> None:
    table = helper.make_tensor("t", TensorProto.FLOAT, [3, 1], [10, 20, 30])
    nodes = [
        helper.make_node("Constant", [], ["table"], value=table),
        helper.make_node("Gather", ["table", "x"], ["rows"]),
        helper.make_node("Squeeze", ["rows", "axes"], ["y"]),
    ]
    axes = helper.make_tensor("a", TensorProto.INT64, [1], [2])
    nodes.insert(0, helper.make_node("Constant", [], ["axes"], value=axes))
    folder = write_version(
        tmp_path / "m" / "1", nodes, (Datatype.INT64, ["N", 1]), (Datatype.FP32, ["N", 1])
    )
    outcomes = engine.infer(folder, [ask([index], datatype="INT64") for index in (0, 99, 2)])
    assert values(outcomes) == [[10], "bad_tensor", [30]]
    assert engine.load(folder).is_batchable


def test_nan_in_one_row_is_that_request_s_error(engine: Engine, tmp_path: Path) -> None:
    folder = write_version(tmp_path / "m" / "1", LOG)
    outcomes = engine.infer(folder, [ask([1, 1]), ask([-1, 1]), ask([0, 1])])
    assert values(outcomes) == [[0, 0], "nan_output", "nan_output"]


def test_requests_of_several_rows_get_their_own_rows_back(engine: Engine, tmp_path: Path) -> None:
    folder = write_version(tmp_path / "m" / "1", RELU)
    outcomes = engine.infer(folder, [ask([1, 2]), ask([3, 4, 5, 6], [2, 2]), ask([7, 8])])
    assert values(outcomes) == [[1, 2], [3, 4, 5, 6], [7, 8]]
    assert {one.batch_rows for one in outcomes} == {4}


def test_only_equal_shapes_are_stacked(engine: Engine, tmp_path: Path) -> None:
    free = (Datatype.FP32, ["N", "M"])
    folder = write_version(tmp_path / "m" / "1", RELU, free, free)
    outcomes = engine.infer(folder, [ask([1, 2]), ask([3]), ask([4, 5]), ask([6])])
    assert values(outcomes) == [[1, 2], [3], [4, 5], [6]]
    assert [one.batch_rows for one in outcomes] == [2, 2, 2, 2]


def test_model_of_a_fixed_batch_runs_each_request_alone(engine: Engine, tmp_path: Path) -> None:
    fixed = (Datatype.FP32, [1, 2])
    folder = write_version(tmp_path / "m" / "1", RELU, fixed, fixed)
    outcomes = engine.infer(folder, [ask([1, 2]), ask([3, 4])])
    assert values(outcomes) == [[1, 2], [3, 4]]
    assert {one.batch_rows for one in outcomes} == {1}


def test_free_first_axis_that_counts_findings_is_not_taken_for_a_batch(
    engine: Engine, tmp_path: Path
) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"]),
        helper.make_node("Transpose", ["where"], ["y"]),
    ]
    folder = write_version(tmp_path / "m" / "1", nodes, given=(Datatype.INT64, ["K", 2]))
    # Stacked, both findings of the first would look like one for each: two wrong answers.
    outcomes = engine.infer(folder, [ask([5, 5]), ask([0, 0])])
    assert values(outcomes) == [[0, 0, 0, 1], []]
    assert not engine.load(folder).is_batchable


STEPS = """
def build_fragile(params, manifest, folder):
    def step(outputs, value, params):
        if value["y"][0, 0] == 13:
            raise ZeroDivisionError("the secret detail")
        if value["y"][0, 0] == 14:
            return {1, 2}
        if value["y"][0, 0] == 15:
            return float("nan")
        return value["y"][0].tolist()
    return step

def build_odd(params, manifest, folder):
    return lambda given: [1, 2]
"""


@pytest.fixture
def own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    info = site / "acme_fragile-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme_fragile.py").write_text(STEPS, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-fragile\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[edgeward.preprocess]\nodd = acme_fragile:build_odd\n"
        "[edgeward.postprocess]\nfragile = acme_fragile:build_fragile\n"
    )
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("own_steps")
def test_undeclared_error_is_internal_and_its_detail_is_only_in_the_log(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_version(tmp_path / "m" / "1", RELU, postprocess=(Step(name="fragile"),))
    with caplog.at_level(logging.ERROR):
        outcomes = engine.infer(folder, [ask([first, 0]) for first in (1, 13, 14, 15)])
    assert outcomes[0].value == [1.0, 0.0]
    errors = [one.error for one in outcomes[1:]]
    assert [error and error.code for error in errors] == [
        "internal_error",
        "bad_model_output",
        "nan_output",
    ]
    assert errors[0]
    assert "secret" not in errors[0].message
    assert "the secret detail" in caplog.text


@pytest.mark.usefixtures("own_steps")
def test_preprocessing_that_returns_no_arrays_is_its_own_fault(
    engine: Engine, tmp_path: Path
) -> None:
    folder = write_version(tmp_path / "m" / "1", RELU, preprocess=Step(name="odd"))
    assert values(engine.infer(folder, [ask([1, 2])])) == ["bad_processing"]


def test_model_that_cannot_load_is_every_request_s_error(
    engine: Engine, spec: PlatformSpec, tmp_path: Path
) -> None:
    requests = [ask([1, 2]), ask([3, 4])]
    assert values(engine.infer(tmp_path / "gone", requests)) == ["bad_manifest"] * 2
    damaged = write_version(tmp_path / "m" / "1", RELU)
    with (damaged / "m.onnx").open("r+b") as file:
        file.write(b"\0")
    assert values(engine.infer(damaged, requests)) == ["digest_mismatch"] * 2
    without_runtime = Engine(replace(spec, runtimes=()))
    assert values(without_runtime.infer(DIGITS, requests)) == ["no_compatible_artifact"] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": (TensorEntry(name="z", datatype=Datatype.FP32, shape=(-1, 2)),)},
        {"inputs": (TensorEntry(name="x", datatype=Datatype.FP64, shape=(-1, 2)),)},
        {"inputs": (TensorEntry(name="x", datatype=Datatype.FP32, shape=(-1, 2, 1)),)},
        {"outputs": (TensorEntry(name="z", datatype=Datatype.FP32, shape=(-1, 2)),)},
        {"outputs": (TensorEntry(name="y", datatype=Datatype.INT64, shape=(-1, 2)),)},
        {"outputs": (TensorEntry(name="y", datatype=Datatype.FP32, shape=(-1,)),)},
    ],
)
def test_manifest_that_contradicts_its_model_is_refused(
    engine: Engine, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = write_version(tmp_path / "m" / "1", RELU, **changes)
    assert values(engine.infer(folder, [ask([1, 2])])) == ["model_load_failed"]


def test_failed_load_may_be_tried_again(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "m" / "1"
    assert values(engine.infer(folder, [ask([1, 2])])) == ["bad_manifest"]
    write_version(folder, RELU)
    assert values(engine.infer(folder, [ask([1, 2])])) == [[1, 2]]


def test_link_to_a_version_follows_its_switch(engine: Engine, tmp_path: Path) -> None:
    write_version(tmp_path / "m" / "1", RELU)
    write_version(tmp_path / "m" / "2", [helper.make_node("Neg", ["x"], ["y"])])
    current = tmp_path / "m" / "current"
    current.symlink_to("1")
    assert values(engine.infer(current, [ask([1, 2])])) == [[1, 2]]
    current.unlink()
    current.symlink_to("2")
    assert values(engine.infer(current, [ask([1, 2])])) == [[-1, -2]]
    assert ModelKey.from_folder(current) == ModelKey.from_folder(tmp_path / "m" / "2")
    assert ModelKey.from_folder(current) != ModelKey.from_folder(tmp_path / "m" / "1")


def test_version_added_again_under_the_same_number_is_another_model(
    engine: Engine, tmp_path: Path
) -> None:
    folder = tmp_path / "m" / "1"
    write_version(folder, RELU)
    assert values(engine.infer(folder, [ask([1, 2])])) == [[1, 2]]
    shutil.rmtree(folder)
    write_version(folder, [helper.make_node("Neg", ["x"], ["y"])])
    assert values(engine.infer(folder, [ask([1, 2])])) == [[-1, -2]]


def test_many_threads_share_one_copy_and_all_answers_are_right(
    engine: Engine, tmp_path: Path
) -> None:
    folder = write_version(tmp_path / "m" / "1", RELU)
    start = threading.Barrier(8)

    def work(thread: int) -> list[Any]:
        start.wait()
        bundles = [[ask([thread, n]), ask([n, thread])] for n in range(20)]
        return [values(engine.infer(folder, bundle)) for bundle in bundles]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    assert found == [[[[t, n], [n, t]] for n in range(20)] for t in range(8)]
    assert len(engine.cache.get_models()) == 1


@pytest.fixture
def model(spec: PlatformSpec, tmp_path: Path) -> LoadedModel:
    return load_model(write_version(tmp_path / "m" / "1", RELU), spec, threads=1)


def test_concurrent_first_loads_load_once(model: LoadedModel) -> None:
    cache, key = SessionCache(), ModelKey.from_folder(model.folder)
    entered, release, calls = threading.Event(), threading.Event(), []

    def load_slowly() -> LoadedModel:
        calls.append(1)
        entered.set()
        assert release.wait(30)
        return model

    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(cache.load, key, load_slowly) for _ in range(6)]
        assert entered.wait(30)
        other = ModelKey("other", "1", Path("/other"))
        # While the first model is still loading, another one loads and is there.
        assert cache.load(other, lambda: model) is model
        assert cache.find(key) is None
        release.set()
        assert all(one.result(30) is model for one in waiting)
    assert len(calls) == 1
    assert cache.find(key) is model


def test_failed_load_reaches_every_waiter_and_leaves_nothing(model: LoadedModel) -> None:
    cache, key = SessionCache(), ModelKey("m", "1", Path("/m/1"))

    def fail() -> LoadedModel:
        msg = "no manifest"
        raise ManifestError(msg)

    for _ in range(2):
        with pytest.raises(ManifestError):
            cache.load(key, fail)
    assert cache.find(key) is None
    assert cache.load(key, lambda: model) is model


def test_unloaded_model_finishes_what_it_runs_and_loads_again(
    engine: Engine, tmp_path: Path
) -> None:
    folder = write_version(tmp_path / "m" / "1", RELU)
    held = engine.load(folder)
    assert engine.unload(folder)
    assert not engine.unload(folder)
    x = np.ones((1, 2), np.float32)
    assert held.session.run({"x": x})["y"].tolist() == [[1, 1]]
    assert engine.load(folder) is not held


@pytest.mark.parametrize(
    ("cores", "instances", "threads"),
    [(0.5, 1, 1), (1.0, 1, 1), (2.0, 1, 2), (2.0, 2, 1), (3.9, 1, 3), (8.0, 3, 2), (2.0, 9, 1)],
)
def test_threads_are_the_cgroup_s_cores_shared_out(
    cores: float, instances: int, threads: int
) -> None:
    assert compute_threads(cores, instances) == threads
    with pytest.raises(ValueError, match="1 instance"):
        compute_threads(cores, 0)


def test_empty_bundle_has_no_outcomes(engine: Engine) -> None:
    assert engine.infer(DIGITS, []) == []
    assert os.listdir(DIGITS)  # noqa: PTH208 (nothing was written or removed)
