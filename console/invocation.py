"""What every command shares: the common options, the settings, errors and exit codes.

Owns the boundary at which an expected error becomes one line and an exit code. The
common options stand before the command or after it; after it wins.

Kept light: a command imports what it needs when it runs, so that `edgeward agent` is
online in time.
"""

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from console.exits import EXPECTED_ERRORS, Exit, code_of, exit_of
from console.output import Output

if TYPE_CHECKING:
    from agent.config import Settings

_PANEL = "Common options"

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings file (TOML).", rich_help_panel=_PANEL),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Ledger, models, inbox and results.",
        rich_help_panel=_PANEL,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="ID", help="The box's id on MQTT.", rich_help_panel=_PANEL),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Write one JSON document.", rich_help_panel=_PANEL),
]


@dataclass(frozen=True)
class CommonOptions:
    """The options that every command takes."""

    config: Path | None = None
    data_dir: Path | None = None
    device: str | None = None
    as_json: bool = False

    def over(self, before: "CommonOptions") -> "CommonOptions":
        """Return these options, with those given before the command where these are silent."""
        return CommonOptions(
            self.config or before.config,
            self.data_dir or before.data_dir,
            self.device or before.device,
            self.as_json or before.as_json,
        )

    def to_flags(self) -> dict[str, Any]:
        """Return the settings that these options set."""
        flags: dict[str, Any] = {}
        if self.data_dir is not None:
            flags["data_dir"] = self.data_dir.absolute()
        if self.device is not None:
            flags["device_id"] = self.device
        return flags


class Invocation:
    """One run of one command.

    Args:
        options: the common options, from before and after the command.
    """

    def __init__(self, options: CommonOptions) -> None:
        self.options = options
        self.out = Output(as_json=options.as_json)

    @cached_property
    def settings(self) -> "Settings":
        """The settings of this box.

        Raises:
            ConfigError: one is unknown or has a value that cannot be used.
        """
        return self.load_settings({})

    @cached_property
    def box_settings(self) -> "Settings":
        """The settings of the box that runs here.

        Where an `edgeward up` runs on the data folder, its device id and its brokers count,
        whatever it was given on its command line; an option of this command wins.

        Raises:
            ConfigError: one is unknown or has a value that cannot be used.
        """
        from console.boxstate import read_up_flags

        flags = {**read_up_flags(self.settings), **self.options.to_flags()}
        return self.load_settings(flags) if flags else self.settings

    def load_settings(self, flags: Mapping[str, Any]) -> "Settings":
        """Return the settings with further flags over all others.

        Raises:
            ConfigError: one is unknown or has a value that cannot be used.
        """
        from agent.config import load_settings

        return load_settings(self.options.config, {**self.options.to_flags(), **flags})


_COMMON = {
    "config": (ConfigOption, None),
    "data_dir": (DataDirOption, None),
    "device": (DeviceOption, None),
    "as_json": (JsonOption, False),
}


def command(
    app: typer.Typer, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command of `app`.

    The function's first parameter receives the `Invocation`; the common options are
    added to its own (one of the same name stands for itself), and its expected errors
    become a line and an exit code.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = set(inspect.signature(function).parameters)

        @wraps(function)
        def run(context: typer.Context, **given: Any) -> None:
            options = CommonOptions(**{key: given.pop(key) for key in _COMMON if key not in own})
            invocation = Invocation(options.over(context.obj or CommonOptions()))
            _guard(invocation.out, lambda: function(invocation, **given))

        _declare_common(run, function)
        app.command(name)(run)
        return function

    return register


def _declare_common(run: Callable[..., None], function: Callable[..., None]) -> None:
    """Give the wrapper the signature that typer reads: context, own, and common options."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    parameters = [inspect.Parameter("context", keyword, annotation=typer.Context)]
    parameters += [parameter.replace(kind=keyword) for parameter in own]
    parameters += [
        inspect.Parameter(key, keyword, default=default, annotation=annotation)
        for key, (annotation, default) in _COMMON.items()
        if key not in {item.name for item in own}
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {item.name: item.annotation for item in parameters}
    # Typer would follow it back to the function as it was written.
    del run.__wrapped__  # type: ignore[attr-defined]


def _guard(out: Output, call: Callable[[], None]) -> None:
    """Run a command; an expected error becomes a line and an exit code."""
    try:
        call()
        sys.stdout.flush()
    except EXPECTED_ERRORS as exc:
        out.fail(code_of(exc), str(exc))
        raise typer.Exit(exit_of(exc)) from exc
    except BrokenPipeError as exc:
        # The reader, such as `head`, has seen enough; Python would complain at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(Exit.OK) from exc
    except OSError as exc:
        out.fail("os_error", _describe_os_error(exc))
        raise typer.Exit(Exit.ERROR) from exc


def _describe_os_error(exc: OSError) -> str:
    where = f"{exc.filename}: " if exc.filename else ""
    hint = (
        "; choose a folder of your own with --data-dir" if isinstance(exc, PermissionError) else ""
    )
    return f"{where}{exc.strerror or exc}{hint}"


def end_with(code: Exit) -> None:
    """End the command with `code`; go on where that is success.

    Raises:
        typer.Exit: it is not.
    """
    if code is not Exit.OK:
        raise typer.Exit(code)
