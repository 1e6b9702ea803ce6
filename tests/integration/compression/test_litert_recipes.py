"""TFLite recipes on a small CNN: files that LiteRT runs, and what they are worth."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.compression.litert_recipes import count_narrow_tensors
from converters.errors import CalibrationError, CompressionError, RecipeError
from platforms.artifact import Datatype
from platforms.measuring.sample import save_arrays
from platforms.runtimes.base import LoadOptions
from platforms.runtimes.registry import get_runtime
from tests.integration.compression.conftest import Nets
from tests.integration.compression.judging import apply, judge, run

# ai-edge-quantizer and LiteRT warn of their own future.
pytestmark = pytest.mark.filterwarnings("ignore")


# Measured: .993/43 dB, 1/49, 1/50.
@pytest.mark.parametrize(
    ("recipe", "agreement", "sqnr_db"),
    [("litert_static", 0.97, 30), ("litert_dynamic", 0.98, 35), ("litert_weight_only", 0.98, 35)],
)
def test_recipe_makes_a_smaller_file_that_answers_like_the_original(
    nets: Nets, tmp_path: Path, recipe: str, agreement: float, sqnr_db: float
) -> None:
    source = nets.get_tflite()
    options = {}
    if recipe == "litert_static":
        save_arrays(tmp_path / "calibration.npz", {"pixels": nets.train.x[:64]})
        options = {"calibration": str(tmp_path / "calibration.npz")}
    target, facts = apply(recipe, source, tmp_path, options)
    parity = judge(run(source, "litert", nets.test.x), target, "litert", nets.test.x)

    assert not facts["is_no_op"]
    assert facts["quantized_tensors"] >= 2
    assert facts["size_ratio"] < 0.7
    assert parity.top_1 is not None
    assert parity.top_1 >= agreement
    assert parity.sqnr_db is not None
    assert parity.sqnr_db >= sqnr_db


def test_ranges_of_all_samples_are_better_than_the_librarys_moving_average(
    nets: Nets, tmp_path: Path
) -> None:
    source = nets.get_tflite()
    save_arrays(tmp_path / "calibration.npz", {"x": nets.train.x[:64]})
    levels = {}
    for method in ("minmax", "moving_average"):
        folder = tmp_path / method
        folder.mkdir()
        options = {"calibration": str(tmp_path / "calibration.npz"), "method": method}
        target, facts = apply("litert_static", source, folder, options)
        reference = run(source, "litert", nets.test.x)
        levels[method] = judge(reference, target, "litert", nets.test.x).sqnr_db or 0.0
        assert facts["method"] == method

    # On three nets it was 20 to 27 dB.
    assert levels["minmax"] > levels["moving_average"] + 5


def test_edges_are_quantized_where_it_is_asked_for(nets: Nets, tmp_path: Path) -> None:
    save_arrays(tmp_path / "calibration.npz", {"x": nets.train.x[:64]})
    options: dict[str, Any] = {"calibration": str(tmp_path / "calibration.npz"), "edges": "int8"}
    target, _ = apply("litert_static", nets.get_tflite(), tmp_path, options)
    session = get_runtime("litert").load(target, LoadOptions(threads=1))

    assert session.inputs[0].datatype is Datatype.INT8
    assert session.outputs[0].datatype is Datatype.INT8
    session.close()


def test_source_is_not_touched_and_counts_no_narrow_tensor(nets: Nets) -> None:
    assert count_narrow_tensors(nets.get_tflite()) == 0


def test_what_is_already_quantized_is_called_a_no_op(nets: Nets, tmp_path: Path) -> None:
    once, _ = apply("litert_weight_only", nets.get_tflite(), tmp_path)
    (tmp_path / "again").mkdir()
    _, facts = apply("litert_weight_only", once, tmp_path / "again")

    assert facts["is_no_op"]
    assert "no tensor was quantized" in facts["no_op_reason"]


def test_bad_options_data_and_files_are_refused(nets: Nets, tmp_path: Path) -> None:
    save_arrays(tmp_path / "wrong.npz", {"x": np.zeros((9, 3, 8, 8), np.float32)})
    (tmp_path / "bad.tflite").write_bytes(b"no model at all")
    cases: list[tuple[str, Path, dict[str, Any], type[Exception]]] = [
        ("litert_static", nets.get_tflite(), {}, RecipeError),
        ("litert_dynamic", nets.get_tflite(), {"bits": 4}, RecipeError),
        (
            "litert_static",
            nets.get_tflite(),
            {"calibration": str(tmp_path / "wrong.npz")},
            CalibrationError,
        ),
        ("litert_weight_only", tmp_path / "bad.tflite", {}, CompressionError),
    ]
    for number, (recipe, source, options, kind) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(kind):
            apply(recipe, source, folder, options)
