"""Real nets by real toolchains: every artifact answers as torch does, under the model's names."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from converters.errors import OperatorError, SourceError, ToolMissingError
from converters.routes.hop import HopResult, run_hop
from converters.routes.inspection import inspect_source
from converters.routes.plan import plan
from converters.routes.source import identify
from converters.task import ModelFile, ModelFormat
from platforms.artifact import Datatype, TensorSpec
from platforms.runtimes.base import Array, Declared, LoadOptions
from platforms.runtimes.registry import get_runtime
from tests.harness.saved_models import write_saved_model
from tests.harness.torch_nets import cnn, encoder, mlp

NETS = Path(__file__).parents[1] / "harness" / "torch_nets"
ROWS = 3
TOLERANCE = 1e-5
RNG = np.random.default_rng(11)
PICTURES = {"picture": RNG.standard_normal((ROWS, 3, 16, 16)).astype(np.float32)}
PIXELS = {"pixels": RNG.standard_normal((ROWS, 16)).astype(np.float32)}
TEXTS = {
    "ids": RNG.integers(0, 50, (ROWS, 6)).astype(np.int32),
    "mask": (RNG.random((ROWS, 6)) < 0.8).astype(np.float32) + 1e-3,
}


def convert(
    source: ModelFile, target: Path, to: ModelFormat, options: Mapping[str, Any] | None = None
) -> HopResult:
    """Run the one tool that leads there."""
    (tool,) = plan(source, to)
    return run_hop(tool, source, target, options)


def answer(runtime: str, made: HopResult, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run an artifact as a box would, declared with a free batch."""

    def declare(tensors: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(item["name"], Datatype(item["datatype"]), (-1, *item["shape"][1:]))
            for item in tensors
        )

    declared = Declared(declare(made.facts["inputs"]), declare(made.facts["outputs"]))
    session = get_runtime(runtime).load(made.file.path, LoadOptions(threads=1), declared)
    try:
        return session.run(inputs)
    finally:
        session.close()


def answer_by_torch(module: torch.nn.Module, inputs: Mapping[str, Array]) -> Any:
    with torch.inference_mode():
        return module.eval()(*[torch.from_numpy(value) for value in inputs.values()])


