"""What every recipe's tool begins and ends with: its options, its library, its facts.

Owns the checks that must be the same for all recipes, so that a misspelt option or a missing
library is told in one way. Imports no toolchain by itself.
"""

import importlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from converters.errors import RecipeError, ToolMissingError
from converters.task import Task
from platforms.artifact import TensorSpec
from platforms.runtimes.base import LoadOptions, Session
from platforms.runtimes.registry import get_runtime
from platforms.telemetry import forbid_telemetry

TOOL_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What the libraries raise on models they do not know what to do with; none documents a set."""

_OF_THE_HOP = frozenset({"origin"})
"""What `converters.routes.hop` may add for every tool; no recipe has a use for it."""


def read_options(task: Task, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the task's options over their defaults.

    Raises:
        RecipeError: an option is unknown, or of another type than its default (None: of any).
    """
    given = {name: value for name, value in task.options.items() if name not in _OF_THE_HOP}
    unknown = sorted(given.keys() - defaults.keys())
    if unknown:
        msg = f"unknown option {', '.join(unknown)}; known are {', '.join(sorted(defaults))}"
        raise RecipeError(msg)
    found = {**defaults, **given}
    for name, default in defaults.items():
        if default is not None and not _is_alike(found[name], default):
            msg = f"option {name} is like {default!r}, not {found[name]!r:.80}"
            raise RecipeError(msg)
    return found


def _is_alike(value: object, default: object) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return type(value) is type(default)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, list | tuple):
        return isinstance(value, list | tuple)
    return isinstance(value, type(default))


def get_choice(options: Mapping[str, Any], name: str, allowed: tuple[Any, ...]) -> Any:
    """Return an option that has few values.

    Raises:
        RecipeError: it has none of them.
    """
    if options[name] not in allowed:
        listed = ", ".join(map(str, allowed))
        msg = f"option {name} is one of {listed}, not {options[name]!r:.80}"
        raise RecipeError(msg)
    return options[name]


def get_calibration_file(options: Mapping[str, Any]) -> Path:
    """Return the option `calibration`, which a recipe cannot do without.

    Raises:
        RecipeError: it is not given.
    """
    if not options["calibration"]:
        msg = "this recipe needs calibration data: give some with --calibration"
        raise RecipeError(msg)
    return Path(options["calibration"])


def import_library(module: str, extra: str) -> ModuleType:
    """Import a recipe's library.

    Raises:
        ToolMissingError: it is not installed, or cannot be imported here.
    """
    forbid_telemetry()
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        name = exc.name or module
        msg = f"{name} cannot be imported ({exc}): pip install 'edgeward[{extra}]'"
        raise ToolMissingError(msg) from exc


def read_versions(*packages: str) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def open_session(path: Path, runtime: str) -> Session:
    """Load a model to look at its inputs or run it, on one thread; close it afterwards.

    Raises:
        PlatformError: the runtime is missing, or refuses the file.
    """
    return get_runtime(runtime).load(path, LoadOptions(threads=1))


def read_inputs(path: Path, runtime: str) -> tuple[TensorSpec, ...]:
    """Return what a model takes.

    Raises:
        PlatformError: the runtime is missing, or refuses the file.
    """
    session = open_session(path, runtime)
    try:
        return session.inputs
    finally:
        session.close()


def measure_size(path: Path) -> int:
    """Return the bytes of a model: a file, a folder, or an `.xml` with its `.bin`."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    beside = path.with_suffix(".bin") if path.suffix == ".xml" else None
    size = path.stat().st_size
    return size + beside.stat().st_size if beside is not None and beside.exists() else size


def tell(
    task: Task, recipe: str, no_op: str | None, packages: tuple[str, ...], **more: Any
) -> dict[str, Any]:
    """Return the facts that every recipe tells, and more.

    Args:
        task: done.
        recipe: its name in `recipes`.
        no_op: why the result is no smaller or faster than the source, or None.
        packages: whose versions are worth telling.
        more: JSON-ready.
    """
    before, after = measure_size(task.source.path), measure_size(task.target)
    return {
        "recipe": recipe,
        "is_no_op": no_op is not None,
        "no_op_reason": no_op,
        "source_size_bytes": before,
        "size_bytes": after,
        "size_ratio": round(after / before, 4) if before else None,
        "tools": read_versions(*packages),
        **more,
    }
