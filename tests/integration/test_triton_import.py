"""Models as Triton keeps them, and bare ONNX files, through the command line into a repository."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from agent.manifest import read_manifest, verify_files
from agent.repository import ModelRepository
from console.cli import app
from platforms.runtimes.base import LoadOptions
from platforms.runtimes.registry import get_runtime
from worker.engine.modelconfig.document import to_json
from worker.engine.modelconfig.text import parse_config

PROOF = Path(__file__).parents[2] / "platforms" / "runtimes" / "data" / "proof.onnx"
DIGITS = Path(__file__).parents[2] / "console" / "models" / "digits"


@pytest.fixture
def box(tmp_path: Path) -> Path:
    return tmp_path / "box"


def run(box: Path, *words: object, code: int = 0) -> Any:
    arguments = ["--json", "--data-dir", str(box), *map(str, words)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if not code else result.output


def write_graph(path: Path, element: int, shape: list[Any], *, operator: str = "Identity") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info("y", element, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)


def write_with_weights(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = numpy_helper.from_array(np.ones((64, 300), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 300])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)


def write_triton(folder: Path, *versions: str, config: str = "", beside: bool = True) -> Path:
    for version in versions:
        write_graph(folder / version / "model.onnx", TensorProto.FLOAT, ["n", len(version)])
        if not beside:
            (folder / version / "config.pbtxt").write_text(config)
    if beside:
        (folder / "config.pbtxt").write_text(config)
    return folder


@pytest.mark.parametrize(
    ("element", "shape"),
    [
        (TensorProto.FLOAT, ["batch", 4]),
        (TensorProto.FLOAT, [3, 4]),
        (TensorProto.INT64, [1, "length"]),
        (TensorProto.STRING, ["batch"]),
        (TensorProto.FLOAT16, []),
        (TensorProto.BOOL, ["batch", "a", "b"]),
    ],
)
def test_a_bare_onnx_file_is_enough(
    box: Path, tmp_path: Path, element: int, shape: list[Any]
) -> None:
    write_graph(tmp_path / "net.onnx", element, shape)
    added = run(box, "models", "add", "net", tmp_path / "net.onnx")
    manifest = read_manifest(Path(added["folder"]))
    expected = tuple(axis if isinstance(axis, int) else -1 for axis in shape)
    assert manifest.inputs[0].shape == expected
    assert manifest.outputs[0].datatype == manifest.inputs[0].datatype


@pytest.mark.parametrize("name", ["digits.onnx", "digits.int8.onnx"])
def test_the_demos_digit_nets_are_added_by_their_file(box: Path, name: str) -> None:
    added = run(box, "models", "add", "digits", DIGITS / name)
    assert read_manifest(Path(added["folder"])).inputs[0].shape == (-1, 64)


def test_magikas_model_is_added_by_its_file(box: Path) -> None:
    magika = pytest.importorskip("magika")
    found = sorted(Path(magika.__file__).parent.rglob("*.onnx"))
    added = run(box, "models", "add", "magika", found[0])
    assert read_manifest(Path(added["folder"])).inputs[0].datatype == "INT32"


def test_external_weights_are_in_the_manifest_with_their_digest(box: Path, tmp_path: Path) -> None:
    write_with_weights(tmp_path / "net.onnx")
    folder = Path(run(box, "models", "add", "net", tmp_path / "net.onnx")["folder"])
    manifest = read_manifest(folder)
    assert set(manifest.files) == {"weights.bin"}
    verify_files(manifest, folder)


def test_each_version_folder_becomes_a_version_in_the_order_of_numbers(
    box: Path, tmp_path: Path
) -> None:
    source = write_triton(tmp_path / "net", "2", "10", config='name: "net" max_batch_size: 4')
    added = run(box, "models", "add", "mine", source)
    versions = ModelRepository(box / "models").list_versions("mine")
    assert [(item.number, item.release, item.is_active) for item in versions] == [
        (1, "v2", False),
        (2, "v10", True),
    ]
    folder = Path(added["folder"])
    assert set(read_manifest(folder).files) == {"config.pbtxt"}
    session = get_runtime("ort").load(folder / "model.onnx", LoadOptions(threads=1))
    assert session.inputs[0].shape == (-1, 2)


def test_the_link_latest_says_which_version_is_active(box: Path, tmp_path: Path) -> None:
    source = write_triton(tmp_path / "net", "v1.0", "v2.0", "v2.1", beside=False)
    (source / "latest").symlink_to("v2.0")
    assert run(box, "models", "add", "net", source)["release"] == "v2.0"


def test_labels_and_warm_up_data_become_files_of_the_version(box: Path, tmp_path: Path) -> None:
    config = """max_batch_size: 4 output { name: "y" label_filename: "labels.txt" }
    model_warmup { name: "w" batch_size: 1 inputs { key: "x" value
      { data_type: TYPE_FP32 dims: [1] input_data_file: "raw" } } }"""
    source = write_triton(tmp_path / "net", "1", config=config)
    (source / "labels.txt").write_text("one\n")
    (source / "warmup").mkdir()
    (source / "warmup" / "raw").write_bytes(bytes(4))
    folder = Path(run(box, "models", "add", "net", source)["folder"])
    assert set(read_manifest(folder).files) == {"config.pbtxt", "labels.txt", "warmup/raw"}


def test_a_model_in_a_folder_of_several_files_is_taken(box: Path, tmp_path: Path) -> None:
    write_with_weights(tmp_path / "net" / "1" / "model.onnx" / "model.onnx")
    folder = Path(run(box, "models", "add", "net", tmp_path / "net")["folder"])
    manifest = read_manifest(folder)
    assert manifest.artifacts[0].file == "model.onnx/model.onnx"
    assert set(manifest.files) == {"model.onnx/weights.bin"}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("max_batch: 4", "max_batch"),
        ("ensemble_scheduling {}", "ensemble_scheduling"),
        ('input { name: "z" }', "not one of the model"),
        ('output { name: "y" label_filename: "../secret" }', "outside"),
        ('output { name: "y" label_filename: "none.txt" }', "missing"),
        ('default_model_filename: "model.plan"', "no model that Edgeward reads"),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused_and_leaves_nothing(
    box: Path, tmp_path: Path, config: str, complaint: str
) -> None:
    source = write_triton(tmp_path / "net", "1", "2", config=config)
    assert complaint in " ".join(run(box, "models", "add", "net", source, code=1).split())
    assert ModelRepository(box / "models").list_models() == []


def test_an_exported_model_comes_back_as_it_was(box: Path, tmp_path: Path) -> None:
    config = 'max_batch_size: 4 output { name: "y" label_filename: "labels.txt" }'
    source = write_triton(tmp_path / "net", "1", config=config)
    (source / "labels.txt").write_text("one\n")
    first = Path(run(box, "models", "add", "net", source)["folder"])
    run(box, "models", "export", "net", tmp_path / "out", "--form", "triton")
    out = tmp_path / "out" / "net"
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {"config.pbtxt", "labels.txt", "1/model.onnx"}
    document = to_json(parse_config((out / "config.pbtxt").read_text()).message)
    assert document["max_batch_size"] == 4
    assert document["backend"] == "onnxruntime"
    assert document["output"][0]["label_filename"] == "labels.txt"
    again = Path(run(box, "models", "add", "again", out)["folder"])
    one, other = read_manifest(first), read_manifest(again)
    assert (one.inputs, one.outputs) == (other.inputs, other.outputs)
    assert one.artifacts == other.artifacts


def test_external_weights_are_exported_beside_their_model(box: Path, tmp_path: Path) -> None:
    write_with_weights(tmp_path / "net.onnx")
    run(box, "models", "add", "net", tmp_path / "net.onnx")
    run(box, "models", "export", "net", tmp_path)
    assert (tmp_path / "net" / "1" / "weights.bin").is_file()
    config = parse_config((tmp_path / "net" / "config.pbtxt").read_text()).message
    assert config.default_model_filename == "net.onnx"
    assert list(config.dynamic_batching.preferred_batch_size) == [32]
