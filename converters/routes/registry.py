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

TOOLS: tuple[ToolEntry, ...] = ()


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
