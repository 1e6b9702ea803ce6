"""Which compressed forms there are, declared without importing the library of any.

Owns the table of recipes and the rule that picks one for a graph. A recipe's tool is named as
text and imported by the process that runs it.

Invariants: importing this module imports no toolchain; every name is unique and stands in
docs/conversion.md; a tool takes the options that its own docstring names.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from converters.errors import RecipeError
from converters.routes.registry import ToolEntry
from converters.task import ModelFormat, Tool
from platforms.artifact import Precision


@dataclass(frozen=True)
class Recipe:
    """One way to a smaller or faster model, declared."""

    name: str
    source: ModelFormat
    """`CALLABLE` stands for `STATE_DICT`, too."""
    target: ModelFormat
    precision: Precision
    """Of the result."""
    entry: str
    """`module:function` of its `converters.task.Tool`."""
    extra: str
    """What to install: `pip install 'edgeward[<extra>]'`."""
    needs_calibration: bool
    """Whether it cannot do without the option `calibration`."""
    modules: tuple[str, ...]
    """What its tool imports, to be looked for before it runs."""
    note: str
    """When it is worth it, and when it is not, in a sentence."""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What makes it this recipe, where several share an entry; over the user's own."""


_ONNX = "converters.compression.onnx_recipes"
_LITERT = "converters.compression.litert_recipes"
_OPENVINO = "converters.compression.openvino_recipes"
_COREML = "converters.compression.coreml_recipes"