def assert_alike(found: Array, wanted: torch.Tensor) -> None:
    np.testing.assert_allclose(found, wanted.numpy(), atol=TOLERANCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(scope="module")
def cnn_as_onnx(folder: Path) -> HopResult:
    return convert(identify(f"{NETS}/cnn.py:build"), folder / "cnn.onnx", ModelFormat.ONNX)


@pytest.fixture(scope="module")
def encoder_as_pt2(folder: Path) -> HopResult:
    return convert(
        identify(f"{NETS}/encoder.py:build"), folder / "encoder.pt2", ModelFormat.TORCH_EXPORT
    )


@pytest.fixture(scope="module")
def mlp_as_litert(folder: Path) -> HopResult:
    return convert(identify(f"{NETS}/mlp.py:build"), folder / "mlp.tflite", ModelFormat.TFLITE)


def test_convolutions_as_onnx_answer_as_torch_does(cnn_as_onnx: HopResult) -> None:
    found = answer("ort", cnn_as_onnx, PICTURES)

    assert_alike(found["scores"], answer_by_torch(cnn.build()[0], PICTURES))


def test_onnx_file_is_one_for_old_runtimes_with_a_free_batch_and_nothing_of_this_machine(
    cnn_as_onnx: HopResult,
) -> None:
    path = cnn_as_onnx.file.path
    model = onnx.load(path)

    assert model.ir_version <= 10
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    assert "BatchNormalization" not in cnn_as_onnx.facts["operators"]
    assert cnn_as_onnx.facts["operators"]["Conv"] == 4
    assert cnn_as_onnx.facts["is_batch_free"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert str(NETS).encode() not in path.read_bytes()
    assert b".py" not in path.read_bytes()
    assert cnn_as_onnx.facts["tools"]["torch"] == torch.__version__


def test_onnx_becomes_an_openvino_ir_with_its_weights_beside(
    cnn_as_onnx: HopResult, folder: Path
) -> None:
    made = convert(cnn_as_onnx.file, folder / "cnn.xml", ModelFormat.OPENVINO)

    assert (folder / "cnn.bin").stat().st_size > 3000
    assert_alike(
        answer("openvino", made, PICTURES)["scores"], answer_by_torch(cnn.build()[0], PICTURES)
    )


def test_encoder_with_two_inputs_as_pt2_answers_as_torch_does(encoder_as_pt2: HopResult) -> None:
    found = answer("torchscript", encoder_as_pt2, TEXTS)

    assert [item["name"] for item in encoder_as_pt2.facts["inputs"]] == ["ids", "mask"]
    assert_alike(found["scores"], answer_by_torch(encoder.build(), TEXTS))


def test_exported_program_needs_no_python_file_to_become_onnx(
    encoder_as_pt2: HopResult, folder: Path
) -> None:
    options = {"inputs": ["ids", "mask"], "outputs": ["scores"]}
    source = identify(encoder_as_pt2.file.path)

    made = convert(source, folder / "encoder.onnx", ModelFormat.ONNX, options)

    assert source.format is ModelFormat.TORCH_EXPORT
    found = answer("ort", made, TEXTS)
    assert_alike(found["scores"], answer_by_torch(encoder.build(), TEXTS))


def test_torchscript_becomes_a_program_where_its_inputs_are_told(folder: Path) -> None:
    path = folder / "given.torchscript"
    module, example = cnn.build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(module.eval(), example)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, str(path))
    source = identify(path)
    told = {"name": "picture", "datatype": "FP32", "shape": [-1, 3, 16, 16]}

    with pytest.raises(SourceError, match="the shapes of the inputs are not known"):
        inspect_source(source)
    options = {"inputs": [told], "outputs": ["scores"]}
    made = convert(source, folder / "script.pt2", ModelFormat.TORCH_EXPORT, options)

    assert made.facts["is_batch_free"]
    found = answer("torchscript", made, PICTURES)
    assert_alike(found["scores"], answer_by_torch(module, PICTURES))


def test_outputs_by_name_keep_their_names_in_litert(mlp_as_litert: HopResult) -> None:
    found = answer("litert", mlp_as_litert, PIXELS)
    wanted = answer_by_torch(mlp.build(), PIXELS)

    assert [item["name"] for item in mlp_as_litert.facts["outputs"]] == ["scores", "norm"]
    for name in ("scores", "norm"):
        assert_alike(found[name], wanted[name])


def test_tflite_becomes_an_openvino_ir_under_the_same_names(
    mlp_as_litert: HopResult, folder: Path
) -> None:
    options = {"inputs": ["pixels"], "outputs": ["scores", "norm"]}
    source = identify(mlp_as_litert.file.path)
    made = convert(source, folder / "mlp.xml", ModelFormat.OPENVINO, options)
    one = {"pixels": PIXELS["pixels"][:1]}
    session = get_runtime("openvino").load(made.file.path, LoadOptions(threads=1))
    found = session.run(one)
    session.close()

    for name, value in answer_by_torch(mlp.build(), one).items():
        assert_alike(found[name], value)


def test_saved_model_becomes_an_openvino_ir_without_tensorflow(tmp_path: Path) -> None:
    source = identify(write_saved_model(tmp_path / "saved", 3.0))
    made = convert(source, tmp_path / "m.xml", ModelFormat.OPENVINO)

    assert [item["name"] for item in made.facts["inputs"]] == ["x"]
    x = np.array([[1, 2]], np.float32)
    assert answer("openvino", made, {"x": x})["y"].tolist() == [[3, 6]]


def test_core_ml_package_has_the_names_and_a_range_for_the_batch(folder: Path) -> None:
    made = convert(identify(f"{NETS}/mlp.py:build"), folder / "mlp.mlpackage", ModelFormat.COREML)
    (model,) = made.file.path.rglob("*.mlmodel")

    assert (made.file.path / "Manifest.json").is_file()
    assert [item["shape"] for item in made.facts["inputs"]] == [[-1, 16]]
    assert [item["name"] for item in made.facts["outputs"]] == ["scores", "norm"]
    for name in (b"pixels", b"scores", b"norm"):
        assert name in model.read_bytes()


def test_operator_that_onnx_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"has no form of prims\.bessel_j0") as caught:
        convert(identify(f"{NETS}/odd.py:build"), tmp_path / "odd.onnx", ModelFormat.ONNX)

    assert caught.value.operator == "prims.bessel_j0"
    assert caught.value.node == "bessel_j0"


