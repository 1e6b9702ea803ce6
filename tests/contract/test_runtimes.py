"""What every inference runtime in the registry promises, whichever library is behind it."""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from platforms.artifact import Datatype
from platforms.errors import (
    InferenceError,
    ModelLoadError,
    RunStoppedError,
    RuntimeMissingError,
    TensorError,
)
from platforms.runtimes.base import (
    PROOF_ANSWER_FILE,
    PROOF_FOLDER,
    Array,
    LoadOptions,
    RunStop,
    Runtime,
    Session,
    read_proof_declaration,
)
from platforms.runtimes.registry import BUILT_IN, RUNTIME_FORMATS, get_runtime, read_registry

LIBRARIES = {
    "ort": ("onnxruntime",),
    "litert": ("ai_edge_litert.interpreter", "tflite_runtime.interpreter"),
    "openvino": ("openvino",),
    "torchscript": ("torch",),
}
"""What each adapter imports; taken away to see what it says. Core ML: only on macOS."""

PROOFS = (
    ("ort", "proof.onnx"),
    ("litert", "proof.tflite"),
    ("openvino", "proof.onnx"),
    ("openvino", "proof.tflite"),
    ("openvino", "proof.xml"),
    ("torchscript", "proof.torchscript"),
    ("torchscript", "proof.pt2"),
)
"""Runtime and file: the whole suite runs on each. `v2` has a server, see test_runtime_v2.py."""

ONE_THREAD = LoadOptions(threads=1)
DECLARED = read_proof_declaration()


def test_every_built_in_runtime_is_in_this_suite_or_has_its_own() -> None:
    elsewhere = {"coreml", "v2"}
    assert {name for name, _ in PROOFS} | elsewhere == {entry.name for entry in BUILT_IN}


