"""Running many rows on a measuring child, in batches that its model takes."""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from platforms.artifact import TensorSpec
from platforms.measuring.measurer import Measurer
from platforms.measuring.sample import load_arrays, repeat_rows, save_arrays
from platforms.runtimes.base import Array

BATCH = 8
"""Rows at a time of a model that takes any number."""


def run_rows(
    child: Measurer, loaded: Mapping[str, Any], inputs: Mapping[str, Array]
) -> dict[str, Array]:
    """Return the answers to all rows, by output name.

    Args:
        child: that has loaded the model.
        loaded: what it said of it.
        inputs: by name; axis 0 of each is the rows, at least one.

    Raises:
        MeasuringError: the model refuses them, or its process died.
    """
    is_free = all(item["shape"] and item["shape"][0] == -1 for item in loaded["inputs"])
    first = loaded["inputs"][0]["shape"]
    step = BATCH if is_free else max(1, first[0] if first else 1)
    wants_full = not is_free and step > 1
    total = len(next(iter(inputs.values())))
    parts: list[dict[str, Array]] = []
    with tempfile.TemporaryDirectory(prefix="edgeward-rows-") as name:
        given, answered = Path(name) / "inputs.npz", Path(name) / "outputs.npz"
        for start in range(0, total, step):
            rows = {key: array[start : start + step] for key, array in inputs.items()}
            # A fixed batch is filled up; what was made up is cut off again below.
            save_arrays(given, repeat_rows(rows, step) if wants_full else rows)
            child.ask({"do": "run", "inputs": str(given), "outputs": str(answered), "repeats": 1})
            parts.append(load_arrays(answered))
    return {key: np.concatenate([part[key] for part in parts])[:total] for key in parts[0]}


def describe_tensors(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    """Return tensor specs as the child's `declared` takes them."""
    return [
        {"name": spec.name, "datatype": spec.datatype.value, "shape": list(spec.shape)}
        for spec in specs
    ]