def test_operator_that_openvino_does_not_have_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Nosuch", ["x"], ["y"], domain="my.domain")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "xy")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my.domain", 1)]
    graph = helper.make_graph([node], "g", [x], [y])
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)

    with pytest.raises(OperatorError, match=r"OpenVINO has no form of my\.domain\.Nosuch"):
        convert(identify(path), tmp_path / "odd.xml", ModelFormat.OPENVINO)


def test_inspection_tells_tensors_parameters_operators_and_the_manifest() -> None:
    facts = inspect_source(identify(f"{NETS}/mlp.py:build"))

    assert facts["inputs"] == [{"name": "pixels", "datatype": "FP32", "shape": [-1, 16]}]
    assert [item["name"] for item in facts["outputs"]] == ["scores", "norm"]
    assert facts["parameters"] == 16 * 32 + 32 + 32 * 4 + 4
    assert facts["operators"]["aten.linear.default"] == 2
    assert facts["manifest"]["labels"] == ["a", "b", "c", "d"]
    assert facts["precision"] == "fp32"


def test_weights_in_safetensors_go_into_the_module_that_their_builder_makes(
    tmp_path: Path, folder: Path
) -> None:
    weights = {name: value + 1 for name, value in mlp.build().state_dict().items()}
    path = write_safetensors(tmp_path / "mlp.safetensors", weights)
    source = identify(path, f"{NETS}/mlp.py:build")

    made = convert(source, tmp_path / "mlp.pt2", ModelFormat.TORCH_EXPORT)

    other = mlp.build()
    other.load_state_dict(weights)
    found = answer("torchscript", made, PIXELS)
    assert_alike(found["scores"], answer_by_torch(other, PIXELS)["scores"])


def write_safetensors(path: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    header: dict[str, Any] = {}
    data = b""
    for name, value in weights.items():
        raw = value.numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_weights_that_do_not_fit_their_builder_are_said(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "w.safetensors", {"other": torch.ones(2)})
    with pytest.raises(SourceError, match=r"do not fit the module(?s:.*)first.weight"):
        inspect_source(identify(path, f"{NETS}/mlp.py:build"))


def test_pickle_that_looks_like_weights_is_refused_when_it_is_read(tmp_path: Path) -> None:
    """`weights_only` has the last word: a stride of 0 makes one number stand for gigabytes."""
    path = tmp_path / "wide.pt"
    torch.save({"first.weight": torch.zeros(1).expand(500_000_000)}, path)
    with pytest.raises(SourceError, match=r"declares the tensor 'first.weight' with 2000000000"):
        inspect_source(identify(path, f"{NETS}/mlp.py:build"))


def test_route_whose_environment_is_not_set_up_says_how_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGEWARD_ONNX2TF_PYTHON", raising=False)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x3a\x00")
    with pytest.raises(ToolMissingError, match=r"onnx2tf.*set EDGEWARD_ONNX2TF_PYTHON"):
        convert(ModelFile(path, ModelFormat.ONNX), tmp_path / "m.tflite", ModelFormat.TFLITE)
