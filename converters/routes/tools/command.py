"""A converter that is a program of its own: run, its output passed on, its failure reported."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from converters.errors import HopFailedError

_LAST_LINES = 6


_OURS = ("PYTHONPATH", "PYTHONHOME")
"""Variables that would lead another interpreter to our packages."""


def run_command(
    name: str, command: Sequence[str], folder: Path, *, is_isolated: bool = False
) -> str:
    """Run a program in `folder` and return what it printed, which goes to this log as well.

    Blocks until it ends; the hop around this process is what limits and kills it.

    Args:
        name: for messages.
        command: the program and its arguments.
        folder: its working directory.
        is_isolated: the program is of another environment, and is not to see our packages.

    Raises:
        HopFailedError: it cannot be started, or ended with another status than 0.
    """
    left_out = _OURS if is_isolated else ()
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={key: value for key, value in os.environ.items() if key not in left_out},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as exc:
        msg = f"{name} cannot be started ({command[0]}): {exc.strerror}"
        raise HopFailedError(msg) from exc
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        sys.stderr.write(line)
        lines.append(line)
    code = process.wait()
    text = "".join(lines)
    if code:
        last = "\n".join([line for line in text.splitlines() if line.strip()][-_LAST_LINES:])
        msg = f"{name} ended with {code}: {last}"
        raise HopFailedError(msg)
    return text
