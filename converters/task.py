"""What a conversion step is given and gives: the words that all of `converters` share.

Owns the vocabulary (`ModelFormat`, `ModelFile`) and the contract of a tool: one function

    def convert(task: Task) -> Facts

that reads `task.source`, writes `task.target` and returns what is worth telling as a
JSON-ready mapping. It runs in a process of its own (`converters.routes.hop`), on a copy of its
input, under a time and a memory limit, so it may load any library, crash or hang. Nothing here
loads a model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from platforms.artifact import Precision

Facts = Mapping[str, Any]
"""JSON-ready; what a tool tells of its work, such as how many nodes were quantized."""

Report = Callable[[float, str], None]
"""Told of progress: the share that is done, 0…1, and what is being done."""


class ModelFormat(StrEnum):
    """Every form in which a model enters, passes or leaves the converters.

    The values of artifacts are those of `platforms.artifact.ArtifactFormat`.
    """

    CALLABLE = "callable"
    """`FILE.py:NAME`: a function that builds the torch module."""
    STATE_DICT = "state_dict"
    """Weights (safetensors, or a `weights_only` file) that go with such a function."""
    TORCHSCRIPT = "torchscript"
    TORCH_EXPORT = "pt2"
    ONNX = "onnx"
    TFLITE = "tflite"
    SAVED_MODEL = "saved_model"
    OPENVINO = "openvino"
    COREML = "coreml"
    TENSORRT = "tensorrt"
    """An engine: built on the box that runs it, bound to its GPU, never published."""


@dataclass(frozen=True)
class ModelFile:
    """A model on disk."""

    path: Path
    """A file, or a folder (SavedModel, `.mlpackage`). OpenVINO: the `.xml`, its `.bin` beside."""
    format: ModelFormat
    precision: Precision = Precision.FP32
    name: str | None = None
    """Of the function, where the format is `CALLABLE` or `STATE_DICT`."""
    builder: Path | None = None
    """The Python file with that function, where `path` holds the weights."""


@dataclass(frozen=True)
class Task:
    """One step: what a tool gets."""

    source: ModelFile
    """A copy: the original is out of a tool's reach."""
    target: Path
    """What the tool writes, in a folder that is there and its own."""
    scratch: Path
    """An empty folder for whatever else; removed afterwards."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """JSON-ready; each tool documents its own. Files in it are absolute paths."""
    report: Report = lambda share, doing: None


Tool = Callable[[Task], Facts]
