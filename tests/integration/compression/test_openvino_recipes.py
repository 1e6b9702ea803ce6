"""OpenVINO recipes on nets that know the digits."""

from pathlib import Path
from typing import Any

import pytest

from converters.errors import CompressionError, RecipeError
from tests.integration.compression.conftest import Nets
from tests.integration.compression.judging import apply, judge, run

# NNCF and OpenVINO warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore")


# Measured: .996/24 dB; 1/47, 1/29, 1/74 for the encoder.
@pytest.mark.parametrize(
    ("net", "recipe", "agreement", "sqnr_db"),
    [
        ("cnn", "openvino_int8", 0.95, 17),
        ("encoder", "openvino_weights8", 0.98, 35),
        ("encoder", "openvino_weights4", 0.96, 20),
        ("encoder", "openvino_fp16", 0.99, 50),
    ],
)
def test_recipe_makes_a_file_that_answers_like_the_original(
    nets: Nets, tmp_path: Path, net: str, recipe: str, agreement: float, sqnr_db: float
) -> None:
    options = {}
    if recipe == "openvino_int8":
        options = {"calibration": str(nets.save_calibration(nets.get_onnx(net)))}
    target, facts = apply(recipe, nets.get_openvino(net), tmp_path, options)
    parity = judge(run(nets.get_onnx(net), "ort", nets.test.x), target, "openvino", nets.test.x)

    assert not facts["is_no_op"]
    # Of a net as small as the CNN the description is longer than the weights.
    assert net == "cnn" or facts["size_ratio"] < 0.7
    assert parity.top_1 is not None
    assert parity.top_1 >= agreement
    assert parity.sqnr_db is not None
    assert parity.sqnr_db >= sqnr_db


def test_4_bits_of_a_net_without_large_products_are_called_a_no_op(
    nets: Nets, tmp_path: Path
) -> None:
    _, facts = apply("openvino_weights4", nets.get_openvino("cnn"), tmp_path)

    assert facts["is_no_op"]
    assert "openvino_weights8" in facts["no_op_reason"]


def test_fp16_of_what_is_fp16_already_is_called_a_no_op(nets: Nets, tmp_path: Path) -> None:
    once, _ = apply("openvino_fp16", nets.get_openvino("cnn"), tmp_path)
    (tmp_path / "again").mkdir()
    _, facts = apply("openvino_fp16", once, tmp_path / "again")

    assert facts["no_op_reason"] == "no weight was turned into fp16"


def test_bad_options_and_files_are_refused(nets: Nets, tmp_path: Path) -> None:
    (tmp_path / "bad.xml").write_text("<net/>", encoding="utf-8")
    source = nets.get_openvino("cnn")
    cases: list[tuple[str, Path, dict[str, Any], type[Exception]]] = [
        ("openvino_int8", source, {}, RecipeError),
        ("openvino_weights8", source, {"exclude": ["nowhere"]}, RecipeError),
        ("openvino_fp16", source, {"bits": 8}, RecipeError),
        ("openvino_fp16", tmp_path / "bad.xml", {}, CompressionError),
    ]
    for number, (recipe, file, options, kind) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(kind):
            apply(recipe, file, folder, options)
