"""Updates, as a maintenance worker does its part of them: find or fetch a release, and stage it.

    in the repository? ─ no ─► fetch it from the box's source ─► install, inactive
        └───────────────────────────────► stage ─► outcome: what was found, and the choice

Owns the order of these steps and the words of their outcome. Changes no active version: that is the
agent's part, once the outcome is committed.

Invariants: each step may be done twice, so a worker may die anywhere; a cancel is obeyed between
trials and between pieces of a download; no version is installed that was not verified.
"""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.choice import ChoiceRecord, compute_digest
from agent.commands import read_update_params
from agent.config import Settings
from agent.errors import AgentError, PathNotAllowedError, VersionNotFoundError
from agent.faults import reach
from agent.jobs import JobState
from agent.lifecycle import UpdateParams
from agent.platformfile import load_platform
from agent.release import BUNDLES
from agent.repository import ModelRepository, ModelVersion
from agent.tasks import STAGED
from platforms.errors import PlatformError
from platforms.threads import choose_concurrency, compute_sizes
from worker.engine.control import InferError
from worker.errors import NotProvenError, WorkerError
from worker.outcome import build_outcome
from worker.runs import STATES, Run
from worker.staging.stage import Stager, StageRequest
from worker.staging.trial import TrialLimits

log = logging.getLogger(__name__)

_MEMORY_SHARE = 0.5
_UNIT = "trials"


class _StoppedError(Exception):
    """The job was cancelled, or is past its time."""

    def __init__(self, why: InferError) -> None:
        super().__init__(why.message)
        self.why = why


@dataclass(frozen=True)
class _Job:
    """One update."""

    item: Mapping[str, Any]
    model: str
    release: str
    params: UpdateParams

    @property
    def id(self) -> str:
        return str(self.item["id"])


