"""ONNX files that keep weights elsewhere, and providers that are not there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from platforms.errors import ModelLoadError
from platforms.runtimes.base import LoadOptions
from platforms.runtimes.onnx_locations import read_external_locations
from platforms.runtimes.registry import get_runtime

ONES = np.ones(2, np.float32).tobytes()
X = np.array([[1, 2]], np.float32)


def external(name: str, location: str) -> Any:
    tensor = helper.make_tensor(name, TensorProto.FLOAT, [2], ONES, raw=True)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "8"}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


def value(name: str, shape: list[Any]) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def write_model(folder: Path, nodes: list[Any], constants: list[Any]) -> Path:
    graph = helper.make_graph(nodes, "g", [value("x", ["N", 2])], [value("y", ["N", 2])], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "version"
    inside.mkdir()
    (tmp_path / "outside.bin").write_bytes(ONES)
    (inside / "inside.bin").write_bytes(ONES)
    (inside / "link.bin").symlink_to(tmp_path / "outside.bin")
    return inside


def test_weights_beside_the_model_are_loaded(folder: Path) -> None:
    add = helper.make_node("Add", ["x", "w"], ["y"])
    path = write_model(folder, [add], [external("w", "inside.bin")])
    session = get_runtime("ort").load(path, LoadOptions(threads=1))
    assert session.run({"x": X})["y"].tolist() == [[2, 3]]


@pytest.mark.parametrize("location", ["../outside.bin", "link.bin", "/etc/hostname", "a/../../b"])
def test_weights_outside_the_folder_are_refused_by_our_own_check(
    folder: Path, location: str
) -> None:
    add = helper.make_node("Add", ["x", "w"], ["y"])
    path = write_model(folder, [add], [external("w", location)])
    with pytest.raises(ModelLoadError, match="outside its own folder"):
        get_runtime("ort").load(path, LoadOptions(threads=1))


def test_locations_are_found_wherever_a_tensor_can_be(folder: Path) -> None:
    branches = {
        side: helper.make_graph(
            [helper.make_node("Identity", [f"{side}w"], [f"{side}y"])],
            side,
            [],
            [value(f"{side}y", [2])],
            [external(f"{side}w", f"{side}.bin")],
        )
        for side in ("then", "else")
    }
    nodes = [
        helper.make_node("Constant", [], ["c"], value=external("c", "attribute.bin")),
        helper.make_node(
            "If", ["b"], ["z"], then_branch=branches["then"], else_branch=branches["else"]
        ),
    ]
    path = write_model(folder, nodes, [external("w", "initializer.bin")])
    found = read_external_locations(path)
    assert sorted(found) == ["attribute.bin", "else.bin", "initializer.bin", "then.bin"]


def test_model_with_its_weights_inside_has_no_locations() -> None:
    assert read_external_locations(get_runtime("ort").get_proof_model()) == ()


def test_every_prefix_of_a_model_is_read_or_refused_as_declared(folder: Path) -> None:
    whole = get_runtime("ort").get_proof_model().read_bytes()
    path = folder / "cut.onnx"
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        try:
            assert read_external_locations(path) == ()
        except ModelLoadError:
            continue


def test_provider_that_is_not_there_is_reported_and_the_cpu_runs() -> None:
    runtime = get_runtime("ort")
    wanted = ("NoSuchExecutionProvider", "CPUExecutionProvider")
    session = runtime.load(runtime.get_proof_model(), LoadOptions(threads=1, providers=wanted))
    assert session.provider == "CPUExecutionProvider"
    (finding,) = session.findings
    assert "asked for NoSuchExecutionProvider, running on CPUExecutionProvider" in finding


def test_no_provider_left_is_an_error() -> None:
    runtime = get_runtime("ort")
    options = LoadOptions(threads=1, providers=("NoSuchExecutionProvider",))
    with pytest.raises(ModelLoadError, match="NoSuchExecutionProvider"):
        runtime.load(runtime.get_proof_model(), options)
