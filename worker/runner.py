"""Runs one task: from its JSON text to outcomes.

Thin on purpose: reads inputs, asks the engine, words the outcomes. Never
raises for a job's sake: whatever happens to one job is its outcome.
"""

import base64
import binascii
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agent.config import Settings
from agent.errors import AgentError, InputError
from agent.fileio import write_atomic
from agent.jobs import JobState
from agent.repository import ModelRepository
from agent.roots import read_below
from platforms.errors import RunStoppedError
from platforms.runtimes.stop import current
from worker.control import RunControl
from worker.engine.engine import Engine, InferOutcome, InferRequest
from worker.journal import RunJournal
from worker.outcome import build_outcome, build_stopped, now_ms
from worker.processing.step import JobInput

log = logging.getLogger(__name__)

Outcomes = list[dict[str, Any]]


# Enough to fill a batch, few enough that a cancel or a progress is not long in coming.
_FILES_AT_ONCE = 16
_PROGRESS_PERIOD_S = 1.0


class _Run:
    """One task on its way."""

    def __init__(
        self, task: dict[str, Any], control: RunControl, folder: Path, started_ms: int
    ) -> None:
        self.task = task
        self.control = control
        self.folder = folder
        self.started_ms = started_ms
        self.items: dict[str, dict[str, Any]] = {item["id"]: item for item in task["jobs"]}
        self.last: InferOutcome | None = None
        """The last file that ran well."""


