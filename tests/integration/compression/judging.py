"""Runs a recipe, and its result against the original."""

from pathlib import Path
from typing import Any

import numpy as np

from converters.compression.recipes import get_recipe, load_tool
from converters.compression.toolchain import open_session
from converters.task import Facts, ModelFile, Task
from platforms.parity import Parity, compare_output
from platforms.runtimes.base import Array

RUNTIMES = {"onnx": "ort", "tflite": "litert", "openvino": "openvino"}
SUFFIXES = {"onnx": ".onnx", "tflite": ".tflite", "openvino": ".xml", "coreml": ".mlpackage"}


def apply(
    name: str, source: Path, folder: Path, options: dict[str, Any] | None = None
) -> tuple[Path, Facts]:
    """Run a recipe's tool here; return its file and its facts."""
    recipe = get_recipe(name)
    target = folder / f"{name}{SUFFIXES[recipe.target.value]}"
    scratch = folder / f"{name}.scratch"
    scratch.mkdir()
    merged = {**(options or {}), **recipe.options}
    task = Task(ModelFile(source, recipe.source), target, scratch, merged)
    return target, load_tool(recipe)(task)


def run(path: Path, runtime: str, x: Array) -> Array:
    """Return the first output of a model on rows of its only input."""
    session = open_session(path, runtime)
    try:
        (spec,) = session.inputs
        batch = len(x) if spec.has_free_batch else spec.shape[0]
        parts = [
            session.run({spec.name: x[start : start + batch]})[session.outputs[0].name]
            for start in range(0, len(x), batch)
        ]
    finally:
        session.close()
    return np.concatenate(parts)


def judge(reference: Array, path: Path, runtime: str, x: Array) -> Parity:
    return compare_output("y", reference, run(path, runtime, x))