RECIPES: tuple[Recipe, ...] = (
    Recipe(
        "onnx_static",
        ModelFormat.ONNX,
        ModelFormat.ONNX,
        Precision.INT8,
        f"{_ONNX}:static_int8",
        "convert",
        needs_calibration=True,
        modules=("onnx", "onnxruntime"),
        note="for convolutions: twice fp32's speed on a CPU with VNNI, a quarter of the size",
    ),
    Recipe(
        "onnx_static_search",
        ModelFormat.ONNX,
        ModelFormat.ONNX,
        Precision.INT8,
        "converters.compression.onnx_search:search",
        "convert",
        needs_calibration=True,
        modules=("onnx", "onnxruntime"),
        note="static INT8 but for the fewest nodes that the budget asks to leave in fp32",
        options=MappingProxyType({"recipe": "onnx_static"}),
    ),
    Recipe(
        "onnx_dynamic",
        ModelFormat.ONNX,
        ModelFormat.ONNX,
        Precision.INT8,
        f"{_ONNX}:dynamic_int8",
        "convert",
        needs_calibration=False,
        modules=("onnx", "onnxruntime"),
        note="for attention and perceptrons; leaves convolutions in fp32, which it would slow down",
    ),
    Recipe(
        "onnx_dynamic_search",
        ModelFormat.ONNX,
        ModelFormat.ONNX,
        Precision.INT8,
        "converters.compression.onnx_search:search",
        "convert",
        needs_calibration=False,
        modules=("onnx", "onnxruntime"),
        note="dynamic INT8 but for the fewest nodes that the budget asks to leave in fp32",
        options=MappingProxyType({"recipe": "onnx_dynamic"}),
    ),
    Recipe(
        "onnx_fp16",
        ModelFormat.ONNX,
        ModelFormat.ONNX,
        Precision.FP16,
        f"{_ONNX}:fp16",
        "convert",
        needs_calibration=False,
        modules=("onnx", "onnxruntime"),
        note="half the size; for GPUs: a CPU is no faster with it, or slower",
    ),
    Recipe(
        "onnx_weights8",
        ModelFormat.ONNX,
        ModelFormat.ONNX,
        Precision.INT8,
        f"{_ONNX}:weight_only",
        "convert",
        needs_calibration=False,
        modules=("onnx", "onnxruntime"),
        note="weights of MatMul only, arithmetic in float; does nothing to Conv and Gemm",
        options=MappingProxyType({"bits": 8}),
    ),
    Recipe(
        "onnx_weights4",
        ModelFormat.ONNX,
        ModelFormat.ONNX,
        Precision.INT4_WEIGHTS,
        f"{_ONNX}:weight_only",
        "convert",
        needs_calibration=False,
        modules=("onnx", "onnxruntime"),
        note="weights of MatMul only, in blocks of 32; does nothing to Conv and Gemm",
        options=MappingProxyType({"bits": 4}),
    ),
    Recipe(
        "litert_static",
        ModelFormat.TFLITE,
        ModelFormat.TFLITE,
        Precision.INT8,
        f"{_LITERT}:static_int8",
        "convert",
        needs_calibration=True,
        modules=("ai_edge_quantizer", "ai_edge_litert"),
        note="the fastest on LiteRT; right in both TFLite runtimes, but slow in tflite-runtime",
    ),
    Recipe(
        "litert_dynamic",
        ModelFormat.TFLITE,
        ModelFormat.TFLITE,
        Precision.INT8,
        f"{_LITERT}:dynamic_int8",
        "convert",
        needs_calibration=False,
        modules=("ai_edge_quantizer", "ai_edge_litert"),
        note="needs no data; right in LiteRT 2, garbage in tflite-runtime 2.14",
    ),
    Recipe(
        "litert_weight_only",
        ModelFormat.TFLITE,
        ModelFormat.TFLITE,
        Precision.INT8,
        f"{_LITERT}:weight_only",
        "convert",
        needs_calibration=False,
        modules=("ai_edge_quantizer", "ai_edge_litert"),
        note="a quarter of the size at float's speed; right in both TFLite runtimes",
    ),
    Recipe(
        "openvino_int8",
        ModelFormat.OPENVINO,
        ModelFormat.OPENVINO,
        Precision.INT8,
        f"{_OPENVINO}:int8",
        "openvino",
        needs_calibration=True,
        modules=("openvino", "nncf"),
        note="for convolutions and attention alike: 1.8–3.5 times onnxruntime's fp32",
    ),
    Recipe(
        "openvino_weights8",
        ModelFormat.OPENVINO,
        ModelFormat.OPENVINO,
        Precision.INT8,
        f"{_OPENVINO}:weights",
        "openvino",
        needs_calibration=False,
        modules=("openvino", "nncf"),
        note="a quarter of the weights, arithmetic in float",
        options=MappingProxyType({"bits": 8}),
    ),
    Recipe(
        "openvino_weights4",
        ModelFormat.OPENVINO,
        ModelFormat.OPENVINO,
        Precision.INT4_WEIGHTS,
        f"{_OPENVINO}:weights",
        "openvino",
        needs_calibration=False,
        modules=("openvino", "nncf"),
        note="products in 4 bits, the rest in 8; of a net of convolutions it makes weights of 8",
        options=MappingProxyType({"bits": 4}),
    ),
    Recipe(
        "openvino_fp16",
        ModelFormat.OPENVINO,
        ModelFormat.OPENVINO,
        Precision.FP16,
        f"{_OPENVINO}:fp16",
        "openvino",
        needs_calibration=False,
        modules=("openvino", "nncf"),
        note="half the weights' size; a CPU computes as before",
    ),
    Recipe(
        "coreml_fp16",
        ModelFormat.COREML,
        ModelFormat.COREML,
        Precision.FP16,
        f"{_COREML}:fp16",
        "convert",
        needs_calibration=False,
        modules=("coremltools",),
        note="what Apple's Neural Engine computes in",
    ),
    Recipe(
        "coreml_int8_weights",
        ModelFormat.COREML,
        ModelFormat.COREML,
        Precision.INT8,
        f"{_COREML}:int8_weights",
        "convert",
        needs_calibration=False,
        modules=("coremltools",),
        note="weights in 8 bits per channel, arithmetic in float",
    ),
    Recipe(
        "coreml_palettized",
        ModelFormat.COREML,
        ModelFormat.COREML,
        Precision.INT8,
        f"{_COREML}:palettized",
        "compress",
        needs_calibration=False,
        modules=("coremltools", "sklearn"),
        note="weights as 6-bit indices into a table for each tensor, arithmetic in float",
    ),
    Recipe(
        "torch_pruned",
        ModelFormat.CALLABLE,
        ModelFormat.TORCH_EXPORT,
        Precision.FP32,
        "converters.compression.pruning:run",
        "compress",
        needs_calibration=False,
        modules=("torch", "torch_pruning"),
        note="fewer channels, then a short training on the user's data; not for attention",
        options=MappingProxyType({"method": "channels"}),
    ),
    Recipe(
        "torch_masked",
        ModelFormat.CALLABLE,
        ModelFormat.TORCH_EXPORT,
        Precision.FP32,
        "converters.compression.pruning:run",
        "compress",
        needs_calibration=False,
        modules=("torch", "torch_pruning"),
        note="zeros in place of small weights: neither smaller nor faster, for studies only",
        options=MappingProxyType({"method": "masks"}),
    ),
    Recipe(
        "torch_distilled",
        ModelFormat.CALLABLE,
        ModelFormat.TORCH_EXPORT,
        Precision.FP32,
        "converters.compression.distillation:run",
        "convert",
        needs_calibration=False,
        modules=("torch",),
        note="a smaller net taught by a larger one; wins where few rows have labels",
    ),
)


