"""One job over many files: read, run and collect, a few at a time.

Owns how many go into the engine at once, and the list that becomes the result.
A bad file is an entry with an error; the job fails only where all are bad, with
what was wrong with the first. Between two calls of the engine the job says how
far it is, and stops if it must.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agent.errors import AgentError
from worker.engine.control import InferError
from worker.engine.engine import Engine, InferOutcome, InferRequest
from worker.processing.step import JobInput
from worker.runs import Run

UNIT = "files"
_FILES_MAX = 16
# What the files of one call may have together; one file always goes.
_READ_BYTES = 16 << 20
# A call should take about so long: progress is told, and a stop is seen, in between.
_FAST_S, _SLOW_S = 0.25, 1.0


class FileBatch:
    """A job with a list of files.

    Args:
        item: the job as the task carries it.
        engine: runs them.
        folder: of the model version.
        read_file: reads one, given `{"file": path}`; raises `AgentError`s.
        run: the task that the job is part of.
    """

    def __init__(
        self,
        item: dict[str, Any],
        engine: Engine,
        folder: Path,
        read_file: Callable[[dict[str, Any]], bytes],
        run: Run,
    ) -> None:
        self.job_id: str = item["id"]
        self._files: Sequence[str] = item["body"]["input"]["files"]
        self._params = item["body"].get("params") or {}
        self._engine = engine
        self._folder = folder
        self._read_file = read_file
        self._run = run
        self._size = 1
        self._entries: list[dict[str, Any]] = []
        self._first_error: InferError | None = None
        self._total = InferOutcome(self.job_id)

    def run(self) -> InferOutcome:
        """Run all files; the value is a list of one entry a file, in order."""
        control = self._run.control
        control.enter((self.job_id,))
        self._report()
        for files, inputs in self._iter_calls():
            started = time.monotonic()
            self._call(files, inputs)
            why = control.find_stop(self.job_id)
            if why is not None:
                self._total.error = why
                return self._total
            self._adapt(time.monotonic() - started)
            self._report()
            control.enter((self.job_id,))
            if self._total.error is not None:
                return self._total
        if self._first_error is not None and all("error" in entry for entry in self._entries):
            self._total.error = self._first_error
        self._total.value = self._entries
        return self._total

    def _iter_calls(self) -> Iterator[tuple[list[str], list[bytes | InferError]]]:
        """Read files until there are enough for a call of the engine."""
        files: list[str] = []
        inputs: list[bytes | InferError] = []
        size_bytes = 0
        for file in self._files:
            content = self._read(file)
            files.append(file)
            inputs.append(content)
            size_bytes += len(content) if isinstance(content, bytes) else 0
            if len(files) >= self._size or size_bytes >= _READ_BYTES:
                yield files, inputs
                files, inputs, size_bytes = [], [], 0
        if files:
            yield files, inputs

    def _read(self, file: str) -> bytes | InferError:
        try:
            return self._read_file({"file": file})
        except AgentError as exc:
            return InferError(exc.code, str(exc), exc.retryable)

    def _call(self, files: Sequence[str], inputs: Sequence[bytes | InferError]) -> None:
        """Run those files that could be read, and add an entry for each."""
        requests = [
            InferRequest(self.job_id, JobInput(data=content), self._params)
            for content in inputs
            if isinstance(content, bytes)
        ]
        if not requests:
            outcomes: Iterator[InferOutcome] = iter(())
        else:
            outcomes = iter(self._engine.infer(self._folder, requests, self._run.control))
        for file, content in zip(files, inputs, strict=True):
            if isinstance(content, InferError):
                self._add_error(file, content)
            else:
                self._add(file, next(outcomes))

    def _add(self, file: str, outcome: InferOutcome) -> None:
        total = self._total
        if not outcome.model:
            # The model itself does not load: no other file would fare better.
            total.error = outcome.error
        total.model, total.version = outcome.model, outcome.version
        total.artifact = outcome.artifact
        total.pre_ms += outcome.pre_ms
        total.infer_ms += outcome.infer_share_ms
        total.post_ms += outcome.post_ms
        total.batch_rows = max(total.batch_rows, outcome.batch_rows)
        if outcome.error is not None:
            self._add_error(file, outcome.error)
        else:
            self._entries.append({"file": file, "output": outcome.value})

    def _add_error(self, file: str, error: InferError) -> None:
        self._first_error = self._first_error or error
        shown = {"code": error.code, "message": error.message}
        self._entries.append({"file": file, "error": shown})

    def _adapt(self, spent_s: float) -> None:
        if spent_s < _FAST_S:
            self._size = min(_FILES_MAX, self._size * 2)
        elif spent_s > _SLOW_S:
            self._size = max(1, self._size // 2)

    def _report(self) -> None:
        self._run.report(self.job_id, len(self._entries), len(self._files), UNIT)