@pytest.fixture(params=PROOFS, ids=lambda proof: f"{proof[0]}-{proof[1]}")
def proof(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


@pytest.fixture
def runtime(proof: tuple[str, str]) -> Runtime:
    return get_runtime(proof[0])


@pytest.fixture
def model(proof: tuple[str, str]) -> Path:
    return PROOF_FOLDER / proof[1]


@pytest.fixture
def session(runtime: Runtime, model: Path) -> Iterator[Session]:
    opened = runtime.load(model, ONE_THREAD, DECLARED)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(PROOF_ANSWER_FILE.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture
def x(answer: dict[str, Any]) -> Array:
    return np.asarray(answer["inputs"]["x"], dtype=np.float32)


@pytest.mark.parametrize("name", [entry.name for entry in BUILT_IN])
def test_adapter_and_registry_entry_say_the_same(name: str) -> None:
    runtime = get_runtime(name)
    entry = read_registry().entries[runtime.name]
    assert (entry.formats, entry.extra) == (runtime.formats, runtime.extra)
    assert RUNTIME_FORMATS[runtime.name] == runtime.formats


def test_version_is_a_number_and_providers_are_named(runtime: Runtime) -> None:
    assert runtime.version()[0].isdigit()
    assert runtime.providers()


def test_session_describes_its_tensors(runtime: Runtime, session: Session) -> None:
    (taken,), (given,) = session.inputs, session.outputs
    assert (taken.name, taken.datatype, taken.shape) == ("x", Datatype.FP32, (-1, 1, 8, 8))
    assert (given.name, given.datatype, given.shape) == ("y", Datatype.FP32, (-1, 10))
    assert session.runtime == runtime.name
    assert session.provider in runtime.providers()


def test_answer_is_the_one_that_numpy_computes_in_float64(
    session: Session, x: Array, answer: dict[str, Any]
) -> None:
    found = session.run({"x": x})
    right = np.asarray(answer["outputs"]["y"])
    assert found.keys() == {"y"}
    assert found["y"].dtype == np.float32
    assert np.abs(found["y"] - right).max() <= 1e-4


def test_each_row_of_a_batch_answers_as_if_alone(session: Session, x: Array) -> None:
    rows = np.concatenate([x] * 8)
    together = session.run({"x": rows})["y"]
    alone = [session.run({"x": row[np.newaxis]})["y"][0] for row in rows]
    assert np.abs(together - np.stack(alone)).max() <= 1e-5


def test_runs_from_many_threads_answer_as_one_after_the_other(session: Session) -> None:
    inputs = np.random.default_rng(1).normal(size=(200, 1, 1, 8, 8)).astype(np.float32)
    serial = [session.run({"x": row})["y"] for row in inputs]
    with ThreadPoolExecutor(8) as pool:
        concurrent = list(pool.map(lambda row: session.run({"x": row})["y"], inputs))
    assert all(np.array_equal(a, b) for a, b in zip(serial, concurrent, strict=True))


def _with(value: float, where: Array) -> Array:
    changed = where.copy()
    changed[0, 0, 3, 3] = value
    return changed


BAD_INPUTS: dict[str, Callable[[Array], dict[str, Any]]] = {
    "no input at all": lambda x: {},
    "another name": lambda x: {"z": x},
    "one name too many": lambda x: {"x": x, "z": x},
    "float64": lambda x: {"x": x.astype(np.float64)},
    "integers": lambda x: {"x": x.astype(np.int32)},
    "other byte order": lambda x: {"x": x.astype(">f4")},
    "a list": lambda x: {"x": x.tolist()},
    "an axis too few": lambda x: {"x": x[0]},
    "an axis too many": lambda x: {"x": x[np.newaxis]},
    "a fixed axis of another length": lambda x: {"x": x[:, :, :7]},
    "an empty batch": lambda x: {"x": x[:0]},
    "NaN": lambda x: {"x": _with(np.nan, x)},
    "infinity": lambda x: {"x": _with(np.inf, x)},
    "minus infinity": lambda x: {"x": _with(-np.inf, x)},
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_that_do_not_fit_are_refused(session: Session, x: Array, case: str) -> None:
    with pytest.raises(TensorError):
        session.run(BAD_INPUTS[case](x))
    assert session.run({"x": x})["y"].shape == (2, 10)


def test_closed_session_refuses_to_run_and_may_be_closed_again(
    runtime: Runtime, model: Path, x: Array
) -> None:
    session = runtime.load(model, ONE_THREAD, DECLARED)
    session.close()
    session.close()
    with pytest.raises(InferenceError, match="closed"):
        session.run({"x": x})


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 4096, b"\xff" * 4096])
def test_file_that_is_no_model_is_refused(
    runtime: Runtime, model: Path, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / model.name
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=path.name):
        runtime.load(path, ONE_THREAD, DECLARED)


def test_model_cut_short_is_refused(runtime: Runtime, model: Path, tmp_path: Path) -> None:
    whole = model.read_bytes()
    path = tmp_path / model.name
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelLoadError):
        runtime.load(path, ONE_THREAD, DECLARED)


def test_missing_file_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="there is no model file"):
        runtime.load(tmp_path / "gone", ONE_THREAD)


def test_missing_library_is_an_error_that_names_the_extra(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in LIBRARIES[runtime.name]:
        monkeypatch.setitem(sys.modules, library, None)
    extra = rf"pip install 'edgeward\[{runtime.extra}\]'"
    with pytest.raises(RuntimeMissingError, match=extra):
        runtime.version()
    with pytest.raises(RuntimeMissingError, match=extra):
        runtime.load(runtime.get_proof_model(), ONE_THREAD)


def test_stop_set_before_the_run_ends_it(session: Session, x: Array) -> None:
    stop = RunStop()
    stop.set()
    with pytest.raises(RunStoppedError):
        session.run({"x": x}, stop)
    late = RunStop()
    assert session.run({"x": x}, late)["y"].shape == (2, 10)
    late.set()
    assert session.run({"x": x})["y"].shape == (2, 10)


def test_several_instances_answer_as_one(runtime: Runtime, model: Path, x: Array) -> None:
    session = runtime.load(model, LoadOptions(threads=1, instances=3), DECLARED)
    alone = session.run({"x": x})["y"]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: session.run({"x": x})["y"], range(40)))
    session.close()
    assert all(np.abs(one - alone).max() <= 1e-5 for one in found)


def test_no_thread_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="1 thread or more"):
        LoadOptions(threads=0)


def test_unknown_runtime_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(RuntimeMissingError, match="ort"):
        get_runtime("nonesuch")
