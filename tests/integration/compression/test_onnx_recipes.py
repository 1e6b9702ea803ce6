"""ONNX recipes on nets that know the digits: files that run, and what they are worth."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from converters.compression.graph import count_operators
from converters.errors import CalibrationError, CompressionError, RecipeError
from platforms.measuring.sample import save_arrays
from tests.integration.compression.conftest import Nets
from tests.integration.compression.judging import apply, judge, run

# Least top-1 agreement and SQNR in dB with the fp32 net on 450 digits, with room for other CPUs:
# measured .993/43, .998/49, 1/78, .982/25 (MLP); 1/36, 1/66 (CNN); 1/36, .998/44, .996/24, 1/50.
FLOORS = [
    ("mlp", "onnx_static", {}, 0.97, 30),
    ("mlp", "onnx_dynamic", {}, 0.98, 35),
    ("mlp", "onnx_fp16", {}, 0.99, 50),
    ("mlp", "onnx_weights4", {"rewrite_gemm": True}, 0.94, 15),
    ("cnn", "onnx_static", {}, 0.97, 25),
    ("cnn", "onnx_fp16", {}, 0.99, 50),
    ("encoder", "onnx_static", {}, 0.97, 25),
    ("encoder", "onnx_dynamic", {}, 0.98, 30),
    ("encoder", "onnx_weights4", {}, 0.96, 17),
    ("encoder", "onnx_weights8", {}, 0.98, 35),
]


@pytest.mark.parametrize(("net", "recipe", "options", "agreement", "sqnr_db"), FLOORS)
def test_recipe_makes_a_smaller_file_that_answers_like_the_original(
    nets: Nets,
    tmp_path: Path,
    net: str,
    recipe: str,
    options: dict[str, Any],
    agreement: float,
    sqnr_db: float,
) -> None:
    source = nets.get_onnx(net)
    if recipe == "onnx_static":
        options = {**options, "calibration": str(nets.save_calibration(source))}
    target, facts = apply(recipe, source, tmp_path, options)
    parity = judge(run(source, "ort", nets.test.x), target, "ort", nets.test.x)

    assert not facts["is_no_op"]
    assert facts["size_ratio"] < 0.8
    assert parity.top_1 is not None
    assert parity.top_1 >= agreement
    assert parity.sqnr_db is not None
    assert parity.sqnr_db >= sqnr_db


def test_static_recipe_quantizes_weights_per_channel_and_tells_its_calibration(
    nets: Nets, tmp_path: Path
) -> None:
    source = nets.get_onnx("cnn")
    options = {"calibration": str(nets.save_calibration(source))}
    target, facts = apply("onnx_static", source, tmp_path, options)

    scales = [
        numpy_helper.to_array(item)
        for item in onnx.load(target).graph.initializer
        if item.name.endswith("weight_scale") or "scale" in item.name
    ]
    assert max(scale.size for scale in scales) >= 48
    assert facts["calibration"]["used"] == 64
    assert facts["quantized_nodes"] > 0


@pytest.mark.parametrize(("net", "recipe"), [("mlp", "onnx_weights4"), ("cnn", "onnx_weights8")])
def test_weight_only_on_a_net_without_products_is_called_a_no_op(
    nets: Nets, tmp_path: Path, net: str, recipe: str
) -> None:
    _, facts = apply(recipe, nets.get_onnx(net), tmp_path)

    assert facts["is_no_op"]
    assert "the recipe takes MatMul" in facts["no_op_reason"]
    assert "Gemm" in facts["no_op_reason"]


def test_dynamic_leaves_convolutions_alone(nets: Nets, tmp_path: Path) -> None:
    target, facts = apply("onnx_dynamic", nets.get_onnx("cnn"), tmp_path)
    operators = count_operators(target)

    assert operators["Conv"] == 5
    assert "ConvInteger" not in operators
    assert facts["quantized_nodes"] == 2


def test_fp16_of_a_model_without_weights_is_called_a_no_op(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "bare",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
    )
    source = tmp_path / "bare.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), source
    )
    _, facts = apply("onnx_fp16", source, tmp_path)

    assert facts["no_op_reason"] == "no weight was turned into fp16"


def test_nodes_that_are_excluded_stay_in_fp32(nets: Nets, tmp_path: Path) -> None:
    source = nets.get_onnx("mlp")
    names = [node.name for node in onnx.load(source).graph.node if node.op_type == "Gemm"]
    whole, _ = apply("onnx_dynamic", source, tmp_path)
    (tmp_path / "less").mkdir()
    part, facts = apply("onnx_dynamic", source, tmp_path / "less", {"exclude": names[:1]})

    assert count_operators(whole)["MatMulInteger"] == 3
    assert count_operators(part)["MatMulInteger"] == 2
    assert facts["left_in_fp32"] == names[:1]


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("onnx_static", {}, "needs calibration"),
        ("onnx_static", {"calibration": "x", "method": "magic"}, "minmax, percentile, entropy"),
        ("onnx_dynamic", {"exclude": ["nowhere"]}, "no node nowhere"),
        ("onnx_dynamic", {"calibrate": 1}, "unknown option calibrate"),
        ("onnx_dynamic", {"per_channel": "yes"}, "per_channel is like True"),
        ("onnx_weights4", {"block_size": 17}, "block_size is one of"),
        ("onnx_fp16", {"exclude": ["nowhere"]}, "no node nowhere"),
    ],
)
def test_bad_options_are_refused(
    nets: Nets, tmp_path: Path, recipe: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        apply(recipe, nets.get_onnx("mlp"), tmp_path, options)


def test_calibration_that_does_not_fit_the_model_is_refused(nets: Nets, tmp_path: Path) -> None:
    save_arrays(tmp_path / "wrong.npz", {"x": np.zeros((9, 3, 8, 8), np.float32)})
    with pytest.raises(CalibrationError, match="do not fit"):
        apply(
            "onnx_static",
            nets.get_onnx("mlp"),
            tmp_path,
            {"calibration": str(tmp_path / "wrong.npz")},
        )


def test_file_that_is_no_onnx_is_refused_by_name_of_the_fault(tmp_path: Path) -> None:
    source = tmp_path / "bad.onnx"
    source.write_bytes(b"no model")
    with pytest.raises(CompressionError, match="cannot be read as ONNX"):
        apply("onnx_dynamic", source, tmp_path)
