"""One step of a conversion: one tool, on a copy, in a process of its own.

Owns what a step promises, whatever its tool does: the original is read and never written; a tool
sees a copy, and what comes of a copy that it overwrote is refused; a tool that fails, hangs,
takes too much or is called off ends with everything it started; what it leaves is taken over
only when it is whole, and moved into place by renaming.

Every exception is a `converters.errors.ConversionError`.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.errors import (
    ConversionError,
    HopFailedError,
    InputChangedError,
    SourceError,
    ToolMissingError,
)
from converters.routes.registry import PYTHON_OPTION, Surroundings, ToolEntry, find_obstacle
from converters.routes.toolprocess import Limits, ToolProcess
from converters.routes.workspace import compute_digest, copy_model, encode_model
from converters.task import Facts, ModelFile, Report
from platforms.artifact import Precision

__all__ = ["HopResult", "Limits", "run_hop"]

_ORIGIN = "EDGEWARD_SOURCE_FOLDER"
"""Tells a tool the original's folder: a Python file may import what lies beside it."""


@dataclass(frozen=True)
class HopResult:
    """What a step left, and what it took."""

    file: ModelFile
    facts: Facts
    """What the tool told; its `precision` is the file's."""
    log: str
    """The end of what it printed."""
    duration_s: float
    peak_mb: float
    """Most resident memory of all its processes, in 10⁶ bytes, looked at every 0.1 s."""


def _stay_quiet(share: float, doing: str) -> None:
    """Report to nobody."""


def _go_on() -> bool:
    return False


def run_hop(
    tool: ToolEntry,
    source: ModelFile,
    target: Path,
    options: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    report: Report = _stay_quiet,
    is_canceled: Callable[[], bool] = _go_on,
) -> HopResult:
    """Run one tool on a copy of `source` and move what it makes to `target`.

    Blocks until the tool has ended. Writes below `target`'s folder only: a workspace that is
    removed again, and at the end the result with the files that belong to it (`.bin`), in
    place of what has these names.

    Args:
        tool: what to run.
        source: of a format that the tool takes.
        target: a file, or the folder of a format that is one; its parent is there.
        options: JSON-ready, for the tool; paths in it are absolute.
        limits: on time and memory.
        report: called with the tool's progress, 0…1.
        is_canceled: asked about ten times a second.

    Raises:
        ToolMissingError: what the tool needs is not installed; names the extra.
        SourceError: the source is not there, is not whole, or the tool refuses it.
        OperatorError: an operator has no form in the target; names it.
        HopTimeoutError, HopMemoryError: a limit was reached; everything was ended.
        HopFailedError: the tool failed, died, or left no result or an empty one.
        InputChangedError: the copy, or the original, was changed meanwhile.
        ConversionCanceledError: `is_canceled` said so.
    """
    _verify_fit(tool, source, options or {})
    started = time.monotonic()
    digest = compute_digest(source)
    with _make_workspace(target.parent) as folder:
        copy = copy_model(source, folder / "in")
        made = folder / "out" / target.name
        origin = source.builder or source.path
        request = {
            "entry": tool.entry,
            "source": encode_model(copy),
            "target": str(made),
            "scratch": str(folder / "scratch"),
            "options": dict(options or {}),
        }
        variables = {_ORIGIN: str(origin.resolve().parent)}
        place = folder / "temporary"
        with ToolProcess(tool.name, request, place, limits or Limits(), variables) as child:
            facts = child.wait(report, is_canceled)
            log = child.log
        _verify_unchanged(tool, copy, digest, log)
        _verify_original(source, digest, log)
        _verify_result(tool, made, log)
        _move(made.parent, target)
    precision = Precision(facts.get("precision", tool.precision or source.precision))
    return HopResult(
        file=ModelFile(target, tool.target, precision),
        facts=facts,
        log=log,
        duration_s=time.monotonic() - started,
        peak_mb=child.peak_mb,
    )


def _verify_fit(tool: ToolEntry, source: ModelFile, options: Mapping[str, Any]) -> None:
    here = Surroundings()
    if options.get(PYTHON_OPTION):
        here = replace(here, get_variable=lambda name: str(options[PYTHON_OPTION]))
    obstacle = find_obstacle(tool, here)
    if obstacle is not None:
        raise ToolMissingError(obstacle)
    if source.format not in tool.sources:
        msg = f"{tool.name} does not read {source.format}: plan a route to {tool.target}"
        raise SourceError(msg)


@contextmanager
def _make_workspace(parent: Path) -> Iterator[Path]:
    """Make the folders of one step, beside the target so that a rename takes it over."""
    try:
        # The real path: macOS has links above its temporary folders.
        folder = Path(tempfile.mkdtemp(prefix=".hop-", dir=parent.resolve(strict=True)))
        for name in ("in", "out", "scratch", "temporary"):
            (folder / name).mkdir()
    except OSError as exc:
        msg = f"nothing can be written to {parent}: {exc.strerror}"
        raise ConversionError(msg) from exc
    try:
        yield folder
    finally:
        # Whatever cannot be removed, such as a folder that a tool took the rights of, is not
        # worth an error in place of the step's own.
        shutil.rmtree(folder, ignore_errors=True)


def _verify_unchanged(tool: ToolEntry, copy: ModelFile, digest: str, log: str) -> None:
    if _is_changed(copy, digest):
        msg = (
            f"{tool.name} overwrote its input (a copy: {copy.path.name} itself is untouched); "
            "what it made of it is not used"
        )
        raise InputChangedError(msg, log)


def _verify_original(source: ModelFile, digest: str, log: str) -> None:
    if _is_changed(source, digest):
        msg = f"{source.path} changed while it was being converted: convert it again"
        raise InputChangedError(msg, log)


def _is_changed(model: ModelFile, digest: str) -> bool:
    try:
        return compute_digest(model) != digest
    except SourceError:
        return True


def _verify_result(tool: ToolEntry, made: Path, log: str) -> None:
    """Refuse a result that is not there, is empty, or leads elsewhere by a link."""
    found = [made, *made.parent.rglob("*")]
    if any(path.is_symlink() for path in found):
        msg = f"{tool.name} left a link in place of a file"
        raise HopFailedError(msg, log)
    if not made.exists():
        msg = f"{tool.name} ended well and wrote nothing: there is no {made.name}"
        raise HopFailedError(msg, log)
    files = made.rglob("*") if made.is_dir() else iter([made])
    if not any(path.is_file() and path.stat().st_size for path in files):
        msg = f"{tool.name} ended well and left {made.name} empty"
        raise HopFailedError(msg, log)


def _move(folder: Path, target: Path) -> None:
    """Move everything below `folder` beside `target`, the target last."""
    entries = sorted(folder.iterdir(), key=lambda path: path.name == target.name)
    try:
        for entry in entries:
            place = target.parent / entry.name
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            entry.replace(place)
    except OSError as exc:
        msg = f"the result cannot be moved to {target}: {exc.strerror}"
        raise ConversionError(msg) from exc
