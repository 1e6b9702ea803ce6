"""Which tools there are, said without importing any of them.

Owns the declaration of a tool (`ToolEntry`), the table of those that lead from one format to
another, and the answer to "can it run here", which looks for packages without importing them.

Invariants: importing this module imports no toolchain. The order of the table is the order of
preference between routes of the same length.
"""

import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from converters.task import ModelFormat
from platforms.artifact import Precision

_EXTRA = "pip install 'edgeward[{}]'"


@dataclass(frozen=True)
class ToolEntry:
    """One tool, declared."""

    name: str
    sources: tuple[ModelFormat, ...]
    target: ModelFormat
    entry: str
    """`package.module:function` of its `converters.task.Tool`, imported by the child only."""
    modules: tuple[str, ...] = ()
    """What it imports; looked for before it runs."""
    extra: str = "convert"
    """Of Edgeward, that brings these modules."""
    precision: Precision | None = None
    """Of what comes out; None: as the source's."""
    systems: tuple[str, ...] = ()
    """`sys.platform` values it is limited to; empty for any."""
    machines: tuple[str, ...] = ()
    """`platform.machine()` values it is limited to; empty for any."""
    python_below: tuple[int, int] | None = None
    environment: str | None = None
    """Variable that names the Python interpreter of an environment of the tool's own, where
    its packages cannot share ours."""
    advice: str = ""
    """What to do where it is missing, if that is not to install the extra."""
    note: str = ""
    """What a person should know of it."""


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


@dataclass(frozen=True)
class Surroundings:
    """The machine that the tools would run on."""

    system: str = sys.platform
    machine: str = field(default_factory=platform.machine)
    python: tuple[int, int] = sys.version_info[:2]
    has_module: Callable[[str], bool] = _has_module
    get_variable: Callable[[str], str | None] = os.environ.get


def find_obstacle(tool: ToolEntry, here: Surroundings | None = None) -> str | None:
    """Return why a tool cannot run here and what to do about it, or None where it can."""
    here = here or Surroundings()
    if tool.systems and here.system not in tool.systems:
        return f"{tool.name} runs on {' and '.join(tool.systems)} only, not on {here.system}"
    if tool.machines and here.machine not in tool.machines:
        return f"{tool.name} runs on {' and '.join(tool.machines)} only, not on {here.machine}"
    if tool.python_below is not None and here.python >= tool.python_below:
        limit = ".".join(map(str, tool.python_below))
        return f"{tool.name} needs a Python below {limit}"
    if tool.environment is not None and not here.get_variable(tool.environment):
        return f"{tool.name} needs an environment of its own: {tool.advice}"
    missing = [name for name in tool.modules if not here.has_module(name)]
    if missing:
        advice = tool.advice or _EXTRA.format(tool.extra)
        return f"{tool.name} needs {', '.join(missing)}, not installed here: {advice}"
    return None


_TOOLS = "converters.routes.tools"
_TORCH = (
    ModelFormat.CALLABLE,
    ModelFormat.STATE_DICT,
    ModelFormat.TORCH_EXPORT,
    ModelFormat.TORCHSCRIPT,
)

_OF_MODULE = (ModelFormat.CALLABLE, ModelFormat.STATE_DICT)
_X86_OR_MAC = ("x86_64", "arm64", "AMD64")

ONNX2TF_VARIABLE = "EDGEWARD_ONNX2TF_PYTHON"
PYTHON_OPTION = "python"
"""Option of a tool with an environment of its own, in place of its variable."""

TOOLS: tuple[ToolEntry, ...] = (
    ToolEntry(
        name="torch.export",
        sources=(*_OF_MODULE, ModelFormat.TORCHSCRIPT),
        target=ModelFormat.TORCH_EXPORT,
        entry=f"{_TOOLS}.torch_export:convert",
        modules=("torch",),
    ),
    ToolEntry(
        name="torch.onnx",
        sources=_TORCH,
        target=ModelFormat.ONNX,
        entry=f"{_TOOLS}.torch_onnx:convert",
        modules=("torch", "onnx", "onnxscript"),
        note="opset 18, IR 10, batch free; one file below 2 GB",
    ),
    ToolEntry(
        name="torch.jit",
        sources=(*_OF_MODULE, ModelFormat.TORCH_EXPORT),
        target=ModelFormat.TORCHSCRIPT,
        entry=f"{_TOOLS}.torch_script:convert",
        modules=("torch",),
        note="deprecated by torch 2.13: prefer pt2",
    ),
    ToolEntry(
        name="litert-torch",
        sources=_TORCH,
        target=ModelFormat.TFLITE,
        entry=f"{_TOOLS}.torch_litert:convert",
        modules=("torch", "litert_torch", "ai_edge_litert"),
        extra="convert-litert",
        systems=("linux", "darwin"),
        machines=_X86_OR_MAC,
        note="batch 1; 64-bit whole numbers become 32-bit",
    ),
    ToolEntry(
        name="coremltools",
        sources=_TORCH,
        target=ModelFormat.COREML,
        entry=f"{_TOOLS}.torch_coreml:convert",
        modules=("torch", "coremltools"),
        systems=("linux", "darwin"),
        machines=_X86_OR_MAC,
        python_below=(3, 14),
        note="mlprogram for iOS 16 / macOS 13, batch 1 to 64; 64-bit whole numbers become 32-bit",
    ),
    ToolEntry(
        name="openvino",
        sources=(ModelFormat.ONNX, ModelFormat.SAVED_MODEL, ModelFormat.TFLITE),
        target=ModelFormat.OPENVINO,
        entry=f"{_TOOLS}.any_openvino:convert",
        modules=("openvino",),
        extra="openvino",
        note="reads a SavedModel without TensorFlow",
    ),
    ToolEntry(
        name="onnx2tf",
        sources=(ModelFormat.ONNX,),
        target=ModelFormat.TFLITE,
        entry=f"{_TOOLS}.onnx_litert:convert",
        modules=("ai_edge_litert",),
        extra="litert",
        environment=ONNX2TF_VARIABLE,
        advice="python3.12 -m venv DIR && DIR/bin/pip install onnx2tf==2.6.9, then set "
        f"{ONNX2TF_VARIABLE}=DIR/bin/python",
        note="worked on 3 of 11 real models; give the torch source where there is one",
    ),
    ToolEntry(
        name="tf2onnx",
        sources=(ModelFormat.SAVED_MODEL, ModelFormat.TFLITE),
        target=ModelFormat.ONNX,
        entry=f"{_TOOLS}.tensorflow_onnx:convert",
        modules=("tensorflow", "tf2onnx", "onnx"),
        extra="tf",
    ),
    ToolEntry(
        name="tensorrt",
        sources=(ModelFormat.ONNX,),
        target=ModelFormat.TENSORRT,
        entry=f"{_TOOLS}.onnx_tensorrt:convert",
        modules=("tensorrt",),
        advice="on a box with an NVIDIA GPU: pip install tensorrt (on a Jetson it is part of "
        "JetPack)",
        note="built on the box that runs it, at staging; never published",
    ),
)


def describe_tool(tool: ToolEntry, here: Surroundings | None = None) -> dict[str, Any]:
    """Return a JSON-ready row about one tool."""
    obstacle = find_obstacle(tool, here)
    return {
        "tool": tool.name,
        "from": [source.value for source in tool.sources],
        "to": tool.target.value,
        "precision": "as the source" if tool.precision is None else tool.precision.value,
        "extra": tool.extra,
        "is_available": obstacle is None,
        "obstacle": obstacle or "",
        "note": tool.note,
    }
