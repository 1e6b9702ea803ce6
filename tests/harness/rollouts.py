"""`edgeward rollout` as processes on one state folder."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.harness.commands import PROGRAM, clean_environment, run_edgeward

_END_LIMIT_S = 40.0
_DISCOVER = ("--discover", 0.5)


class RolloutProcess:
    """A `rollout start` or `resume` that runs, and the other commands beside it."""

    def __init__(self, folder: Path, port: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.state = folder / "rollouts"
        self._lines = folder / "rollout.jsonl"
        self._errors = folder / "rollout.err"
        self._environment = {"EDGEWARD_MQTT__PORT": str(port)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, release: str, *options: object, model: str = "detector") -> None:
        """Begin a rollout; returns at once."""
        self._spawn("start", model, release, "--yes", *_DISCOVER, *options)

    def resume(self) -> None:
        """Go on with it; returns at once."""
        self._spawn("resume", self.rollout_id, *_DISCOVER)

    def _spawn(self, *arguments: object) -> None:
        with self._lines.open("ab") as lines, self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                [PROGRAM, "rollout", *map(str, arguments), "--state", self.state, "--json"],
                stdout=lines,
                stderr=errors,
                env=clean_environment(self._environment),
            )

    def wait(self) -> int:
        """Wait for its end and return its exit code."""
        assert self._process is not None
        process, self._process = self._process, None
        try:
            return process.wait(_END_LIMIT_S)
        finally:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL, "it ended before it was killed"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run another command on the same folder to its end."""
        return run_edgeward(
            "rollout", *arguments, "--state", self.state, "--json", env=self._environment
        )

    def status(self) -> Any:
        """Return the whole of the rollout, as the file has it."""
        done = self.run("status", self.rollout_id)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Return the events of one kind so far, over all processes."""
        text = self._lines.read_text() if self._lines.exists() else ""
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
        return [line for line in found if line.get("event") == event]

    @property
    def rollout_id(self) -> str:
        return str(self.lines("started")[0]["rollout"])

    def errors(self) -> str:
        return self._errors.read_text()