class _Pace:
    """When progress is told, and what."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._began = self._told = time.monotonic()

    def is_due(self, done: int) -> bool:
        """Say whether a second has passed since the last time; the end is told by the outcome."""
        return done < self._total and time.monotonic() - self._told >= _PROGRESS_PERIOD_S

    def describe(self, item: dict[str, Any], done: int) -> dict[str, Any]:
        """Return the progress of a job."""
        self._told = time.monotonic()
        eta_s = (self._told - self._began) / done * (self._total - done) if done else None
        return {
            "id": item["id"],
            "attempt": item["attempt"],
            "done": done,
            "total": self._total,
            "unit": "files",
            "eta_s": None if eta_s is None else round(eta_s, 1),
        }


class Runner:
    """Runs tasks of the inference handlers.

    Args:
        settings: roots and limits.
        engine: builds the engine on first use, so that a worker starts fast.
        journal: notes what runs, for the case that it does not survive it.
        send_progress: sends how far a job is; must not raise.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Callable[[], Engine],
        journal: RunJournal,
        send_progress: Callable[[dict[str, Any], dict[str, Any]], None],
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._journal = journal
        self._send_progress = send_progress
        self._repository = ModelRepository(settings.models_dir)

    def run(self, task: dict[str, Any], control: RunControl) -> Outcomes:
        """Run every job of a task and return their outcomes, in order."""
        started_ms = now_ms()
        try:
            folder = self._repository.get_folder(task["model"], task["version"])
        except AgentError as exc:
            return [_fail(item, started_ms, exc) for item in task["jobs"]]
        folder = folder.resolve()
        run = _Run(task, control, folder, started_ms)
        outcomes: dict[str, dict[str, Any]] = {}
        requests: list[InferRequest] = []
        for item in task["jobs"]:
            if item["body"]["input"].get("files") is not None:
                outcomes[item["id"]] = self._run_files(run, item)
                continue
            try:
                requests.append(self._read_request(item))
            except AgentError as exc:
                outcomes[item["id"]] = _fail(item, started_ms, exc)
        outcomes.update(self._run_requests(run, requests))
        return [outcomes[item["id"]] for item in task["jobs"]]

    def _run_requests(
        self, run: "_Run", requests: Sequence[InferRequest]
    ) -> dict[str, dict[str, Any]]:
        """Run requests as one bundle; where it is stopped, the innocent ones one by one."""
        if not requests:
            return {}
        done = self._infer(run, requests)
        cause = run.control.cause
        stopped = [item for item in requests if _is_stopped(done[item.job_id])]
        outcomes = {
            result.job_id: self._word(run, result)
            for result in done.values()
            if not _is_stopped(result)
        }
        if len(requests) == 1 and stopped and cause is not None:
            item = run.items[stopped[0].job_id]
            return {item["id"]: build_stopped(item, run.started_ms, cause)}
        for request in stopped:
            outcomes.update(self._run_requests(run, [request]))
        return outcomes

    def _infer(self, run: "_Run", requests: Sequence[InferRequest]) -> dict[str, InferOutcome]:
        items = [run.items[request.job_id] for request in requests]
        limit_s = max(item["timeout_s"] for item in items)
        progress_limits = [item.get("progress_timeout_s") for item in items]
        progress_limit_s = min((limit for limit in progress_limits if limit), default=None)
        token = run.control.begin([item["id"] for item in items], limit_s, progress_limit_s)
        mark = current.set(token)
        try:
            with self._journal.running(run.task, run.folder.name, items):
                results = self._engine().infer(run.folder, requests)
        finally:
            current.reset(mark)
            run.control.end()
        return {result.job_id: result for result in results}

    # --- jobs of many files --------------------------------------------------------------------

    def _run_files(self, run: "_Run", item: dict[str, Any]) -> dict[str, Any]:
        """Run a job of many files, some at a time, and tell how far it is."""
        files: list[str] = item["body"]["input"]["files"]
        answers: list[dict[str, Any]] = []
        pace = _Pace(len(files))
        token = run.control.begin([item["id"]], item["timeout_s"], item.get("progress_timeout_s"))
        mark = current.set(token)
        try:
            with self._journal.running(run.task, run.folder.name, [item]):
                for start in range(0, len(files), _FILES_AT_ONCE):
                    some = files[start : start + _FILES_AT_ONCE]
                    answers += self._run_some(run, item, some, start)
                    if token.is_stopped:
                        break
                    run.control.note_progress()
                    if pace.is_due(len(answers)):
                        self._send_progress(run.task, pace.describe(item, len(answers)))
        finally:
            cause = run.control.cause
            current.reset(mark)
            run.control.end()
        if cause is not None and token.is_stopped:
            return build_stopped(item, run.started_ms, cause)
        return self._word_files(run, item, answers)

    def _run_some(
        self, run: "_Run", item: dict[str, Any], files: Sequence[str], start: int
    ) -> list[dict[str, Any]]:
        answers: dict[int, dict[str, Any]] = {}
        requests: list[InferRequest] = []
        params = item["body"].get("params") or {}
        for number, file in enumerate(files, start):
            try:
                data = self._read_file({"file": file})
                requests.append(InferRequest(str(number), JobInput(data=data), params))
            except AgentError as exc:
                answers[number] = _word_error(file, exc.code, str(exc))
        for done in self._engine().infer(run.folder, requests):
            number = int(done.job_id)
            file = files[number - start]
            if done.error is not None:
                answers[number] = _word_error(file, done.error.code, done.error.message)
            else:
                answers[number] = {"file": file, "output": done.value}
                run.last = done
        return [answers[number] for number in sorted(answers)]

    def _word_files(
        self, run: "_Run", item: dict[str, Any], answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        errors = [answer["error"] for answer in answers if "error" in answer]
        if run.last is None or len(errors) == len(answers):
            code, message = errors[0]["code"], f"all files are bad; first: {errors[0]['message']}"
            return build_outcome(
                item, run.started_ms, state=JobState.FAILED, code=code, message=message
            )
        result = {
            "output": self._spill(item, answers),
            "timings_ms": {},
            "model": run.last.model,
            "version": int(run.folder.name),
            "release": run.last.version,
            "artifact": run.last.artifact,
            "files": len(answers),
            "errors": len(errors),
        }
        return build_outcome(
            item, run.started_ms, state=JobState.SUCCEEDED, code="ok", result=result
        )

    # --- one job -------------------------------------------------------------------------------

    def _read_request(self, item: dict[str, Any]) -> InferRequest:
        body = item["body"]
        given = body["input"]
        if given.get("tensors") is not None:
            read = JobInput(tensors=given["tensors"])
        elif given.get("data_b64") is not None:
            read = JobInput(data=_decode(given["data_b64"]))
        else:
            read = JobInput(data=self._read_file(given))
        return InferRequest(item["id"], read, body.get("params") or {})

    def _read_file(self, given: dict[str, Any]) -> bytes:
        return read_below(
            self._settings.input_roots,
            given["file"],
            self._settings.limits.input_bytes,
            sha256=given.get("sha256"),
            size_bytes=given.get("size_bytes"),
        )

    def _word(self, run: "_Run", done: InferOutcome) -> dict[str, Any]:
        item = run.items[done.job_id]
        if done.error is not None:
            return build_outcome(
                item,
                run.started_ms,
                state=JobState.FAILED,
                code=done.error.code,
                message=done.error.message,
                retryable=done.error.retryable,
            )
        result = {
            "output": self._spill(item, done.value),
            "timings_ms": {
                "pre": round(done.pre_ms, 3),
                "infer": round(done.infer_ms, 3),
                "post": round(done.post_ms, 3),
            },
            "model": done.model,
            "version": int(run.folder.name),
            "release": done.version,
            "artifact": done.artifact,
            "batch_rows": done.batch_rows,
        }
        return build_outcome(
            item, run.started_ms, state=JobState.SUCCEEDED, code="ok", result=result
        )

    def _spill(self, item: dict[str, Any], value: Any) -> Any:
        """Return the value, or a reference to a file where it is too large to travel."""
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
        if len(text) <= self._settings.limits.result_bytes:
            return value
        folder = self._settings.results_dir
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{item['id']}.{item['attempt']}.json"
        write_atomic(path, text)
        data = text.encode()
        return {
            "file": str(path.relative_to(self._settings.data_dir)),
            "sha256": hashlib.sha256(data).hexdigest(),
            "size_bytes": len(data),
        }


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        msg = f"input.data_b64 is not base64: {exc}"
        raise InputError(msg) from exc


def _fail(item: dict[str, Any], started_ms: int, exc: AgentError) -> dict[str, Any]:
    return build_outcome(
        item,
        started_ms,
        state=JobState.FAILED,
        code=exc.code,
        message=str(exc),
        retryable=exc.retryable,
    )


def _word_error(file: str, code: str, message: str) -> dict[str, Any]:
    return {"file": file, "error": {"code": code, "message": message}}


def _is_stopped(done: InferOutcome) -> bool:
    return done.error is not None and done.error.code == RunStoppedError.code
