"""`edgeward compare` as a user types it: a quantized variant, a wrong one, other names."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from agent.manifest import compute_sha256, read_manifest, write_manifest
from console.models.samples import write_digit_samples
from tests.harness.commands import run_edgeward

DIGITS = Path(__file__).parents[2] / "console" / "models" / "digits"
FP32 = DIGITS / "digits.onnx"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    done = run_edgeward("models", "add", "digits", DIGITS, "--data-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_digit_samples(folder, 60)
    return folder


def compare(data_dir: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    done = run_edgeward("compare", *arguments, "--json", "--data-dir", data_dir)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def write_quantized(path: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(FP32, path)
    return path


def write_wrong(path: Path) -> Path:
    """Write the digits net with its last weights turned by one class: it loads, runs and lies."""
    model = onnx.load(FP32)
    last = model.graph.node[-1].input
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.name in last and 10 in values.shape:
            turned = np.roll(values, 1, axis=values.shape.index(10))
            tensor.CopyFrom(numpy_helper.from_array(turned, tensor.name))
    onnx.save(model, path)
    return path


def write_renamed(path: Path) -> Path:
    """Write the digits net with other names outside, as a converter leaves it."""
    model = onnx.load(FP32)
    graph = model.graph
    names = {graph.input[0].name: "serving_default_x", graph.output[0].name: "StatefulCall"}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    graph.input[0].name, graph.output[0].name = names.values()
    onnx.save(model, path)
    return path


def test_model_is_identical_to_itself(data_dir: Path, pictures: Path) -> None:
    code, document = compare(data_dir, "digits", FP32, "--inputs", pictures)
    (output,) = document["outputs"]
    assert (code, document["likeness"]) == (0, "identical")
    assert (output["is_identical"], output["top_1"], output["max_abs"]) == (True, 1.0, 0.0)
    assert output["rows"] == document["inputs"]["count"] == 60
    assert document["inputs"]["warning"] == ""
    assert document["latency_ratio"] > 0


def test_quantized_variant_is_alike_on_real_digits(
    data_dir: Path, pictures: Path, tmp_path: Path
) -> None:
    int8 = write_quantized(tmp_path / "int8.onnx")
    limits = ("--min-agreement", "0.95", "--min-sqnr", "20")
    code, document = compare(data_dir, "digits@1:digits.onnx", int8, "--inputs", pictures, *limits)
    (output,) = document["outputs"]
    assert code == 0, document
    assert output["top_1"] >= 0.95
    assert 20 <= output["sqnr_db"] < 80
    assert document["b"]["size_bytes"] < document["a"]["size_bytes"]


def test_artifact_of_a_version_is_named_behind_a_colon(data_dir: Path, pictures: Path) -> None:
    sides = ("digits@1.0.0:digits.onnx", "digits:digits.int8.onnx")
    code, document = compare(data_dir, *sides, "--inputs", pictures, "--count", "20")
    assert code == 0
    assert document["a"]["label"] == "digits@1:digits.onnx"
    assert document["b"]["label"] == "digits@1:digits.int8.onnx"
    assert document["inputs"]["count"] == 20


def test_model_that_runs_and_lies_is_caught(data_dir: Path, pictures: Path, tmp_path: Path) -> None:
    wrong = write_wrong(tmp_path / "wrong.onnx")
    sides = ("digits", wrong, "--inputs", pictures)
    code, document = compare(data_dir, *sides, "--min-agreement", "0.9", "--min-sqnr", "10")
    assert (code, document["likeness"], document["passed"]) == (1, "different", False)
    assert len(document["faults"]) == 2
    assert document["outputs"][0]["top_1"] < 0.2
    # Without limits it is told, and no error.
    assert compare(data_dir, *sides)[0] == 0


def test_tensors_of_other_names_are_paired_by_position(
    data_dir: Path, pictures: Path, tmp_path: Path
) -> None:
    renamed = write_renamed(tmp_path / "renamed.onnx")
    for sides in (("digits", renamed), (renamed, "digits")):
        code, document = compare(data_dir, *sides, "--inputs", pictures, "--count", "5")
        assert (code, document["likeness"]) == (0, "identical"), document


def test_golden_set_of_the_manifest_comes_first(
    data_dir: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "golden-digits"
    shutil.copytree(DIGITS, folder)
    (folder / "golden").mkdir()
    files = {}
    for picture in sorted(pictures.iterdir())[:7]:
        shutil.copyfile(picture, folder / "golden" / picture.name)
        files[f"golden/{picture.name}"] = compute_sha256(picture)
    manifest = read_manifest(folder)
    write_manifest(manifest.model_copy(update={"files": {**manifest.files, **files}}), folder)

    code, document = compare(data_dir, folder, FP32)
    assert (code, document["inputs"]["count"]) == (0, 7)
    assert "golden" in document["inputs"]["from"]
    assert document["inputs"]["warning"] == ""
    code, document = compare(data_dir, "digits", FP32, "--inputs", "golden")
    assert (code, document["error"]["code"]) == (1, "bad_input_file")


def test_inputs_by_chance_say_what_they_are_worth(data_dir: Path) -> None:
    done = run_edgeward("compare", "digits", FP32, "--count", "3", "--data-dir", data_dir)
    assert done.returncode == 0, done.stderr
    assert "agreement by chance proves nothing" in done.stderr
    assert "B is identical on 3 made-up pictures" in done.stdout


def test_arrays_in_files_are_inputs_of_bare_models(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "arrays"
    folder.mkdir()
    rng = np.random.default_rng(1)
    np.save(folder / "a.npy", rng.random((2, 64), np.float32))
    np.savez(folder / "b.npz", pixels=rng.random((3, 64), np.float32))
    code, document = compare(data_dir, FP32, FP32, "--inputs", folder)
    assert (code, document["outputs"][0]["rows"]) == (0, 5)


def test_models_of_other_shapes_are_refused_with_both_sides_named(data_dir: Path) -> None:
    proof = Path(__file__).parents[2] / "platforms" / "runtimes" / "data" / "proof.onnx"
    code, document = compare(data_dir, "digits", proof, "--count", "2")
    assert (code, document["error"]["code"]) == (1, "measuring_failed")
    assert "proof.onnx" in document["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("digits", "digits@9"), 3, "unknown_version"),
        (("digits:nosuch.onnx", "digits"), 1, "bad_input_file"),
        (("digits", "digits", "--inputs", "nosuch"), 1, "bad_input_file"),
    ],
)
def test_mistake_is_told(data_dir: Path, arguments: tuple[str, ...], code: int, error: str) -> None:
    found, document = compare(data_dir, *arguments)
    assert (found, document["error"]["code"]) == (code, error)


def test_file_that_is_no_input_is_named(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("Dear model")
    code, document = compare(data_dir, "digits", FP32, "--inputs", tmp_path)
    assert (code, document["error"]["code"]) == (1, "bad_input_file")
    assert "letter.txt" in document["error"]["message"]
