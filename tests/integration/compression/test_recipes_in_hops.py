"""Recipes as steps: each in a process of its own, its facts and errors brought back."""

from pathlib import Path

import pytest

from converters.compression.recipes import get_recipe, get_tool_entry
from converters.errors import RecipeError
from converters.routes.hop import run_hop
from converters.task import ModelFile, ModelFormat
from platforms.artifact import Precision
from tests.integration.compression.conftest import Nets


def test_recipe_runs_as_a_step_and_brings_its_facts_and_precision(
    nets: Nets, tmp_path: Path
) -> None:
    source = nets.get_onnx("mlp")
    recipe = get_recipe("onnx_static")
    told: list[float] = []
    result = run_hop(
        get_tool_entry(recipe),
        ModelFile(source, ModelFormat.ONNX),
        tmp_path / "mlp.onnx",
        {"calibration": str(nets.save_calibration(source)), **recipe.options},
        report=lambda share, doing: told.append(share),
    )

    assert result.file.precision is Precision.INT8
    assert result.facts["quantized_nodes"] > 0
    assert (tmp_path / "mlp.onnx").stat().st_size == result.facts["size_bytes"]
    assert told


def test_error_of_a_recipe_keeps_its_class_on_the_way_out(nets: Nets, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs calibration data"):
        run_hop(
            get_tool_entry(get_recipe("onnx_static")),
            ModelFile(nets.get_onnx("mlp"), ModelFormat.ONNX),
            tmp_path / "mlp.onnx",
        )
