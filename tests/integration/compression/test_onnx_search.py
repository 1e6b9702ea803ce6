"""The sensitivity search on a net that plain INT8 ruins."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from converters.compression.calibration import CalibrationSet, make_golden
from converters.errors import CalibrationError
from tests.harness.digit_nets import ConvNet, export_onnx, unbalance
from tests.integration.compression.conftest import Nets
from tests.integration.compression.judging import apply, judge, run


@pytest.fixture(scope="module")
def unbalanced(nets: Nets) -> Path:
    net = unbalance(copy.deepcopy(cast("ConvNet", nets.get_net("cnn"))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return export_onnx(net, nets.folder / "unbalanced.onnx")


@pytest.fixture(scope="module")
def data(nets: Nets) -> Mapping[str, str]:
    split = make_golden(CalibrationSet({"x": nets.train.x[:128]}, {"source": "digits"}))
    assert split.is_disjoint
    folder = nets.folder
    return {
        "calibration": str(split.calibration.save(folder / "for_search.npz")),
        "golden": str(split.golden.save(folder / "golden.npz")),
    }


def test_search_holds_a_budget_that_the_plain_recipe_misses(
    nets: Nets, unbalanced: Path, data: Mapping[str, str], tmp_path: Path
) -> None:
    x = nets.test.x
    reference = run(unbalanced, "ort", x)
    plain, _ = apply("onnx_static", unbalanced, tmp_path, {"calibration": data["calibration"]})
    target, facts = apply("onnx_static_search", unbalanced, tmp_path, dict(data))
    before, after = judge(reference, plain, "ort", x), judge(reference, target, "ort", x)

    assert before.top_1 is not None
    assert after.top_1 is not None
    assert after.sqnr_db is not None
    # Measured: .23 before; 1.0 and 40 dB after, with two convolutions in fp32.
    assert before.top_1 < 0.9
    assert after.top_1 >= 0.98
    assert after.sqnr_db >= 20
    assert facts["is_within_budget"]
    assert 0 < len(facts["left_in_fp32"]) <= 4
    assert facts["size_bytes"] < facts["source_size_bytes"]
    assert not facts["plain"]["is_within_budget"]
    assert facts["best"] in facts["trials"]


def test_search_that_cannot_hold_the_budget_says_so(
    unbalanced: Path, data: Mapping[str, str], tmp_path: Path
) -> None:
    asked: dict[str, Any] = {**data, "min_sqnr_db": 200.0, "max_trials": 6}
    _, facts = apply("onnx_static_search", unbalanced, tmp_path, asked)

    assert not facts["is_within_budget"]
    assert len(facts["trials"]) <= 6


def test_dynamic_search_needs_no_calibration(
    nets: Nets, data: Mapping[str, str], tmp_path: Path
) -> None:
    asked = {"golden": data["golden"], "min_sqnr_db": 46.0, "min_agreement": 0.9}
    _, facts = apply("onnx_dynamic_search", nets.get_onnx("encoder"), tmp_path, asked)

    assert facts["recipe"] == "onnx_dynamic_search"
    assert facts["calibration"] is None
    assert facts["quantized_nodes"] > 0


def test_search_without_golden_inputs_is_refused(
    unbalanced: Path, data: Mapping[str, str], tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="golden"):
        apply("onnx_static_search", unbalanced, tmp_path, {"calibration": data["calibration"]})
