"""The step `byte_window`: the first and last bytes of a file as whole numbers.

Owns the feature extraction of magika's models, which any model on raw bytes may use.

Source: magika 1.0.3, `Magika._extract_features_from_seekable`. Its comment says that
a short file is stripped on both sides; its code strips the beginning on the left and
the end on the right only, whatever the size, and that is what the model was served
with, so it is what is done here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from agent.manifest import Manifest
from platforms.artifact import Datatype
from platforms.runtimes.base import Array, is_shape_allowed
from worker.errors import StepParamsError
from worker.processing.step import JobInput, Preprocessor, StepParams, get_bytes, parse_params
from worker.processing.tensor import TensorInput

_Count = Annotated[int, Field(ge=0, le=1 << 20)]


class WindowParams(StepParams):
    """Parameters of the step `byte_window`; the defaults are magika's standard_v3_3."""

    begin: _Count = 1024
    """Bytes from the start."""
    end: _Count = 1024
    """Bytes from the end."""
    block: _Count = 4096
    """How far in to look from either side for bytes that are no whitespace."""
    padding: int = 256
    """The number that stands where the file has no byte."""


class WindowStep:
    """Turns a file's bytes into `int32[1, begin + end]`."""

    def __init__(self, params: WindowParams, name: str, prepared: TensorInput) -> None:
        """Keep the parameters and the name of the model's input."""
        self._params = params
        self._name = name
        self._prepared = prepared

    def __call__(self, given: JobInput) -> dict[str, Array]:
        """Return the window of the file in `given.data`; an empty file is all padding.

        Tensors that a job brings instead are taken as already prepared.

        Raises:
            PreprocessError: the job brought no bytes, or tensors that do not fit.
        """
        if given.tensors is not None:
            return self._prepared(given)
        return {self._name: extract_window(get_bytes(given, "byte_window"), self._params)}


def extract_window(data: bytes, params: WindowParams) -> Array:
    """Return `int32[1, begin + end]`: 0–255 for a byte, `padding` where there is none.

    The beginning is filled from the left, the end from the right, each without the
    whitespace before and after it (ASCII, as `bytes.strip`).
    """
    first = data[: params.block].lstrip()[: params.begin]
    last = data[max(len(data) - params.block, 0) :].rstrip()
    last = last[max(len(last) - params.end, 0) :]
    window = np.full((1, params.begin + params.end), params.padding, dtype=np.int32)
    window[0, : len(first)] = np.frombuffer(first, dtype=np.uint8)
    window[0, window.shape[1] - len(last) :] = np.frombuffer(last, dtype=np.uint8)
    return window


def build_byte_window(params: Mapping[str, Any], manifest: Manifest, folder: Path) -> Preprocessor:
    """Return the step `byte_window` for a model with one INT32 input.

    Raises:
        StepParamsError: a parameter is bad, or the model's input is not what it makes.
    """
    del folder
    parsed = parse_params("byte_window", WindowParams, params)
    first = manifest.inputs[0]
    made = (1, parsed.begin + parsed.end)
    fits = is_shape_allowed(first.shape, made) and first.datatype is Datatype.INT32
    if len(manifest.inputs) != 1 or not fits or made[1] == 0:
        msg = f"step byte_window makes one INT32 tensor of shape {list(made)}, not what is declared"
        raise StepParamsError(msg)
    return WindowStep(parsed, first.name, TensorInput(manifest))
