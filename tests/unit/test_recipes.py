"""The table of recipes, and which one is picked for a graph."""

import importlib
from importlib.util import find_spec
from typing import Any

import pytest

from converters.compression.recipes import (
    RECIPES,
    choose_recipe,
    describe_recipes,
    get_recipe,
    load_tool,
)
from converters.errors import RecipeError
from platforms.artifact import Precision
from tests.architecture.documents import ROOT, read_document
from tests.architecture.test_imports import _ML_LIBRARIES, import_fresh


def test_every_recipe_is_named_once_and_described() -> None:
    names = [recipe.name for recipe in RECIPES]
    assert len(names) == len(set(names))
    assert [row["name"] for row in describe_recipes()] == names
    assert all(recipe.note for recipe in RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_names_a_tool_and_an_extra_that_are_there(recipe: Any) -> None:
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    module, _, name = recipe.entry.partition(":")
    assert find_spec(module) is not None
    assert callable(getattr(importlib.import_module(module), name))
    assert load_tool(recipe) is getattr(importlib.import_module(module), name)
    assert f"\n{recipe.extra} = " in extras


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_stands_in_the_document(recipe: Any) -> None:
    assert f"`{recipe.name}`" in read_document("conversion.md")


def test_knowing_the_recipes_loads_no_library() -> None:
    loaded = import_fresh("converters.compression.recipes")
    assert loaded & _ML_LIBRARIES == set()


def test_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="known are onnx_static"):
        get_recipe("magic")


@pytest.mark.parametrize(
    ("operators", "precision", "recipe"),
    [
        ({"Conv": 52, "Gemm": 1, "Clip": 35}, Precision.INT8, "onnx_static"),
        ({"Conv": 3}, Precision.INT8, "onnx_static"),
        ({"Gemm": 3, "Relu": 2}, Precision.INT8, "onnx_dynamic"),
        ({"MatMul": 74, "Softmax": 12, "LayerNormalization": 25}, Precision.INT8, "onnx_dynamic"),
        # A vision transformer: one convolution cuts the picture into patches.
        ({"Conv": 1, "MatMul": 72, "Softmax": 12}, Precision.INT8, "onnx_dynamic"),
        ({"LSTM": 2, "Conv": 1}, Precision.INT8, "onnx_static"),
        ({"LSTM": 2, "Gemm": 1}, Precision.INT8, "onnx_dynamic"),
        ({"Attention": 4, "Gemm": 1}, Precision.INT8, "onnx_dynamic"),
        ({"Conv": 52}, Precision.FP16, "onnx_fp16"),
        ({"MatMul": 3}, Precision.INT4_WEIGHTS, "onnx_weights4"),
    ],
)
def test_convolutions_are_calibrated_and_products_quantized_as_they_come(
    operators: dict[str, int], precision: Precision, recipe: str
) -> None:
    choice = choose_recipe(operators, precision)
    assert choice.recipe == recipe
    assert choice.why


def test_graph_without_anything_to_compress_is_refused() -> None:
    with pytest.raises(RecipeError, match="nothing to compress"):
        choose_recipe({"Relu": 2, "Add": 1}, Precision.INT8)
    with pytest.raises(RecipeError, match="no recipe makes bf16"):
        choose_recipe({"Conv": 2}, Precision.BF16)