class Maintainer:
    """Runs the tasks of the lane maintenance.

    Args:
        settings: of the box.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._repository = ModelRepository(settings.models_dir)
        # Two stagings at a time would measure each other.
        self._alone = threading.Lock()

    def run(self, run: Run) -> list[dict[str, Any]]:
        """Run every job of a task and return their outcomes, in order."""
        with self._alone:
            return [self._run(run, item) for item in run.task["jobs"]]

    def _run(self, run: Run, item: dict[str, Any]) -> dict[str, Any]:
        run.control.enter_alone(item["id"])
        staged: dict[str, Any] | None = None
        try:
            params = read_update_params(item["body"].get("params") or {})
            job = _Job(item, run.task["model"], str(run.task["version"]), params)
            version, facts = self._find(run, job)
            staged = {**self._describe(job, version), **facts}
            run.open_journal(version.folder.name)
            record = self._stage(run, job, version)
        except _StoppedError as exc:
            return _fail(item, run, exc.why, None)
        except NotProvenError as exc:
            found = {**(staged or {}), "choice": _summarize(exc.record)}
            return _fail(item, run, InferError(exc.code, str(exc), exc.retryable), found)
        except (AgentError, PlatformError, WorkerError) as exc:
            return _fail(item, run, InferError(exc.code, str(exc), exc.retryable), None)
        result = {STAGED: {**staged, "choice": _summarize(record)}}
        return build_outcome(
            item, run.began_ms, state=JobState.SUCCEEDED, code="staged", result=result
        )

    def _find(self, run: Run, job: _Job) -> tuple[ModelVersion, dict[str, Any]]:
        """Return the version in the repository, fetched where it is not there, and what to keep.

        Raises:
            VersionNotFoundError: it is not there, and there is nowhere to fetch it from.
            AgentError, WorkerError: as `Installer.install`.
        """
        if job.params.bundle is None:
            try:
                return self._repository.get_version(job.model, job.release), {}
            except AgentError as exc:
                if self._settings.updates.url is None:
                    msg = (
                        f"release {job.release} of {job.model!r} is not on this box, and no source "
                        "of releases is set: set updates.url, drop a bundle into the inbox's "
                        "_releases, or add it with `edgeward models add --no-activate`"
                    )
                    raise VersionNotFoundError(msg) from exc
        # Only who fetches needs TUF: 20 MB.
        from worker.update.install import Installer, describe_floors, read_floors

        def report(done: int, total: int) -> None:
            _check(run, job.id)
            run.report(job.id, done, total, "bytes")

        reach("update.fetching")
        installed = Installer(self._settings, load_platform(self._settings.data_dir)).install(
            job.model,
            job.release,
            read_floors(run.task.get("floors")),
            report,
            self._find_bundle(job),
        )
        reach("update.fetched")
        facts = {
            "floors": describe_floors(installed.floors),
            "is_stale": installed.is_stale,
            "bytes_total": installed.report.bytes_total,
            "bytes_fetched": installed.report.bytes_fetched,
        }
        return installed.version, facts

    def _find_bundle(self, job: _Job) -> Path | None:
        if job.params.bundle is None:
            return None
        folder = (self._settings.inbox_dir / BUNDLES).resolve()
        path = (folder / job.params.bundle).resolve()
        if not path.is_relative_to(folder):
            msg = f"params.bundle: {job.params.bundle!r} is not below {folder}"
            raise PathNotAllowedError(msg)
        return path

    def _describe(self, job: _Job, version: ModelVersion) -> dict[str, Any]:
        return {
            "model": job.model,
            "release": version.release,
            "number": version.number,
            "digest": compute_digest(version.folder),
            "params": job.params.model_dump(mode="json", exclude_defaults=True),
        }

    def _stage(self, run: Run, job: _Job, version: ModelVersion) -> ChoiceRecord:
        spec = load_platform(self._settings.data_dir)
        concurrency = choose_concurrency(spec.cores, self._settings.worker.concurrency or 0)
        threads, _ = compute_sizes(spec.cores, concurrency)

        def report(done: int, total: int, _next: str) -> None:
            _check(run, job.id)
            run.report(job.id, done, total, _UNIT)

        rules = self._settings.updates
        limit_mb = rules.trial_memory_mb or _MEMORY_SHARE * spec.memory_mb
        request = StageRequest(
            version.folder,
            job.params.policy,
            self._find_active(job.model),
            TrialLimits(rules.trial_timeout_s, limit_mb, rules.point_s),
        )
        reach("update.staging")
        return Stager(spec, threads, self._settings.choices_dir).stage(request, report)

    def _find_active(self, model: str) -> Path | None:
        try:
            return self._repository.get_version(model).folder
        except AgentError:
            return None


def _check(run: Run, job_id: str) -> None:
    """End a job that must not go on.

    Raises:
        _StoppedError: it was cancelled, or is past its time.
    """
    why = run.control.find_stop(job_id)
    if why is not None:
        raise _StoppedError(why)


def _summarize(record: ChoiceRecord) -> dict[str, Any]:
    """Return what a console is told of a staging: each candidate's verdict and figures."""
    return {
        "reason": record.reason,
        "objective": record.objective,
        "measured_at": record.measured_at,
        "has_golden": record.has_golden,
        "candidates": [
            {
                "file": one.file,
                "runtime": one.runtime,
                "verdict": one.verdict.value,
                "reason": one.reason,
                "p95_ms": one.p95_ms,
                "rows_per_s": one.rows_per_s,
                "rss_mb": one.rss_mb,
                "load_ms": one.load_ms,
                "agreement": one.golden and one.golden.top_1,
            }
            for one in record.trials
        ],
    }


def _fail(
    item: dict[str, Any], run: Run, error: InferError, staged: dict[str, Any] | None
) -> dict[str, Any]:
    return build_outcome(
        item,
        run.began_ms,
        state=STATES.get(error.code, JobState.FAILED),
        code=error.code,
        message=error.message,
        retryable=error.retryable,
        result=None if staged is None else {STAGED: staged},
    )
