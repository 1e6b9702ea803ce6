"""The way from what is given to what is wanted: a chain of tools.

Pure but for the question which tools are installed, which a caller may answer itself. The shortest
chain of usable tools wins; of equal ones the first by the registry's order. Where no chain of
usable tools exists, the shortest of all, so that running it says what to install.
"""

from collections.abc import Sequence
from typing import Any

from converters.errors import NoRouteError
from converters.routes.registry import (
    TOOLS,
    Surroundings,
    ToolEntry,
    describe_tool,
    find_obstacle,
)
from converters.task import ModelFile, ModelFormat

_TORCH = frozenset(
    {
        ModelFormat.CALLABLE,
        ModelFormat.STATE_DICT,
        ModelFormat.TORCH_EXPORT,
        ModelFormat.TORCHSCRIPT,
    }
)
_TORCH_SOURCE = "a torch source (FILE.py:NAME, .pt2 or TorchScript)"


def plan(
    source: ModelFile | ModelFormat,
    target: ModelFormat,
    tools: Sequence[ToolEntry] = TOOLS,
    here: Surroundings | None = None,
) -> list[ToolEntry]:
    """Return the tools to run one after another; none where the source is the target already.

    Args:
        source: what is given.
        target: the format that is wanted.
        tools: to choose from.
        here: the machine that they would run on; this one where left out.

    Raises:
        NoRouteError: no chain of tools leads there; says why and what source would do.
    """
    given = source.format if isinstance(source, ModelFile) else source
    usable = [tool for tool in tools if find_obstacle(tool, here) is None]
    for choice in (usable, tools):
        route = _find_shortest(given, target, choice)
        if route is not None:
            return route
    raise NoRouteError(_explain(given, target, tools))


def _find_shortest(
    given: ModelFormat, target: ModelFormat, tools: Sequence[ToolEntry]
) -> list[ToolEntry] | None:
    routes: dict[ModelFormat, list[ToolEntry]] = {given: []}
    pending = [given]
    while pending and target not in routes:
        at = pending.pop(0)
        for tool in tools:
            if at in tool.sources and tool.target not in routes:
                routes[tool.target] = [*routes[at], tool]
                pending.append(tool.target)
    return routes.get(target)


def _explain(given: ModelFormat, target: ModelFormat, tools: Sequence[ToolEntry]) -> str:
    what = f"nothing here turns {given} into {target}"
    if target is ModelFormat.COREML and given not in _TORCH:
        return (
            f"{what}: coremltools has read no ONNX since version 6 and reads torch here; give "
            f"{_TORCH_SOURCE}"
        )
    if target in _TORCH:
        return f"{what}: no tool makes a torch model of another format; give {_TORCH_SOURCE}"
    if given in (ModelFormat.OPENVINO, ModelFormat.COREML, ModelFormat.TENSORRT):
        return f"{what}: {given} is an end of conversion; give what it was made from"
    would_do = [
        source.value for source in ModelFormat if _find_shortest(source, target, tools) is not None
    ]
    return f"{what}; what would do: {', '.join(would_do) or 'nothing'}"


def describe_routes(here: Surroundings | None = None) -> list[dict[str, Any]]:
    """Return one JSON-ready row a tool: from, to, whether it can run here and why not."""
    return [describe_tool(tool, here) for tool in TOOLS]


def list_routes(here: Surroundings | None = None) -> list[dict[str, Any]]:
    """Return one JSON-ready row a pair of formats: the chain of tools, and what is missing."""
    rows = []
    for source in ModelFormat:
        for target in ModelFormat:
            if source is target:
                continue
            try:
                route = plan(source, target, here=here)
            except NoRouteError as exc:
                rows.append(_make_row(source, target, [], str(exc)))
                continue
            obstacles = [find_obstacle(tool, here) for tool in route]
            missing = "; ".join(why for why in obstacles if why)
            rows.append(_make_row(source, target, [tool.name for tool in route], missing))
    return rows


def _make_row(
    source: ModelFormat, target: ModelFormat, route: list[str], obstacle: str
) -> dict[str, Any]:
    return {
        "from": source.value,
        "to": target.value,
        "route": route,
        "is_available": bool(route) and not obstacle,
        "obstacle": obstacle,
    }


def format_routes(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of `list_routes` that have a route as a table for a person."""
    cells = [("from", "to", "route", "")]
    cells += [
        (row["from"], row["to"], " → ".join(row["route"]), row["obstacle"])
        for row in rows
        if row["route"]
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)
