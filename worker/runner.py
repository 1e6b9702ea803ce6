"""Runs one task: from its JSON text to outcomes.

Thin on purpose: reads inputs, asks the engine, words the outcomes. Never
raises for a job's sake: whatever happens to one job is its outcome.
"""

import base64
import binascii
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.config import Settings
from agent.errors import AgentError, InputError
from agent.fileio import write_atomic
from agent.jobs import JobState
from agent.repository import ModelRepository
from agent.roots import read_below
from worker.engine.control import InferError
from worker.engine.engine import Engine, InferOutcome, InferRequest
from worker.filebatch import FileBatch
from worker.outcome import build_outcome
from worker.processing.step import JobInput
from worker.runs import STATES, Run

log = logging.getLogger(__name__)

Outcomes = list[dict[str, Any]]


class Runner:
    """Runs tasks of the inference handlers.

    Args:
        settings: roots and limits.
        engine: builds the engine on first use, so that a worker starts fast.
    """

    def __init__(self, settings: Settings, engine: Callable[[], Engine]) -> None:
        self._settings = settings
        self._engine = engine
        self._repository = ModelRepository(settings.models_dir)

    def run(self, run: Run) -> Outcomes:
        """Run every job of a task and return their outcomes, in order."""
        task = run.task
        try:
            folder = self._repository.get_folder(task["model"], task["version"])
        except AgentError as exc:
            return [_fail(item, run.began_ms, _wrap(exc)) for item in task["jobs"]]
        run.open_journal(folder.name)
        outcomes: dict[str, dict[str, Any]] = {}
        requests: list[InferRequest] = []
        batches: list[FileBatch] = []
        for item in task["jobs"]:
            if item["body"]["input"].get("files") is not None:
                batches.append(FileBatch(item, self._engine(), folder, self._read_file, run))
                continue
            try:
                requests.append(self._read_request(item))
            except AgentError as exc:
                outcomes[item["id"]] = _fail(item, run.began_ms, _wrap(exc))
        results = self._engine().infer(folder, requests, run.control) if requests else ()
        done = {result.job_id: result for result in results}
        # Each list of files after the others, which are short.
        done.update((batch.job_id, batch.run()) for batch in batches)
        run.enter_all()
        for item in task["jobs"]:
            if item["id"] in done:
                outcomes[item["id"]] = self._word(item, run.began_ms, done[item["id"]], folder)
        return [outcomes[item["id"]] for item in task["jobs"]]

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

    def _word(
        self, item: dict[str, Any], started_ms: int, done: InferOutcome, folder: Path
    ) -> dict[str, Any]:
        if done.error is not None:
            return _fail(item, started_ms, done.error)
        result = {
            "output": self._spill(item, done.value),
            "timings_ms": {
                "pre": round(done.pre_ms, 3),
                "infer": round(done.infer_ms, 3),
                "post": round(done.post_ms, 3),
            },
            "model": done.model,
            "version": int(folder.name),
            "release": done.version,
            "artifact": done.artifact,
            "batch_rows": done.batch_rows,
        }
        return build_outcome(item, started_ms, state=JobState.SUCCEEDED, code="ok", result=result)

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


def _wrap(exc: AgentError) -> InferError:
    return InferError(exc.code, str(exc), exc.retryable)


def _fail(item: dict[str, Any], started_ms: int, error: InferError) -> dict[str, Any]:
    return build_outcome(
        item,
        started_ms,
        state=STATES.get(error.code, JobState.FAILED),
        code=error.code,
        message=error.message,
        retryable=error.retryable,
    )
