"""The `edgeward` command as a user types it: the installed script, in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.harness.waiting import wait_until

PROGRAM = str(Path(sys.executable).with_name("edgeward"))
_COMMAND_LIMIT_S = 60.0
_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 30.0


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment without settings of the machine that runs the tests."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("EDGEWARD_")}
    return {**kept, **(extra or {})}


def run_edgeward(
    *arguments: object, env: Mapping[str, str] | None = None, limit_s: float = _COMMAND_LIMIT_S
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=limit_s,
        env=clean_environment(env),
    )


class UpProcess:
    """A running `edgeward up`."""

    def __init__(self, data_dir: Path, device: str, *more: str, **env: str) -> None:
        self.data_dir = data_dir
        self.device = device
        self._log = data_dir.parent / "up.log"
        options = ("--data-dir", str(data_dir), "--device", device, "--mqtt-port", "0", *more)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                (PROGRAM, "up", *options),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean_environment(env),
            )
        wait_until(self._has_started, _START_LIMIT_S, "`edgeward up` serves")

    def _has_started(self) -> bool:
        assert self._process.poll() is None, self.read_log()
        return (self.data_dir / "run" / "up.json").exists()

    def read_log(self) -> str:
        """Return what it wrote for its user."""
        return self._log.read_text()

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a command on this box."""
        return run_edgeward(*arguments, "--data-dir", self.data_dir)

    def ask(self, *arguments: object, code: int = 0) -> Any:
        """Run a command with `--json` and return what it says."""
        done = self.run(*arguments, "--json")
        assert done.returncode == code, (
            f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return json.loads(done.stdout)

    def find_descendants(self) -> list[psutil.Process]:
        """Return every process below it."""
        found: list[psutil.Process] = psutil.Process(self._process.pid).children(recursive=True)
        return found

    def stop(self) -> int:
        """End it as Ctrl-C does, and return its exit code."""
        self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(_STOP_LIMIT_S)
        finally:
            self._process.kill()
