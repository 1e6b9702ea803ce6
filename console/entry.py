"""The entry point of `edgeward`: the agent by a short way, everything else by Typer.

The agent stays for months on a small box: without Typer and what it brings it
is online 0.2 s earlier and 3 MB smaller. Only plain calls go the short way;
`--help`, a mistake or a bad setting go to Typer, which words them.
"""

import faulthandler
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from platforms.telemetry import forbid_telemetry

_OPTIONS = {"--config": "config", "--data-dir": "data_dir", "--device": "device_id"}


def find_agent_options(argv: Sequence[str]) -> dict[str, str] | None:
    """Return the options of a plain `edgeward agent` call, or None for any other."""
    found: dict[str, str] = {}
    words = iter(argv)
    commands = []
    for word in words:
        name, equals, value = word.partition("=")
        if name in _OPTIONS:
            value = value if equals else next(words, "")
            if not value:
                return None
            found[_OPTIONS[name]] = value
        elif word.startswith("-"):
            return None
        else:
            commands.append(word)
    return found if commands == ["agent"] else None


def _load(options: dict[str, str]) -> Any:
    """Return the settings, or None where Typer should word what is wrong with them."""
    from agent.config import load_settings
    from agent.errors import ConfigError

    config = Path(options.pop("config")) if "config" in options else None
    flags: dict[str, Any] = dict(options)
    if "data_dir" in flags:
        flags["data_dir"] = Path(flags["data_dir"]).absolute()
    try:
        return load_settings(config, flags)
    except ConfigError:
        return None


def _serve_agent(settings: Any) -> int:
    from agent.daemon.supervisor import run_agent
    from agent.errors import AgentError
    from agent.logs import set_up_logs

    # SIGABRT, as systemd's watchdog sends it, writes the stacks of all threads.
    faulthandler.enable()
    set_up_logs(settings.log_level, as_json=settings.log_json)
    try:
        run_agent(settings)
    except AgentError as exc:
        print(f"error: {exc} [{exc.code}]", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"error: {exc} [os_error]", file=sys.stderr)
        return 1
    return 0


def main() -> None:
    """Run the command line; ends the process with the command's exit code."""
    # Here too, for what a user's own step or a demo imports.
    forbid_telemetry()
    options = find_agent_options(sys.argv[1:])
    settings = None if options is None else _load(options)
    if settings is not None:
        sys.exit(_serve_agent(settings))
    from console.cli import main as run_typer

    run_typer()


if __name__ == "__main__":
    main()
