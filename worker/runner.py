"""Runs one task: from its JSON text to outcomes.

Thin on purpose: reads inputs, asks the engine, words the outcomes. Never
raises for a job's sake: whatever happens to one job is its outcome.
"""

import base64
import binascii
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.config import Settings
from agent.errors import (
    AgentError,
    DigestMismatchError,
    InputError,
    ManifestError,
    VersionNotFoundError,
)
from agent.fileio import write_atomic
from agent.jobs import JobState
from agent.repository import ModelRepository
from agent.roots import read_below
from agent.traffic import Traffic
from platforms.errors import InferenceError, ModelLoadError, NoArtifactError
from worker.engine.control import InferError
from worker.engine.engine import INTERNAL_ERROR, Engine, InferOutcome, InferRequest, Observe
from worker.engine.routing import TrafficRouter
from worker.engine.shadow import Shadow
from worker.errors import ModelConfigError, NanOutputError, OutOfMemoryError, OutputError
from worker.filebatch import FileBatch
from worker.outcome import build_outcome
from worker.processing.step import JobInput
from worker.runs import STATES, Run

log = logging.getLogger(__name__)

Outcomes = list[dict[str, Any]]

# Errors of a version, not of what it was asked: another one may answer in its place.
_VERSION_FAULTS = frozenset(
    error.code
    for error in (
        DigestMismatchError,
        InferenceError,
        ManifestError,
        ModelConfigError,
        ModelLoadError,
        NanOutputError,
        NoArtifactError,
        OutOfMemoryError,
        OutputError,
        VersionNotFoundError,
    )
) | {INTERNAL_ERROR}


@dataclass(frozen=True)
class _Share:
    """Requests of a task that go to one version."""

    folder: Path
    requests: Sequence[InferRequest]
    fallback: Path | None
    """Of the version that answers where this one fails."""
    observe: Observe | None


class Runner:
    """Runs tasks of the inference handlers.

    Args:
        settings: roots and limits.
        engine: builds the engine on first use, so that a worker starts fast.
        router: of who answers beside the active version.
        shadow: sees copies for a candidate.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Callable[[], Engine],
        router: TrafficRouter | None = None,
        shadow: Shadow | None = None,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._router = router
        self._shadow = shadow
        self._repository = ModelRepository(settings.models_dir)

    def run(self, run: Run) -> Outcomes:
        """Run every job of a task and return their outcomes, in order."""
        task = run.task
        try:
            folder = self._repository.get_folder(task["model"], task["version"])
        except AgentError as exc:
            return [_fail(item, run.began_ms, _wrap(exc)) for item in task["jobs"]]
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
        done = self._infer_all(run, folder, requests)
        # Each list of files after the others, which are short.
        if batches:
            run.open_journal(folder.name)
        done.update((batch.job_id, (batch.run(), folder)) for batch in batches)
        run.enter_all()
        for item in task["jobs"]:
            if item["id"] in done:
                outcomes[item["id"]] = self._word(item, run.began_ms, *done[item["id"]])
        return [outcomes[item["id"]] for item in task["jobs"]]

    def _infer_all(
        self, run: Run, folder: Path, requests: Sequence[InferRequest]
    ) -> dict[str, tuple[InferOutcome, Path]]:
        """Run requests by the versions that answer them; each with its version's folder."""
        done: dict[str, tuple[InferOutcome, Path]] = {}
        for share in self._share(run.task, folder, requests) if requests else ():
            run.open_journal(share.folder.name)
            for result, at in self._infer(share, run):
                done[result.job_id] = (result, at)
        return done

    def _share(
        self, task: dict[str, Any], folder: Path, requests: Sequence[InferRequest]
    ) -> list[_Share]:
        """Divide a task's requests among the versions of its model."""
        model = task["model"]
        traffic = None
        if self._router is not None and task["version"] is None:
            traffic = self._router.find(model)
        if self._router is None or traffic is None:
            return [_Share(folder, requests, None, None)]
        keys = {item["id"]: item["body"].get("key") or item["id"] for item in task["jobs"]}
        by_version: defaultdict[str | None, list[InferRequest]] = defaultdict(list)
        for request in requests:
            version = self._router.choose(traffic, model, keys[request.job_id])
            by_version[version].append(request)
        observe = self._build_observer(traffic, model)
        shares = []
        for version, mine in by_version.items():
            at = folder if version is None else self._find_folder(model, version)
            other = self._find_folder(model, traffic.fallback) if version is None else folder
            shares.append(_Share(at or folder, mine, other, observe))
        return shares

    def _build_observer(self, traffic: Traffic, model: str) -> Observe | None:
        shadow = self._shadow
        if shadow is None or traffic.shadow is None:
            return None
        return lambda inputs, outputs: shadow.offer(traffic, model, inputs, outputs)

    def _find_folder(self, model: str, version: str | int | None) -> Path | None:
        if version is None:
            return None
        try:
            return self._repository.get_folder(model, str(version))
        except AgentError as exc:
            log.warning("the traffic of %s names version %s: %s", model, version, exc)
            return None

    def _infer(self, share: _Share, run: Run) -> Iterator[tuple[InferOutcome, Path]]:
        """Run a share; whoever was failed by the version gets its answer from the other one."""
        found = self._engine().infer(
            share.folder, share.requests, run.control, observe=share.observe
        )
        failed = {one.job_id for one in found if one.error and one.error.code in _VERSION_FAULTS}
        for outcome in found:
            if share.fallback is None or outcome.job_id not in failed:
                yield outcome, share.folder
        if share.fallback is not None and failed:
            again = [one for one in share.requests if one.job_id in failed]
            run.open_journal(share.fallback.name)
            for outcome in self._engine().infer(share.fallback, again, run.control):
                yield outcome, share.fallback

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