def get_tool_entry(recipe: Recipe) -> ToolEntry:
    """Return a recipe as `converters.routes.hop.run_hop` takes it.

    Its `options` go into the call, over the user's own.
    """
    is_torch = recipe.source is ModelFormat.CALLABLE
    return ToolEntry(
        name=recipe.name,
        sources=(recipe.source, ModelFormat.STATE_DICT) if is_torch else (recipe.source,),
        target=recipe.target,
        entry=recipe.entry,
        modules=recipe.modules,
        extra=recipe.extra,
        precision=recipe.precision,
        note=recipe.note,
    )


def get_recipe(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        RecipeError: there is none of that name.
    """
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    msg = f"there is no recipe {name!r}; known are {', '.join(item.name for item in RECIPES)}"
    raise RecipeError(msg)


def load_tool(recipe: Recipe) -> Tool:
    """Import a recipe's module and return its tool; for the process that runs it."""
    module, _, name = recipe.entry.partition(":")
    tool: Tool = getattr(importlib.import_module(module), name)
    return tool


def describe_recipes() -> list[dict[str, Any]]:
    """Return the table as JSON-ready rows, in its own order."""
    return [
        {
            "name": recipe.name,
            "source": recipe.source.value,
            "target": recipe.target.value,
            "precision": recipe.precision.value,
            "needs_calibration": recipe.needs_calibration,
            "extra": recipe.extra,
            "modules": list(recipe.modules),
            "note": recipe.note,
        }
        for recipe in RECIPES
    ]


@dataclass(frozen=True)
class Choice:
    """A recipe, and why it was picked."""

    recipe: str
    why: str


_CONVOLUTIONS = ("Conv", "ConvTranspose", "FusedConv")
_PRODUCTS = ("MatMul", "Gemm")
_ATTENTION = ("Attention", "MultiHeadAttention", "GroupQueryAttention")
_RECURRENT = ("LSTM", "GRU", "RNN")


def choose_recipe(operators: Mapping[str, int], precision: Precision) -> Choice:
    """Pick the recipe for an ONNX graph; what it is worth is measured afterwards all the same.

    Args:
        operators: operator → nodes, as `graph.count_operators` gives.
        precision: wanted.

    Raises:
        RecipeError: no recipe makes that precision of ONNX, or nothing there can be compressed.
    """
    convolutions = _count(operators, _CONVOLUTIONS)
    products = _count(operators, _PRODUCTS)
    attention = _count(operators, _ATTENTION) + _count(operators, _RECURRENT)
    if precision is Precision.FP16:
        return Choice("onnx_fp16", "fp16 was asked for")
    if convolutions + products + attention == 0:
        msg = "the graph has no convolution and no matrix product: there is nothing to compress"
        raise RecipeError(msg)
    if precision is Precision.INT4_WEIGHTS:
        return Choice("onnx_weights4", f"4-bit weights were asked for; {products} products")
    if precision is not Precision.INT8:
        msg = f"no recipe makes {precision.value} of an ONNX model"
        raise RecipeError(msg)
    if convolutions > products or (convolutions and not products + attention):
        why = f"{convolutions} convolutions: in dynamic INT8 they ran at a tenth of fp32's speed"
        return Choice("onnx_static", why)
    kinds = f"{products} matrix products"
    if attention or "Softmax" in operators:
        kinds += ", attention or recurrence"
    why = f"{kinds}, {convolutions} convolutions: dynamic INT8 was as fast as static or faster"
    return Choice("onnx_dynamic", f"{why}, and needs no calibration")


def _count(operators: Mapping[str, int], names: tuple[str, ...]) -> int:
    return sum(operators.get(name, 0) for name in names)
