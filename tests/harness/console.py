"""`edgeward console listen` as a process, and the other commands on its store."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.harness.commands import PROGRAM, clean_environment, run_edgeward


class ConsoleProcess:
    """`edgeward console listen` on a file, and the other commands beside it."""

    def __init__(self, folder: Path, port: int) -> None:
        self.store = folder / "console.db"
        self.port = port
        self.lines_path = folder / "listen.jsonl"
        self._errors = folder / "listen.err"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return clean_environment({"EDGEWARD_MQTT__PORT": str(self.port)})

    def start(self, *arguments: str) -> None:
        with self.lines_path.open("ab") as lines, self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                [PROGRAM, "console", "listen", "--store", self.store, "--json", *arguments],
                stdout=lines,
                stderr=errors,
                env=self.environment,
            )

    def end(self, number: signal.Signals) -> int:
        assert self._process is not None
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            return process.wait(10)
        finally:
            process.kill()

    def close(self) -> None:
        if self._process is not None:
            self.end(signal.SIGKILL)

    def ask(self, *arguments: object, code: int = 0) -> Any:
        done = run_edgeward(
            "console",
            *arguments,
            "--store",
            self.store,
            "--json",
            env={"EDGEWARD_MQTT__PORT": str(self.port)},
        )
        assert done.returncode == code, f"{done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def submit(self, folder: Path, count: int = 1, device: str = "box-7") -> list[str]:
        """Put jobs into the store and return their ids."""
        paths = [folder / f"{number}.bin" for number in range(count)]
        for path in paths:
            path.write_bytes(b"data")
        answer = self.ask("submit", "m", *paths, "--device", device)
        return [job["job_id"] for job in answer["jobs"]]

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines_path.read_text().splitlines()]

    def errors(self) -> str:
        return self._errors.read_text()
