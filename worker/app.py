"""The worker process: a Celery worker of one or more lanes.

Started by `edgeward worker`, never by `celery -A` (which puts the working
directory on the path, and would load a stray `worker.py`). Threads pool for
inference and batch: one copy of each model. Nothing here writes the store.
"""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Celery, signals
from kombu.exceptions import KombuError

from agent.clock import SystemClock
from agent.commands import new_id
from agent.config import Settings
from agent.errors import AgentError
from agent.faults import reach
from agent.jobs import Lane
from agent.platformfile import find_platform, load_platform, look_at_box
from agent.repository import ModelRepository
from agent.sdnotify import notify, watchdog_period_s
from agent.tasks import (
    INFER_TASK,
    MAINTAIN_TASK,
    VersionFigures,
    celery_settings,
    lane_queue,
    outcome_queue,
)
from platforms.errors import PlatformError
from platforms.heap import limit_heaps
from platforms.resources import read_resources
from platforms.selection import Preference
from platforms.spec import PlatformSpec
from platforms.threads import choose_concurrency, compute_sizes
from worker.crashes import report_predecessors
from worker.engine.artifact_cache import ArtifactCache
from worker.engine.configured import configure, warm_up
from worker.engine.control import InferError
from worker.engine.engine import Engine, ServedModel
from worker.engine.memory import MemoryBudget
from worker.engine.routing import TrafficRouter
from worker.engine.sessions import LoadedModel, ModelKey
from worker.engine.shadow import Shadow
from worker.engine.watch import EngineWatch
from worker.errors import WorkerError
from worker.frontend import Frontend, build_costs
from worker.heartbeat import EXIT_HUNG, Heartbeat
from worker.journal import Journal, slot_folder
from worker.oom import find_events_file, read_oom
from worker.outcome import (
    HANG,
    build_outcome,
    send_crash,
    send_death,
    send_outcomes,
    send_progress,
)
from worker.runner import Runner
from worker.runs import STATES, Run, Runs
from worker.staging.preference import find_preference

if TYPE_CHECKING:
    from worker.maintenance import Maintainer

log = logging.getLogger(__name__)


class Worker:
    """One worker process.

    Args:
        settings: this box's settings.
        lanes: the lanes it serves, the first one first.
        slot: its place among the box's workers; unique for each running one.
    """

    def __init__(self, settings: Settings, lanes: Sequence[Lane], slot: str | None = None) -> None:
        self._settings = settings
        self._lanes = lanes
        self._runs = Runs(settings.worker.cancel_grace_s, self._send_progress)
        self._router = TrafficRouter(settings.models_dir)
        self._shadow = Shadow(self._open_shadow)
        self._runner = Runner(settings, lambda: self._engine, self._router, self._shadow)
        self._frontend: Frontend | None = None
        if Lane.INFERENCE in lanes:
            self._frontend = Frontend(settings, lambda: self._engine, self._router, self._shadow)
        self._building = threading.Lock()
        self._id = new_id()
        name = slot or f"{socket.gethostname()}/{'+'.join(lanes)}"
        self._folder = slot_folder(settings.runtime_dir, name)
        self._boot = SystemClock().boot_id()
        self._oom_events = find_events_file()
        self._is_announced = False
        self._reply = outcome_queue(settings.device_id)
        self._heartbeat = Heartbeat(
            settings.queue_url,
            name,
            self._id,
            lanes,
            self._runs,
            self._on_beat,
            self._read_figures,
        )
        self._app = Celery("edgeward-worker", set_as_current=True)
        self._app.conf.update(celery_settings(settings.queue_url))
        self._app.task(self._infer, name=INFER_TASK, ignore_result=True)
        self._app.task(self._maintain, name=MAINTAIN_TASK, ignore_result=True)

    def _open_shadow(self, model: str, version: str) -> tuple[ServedModel, LoadedModel]:
        folder = ModelRepository(self._settings.models_dir).get_folder(model, version)
        key = ModelKey.from_folder(folder)
        loaded = self._engine.load_key(key)
        return self._engine.get_served(key, loaded), loaded

    @property
    def _engine(self) -> Engine:
        # Several threads may be the first to ask; two engines would hold two copies of a model.
        with self._building:
            return self._built_engine

    @cached_property
    def _built_engine(self) -> Engine:
        settings, data_dir = self._settings.worker, self._settings.data_dir
        known = find_platform(data_dir)
        spec = known or look_at_box(data_dir)
        cache_bytes = settings.cache_mb * 10**6
        return Engine(
            spec,
            self._concurrency,
            costs=None if self._frontend is None else build_costs(self._settings),
            configure=configure,
            warm_up=warm_up,
            # A box's first start is long over before all its runtimes are proven.
            prove=None if known else lambda: load_platform(data_dir),
            budget=replace(
                MemoryBudget.from_setting(settings.memory_mb, spec.memory_mb),
                read_available_mb=lambda: read_resources(data_dir).memory_available_mb,
            ),
            pinned=settings.pinned,
            artifacts=ArtifactCache(data_dir / "cache" / "ort", cache_bytes)
            if cache_bytes
            else None,
            prefer=self._prefer,
        )

    def _prefer(self, folder: Path, spec: PlatformSpec) -> Preference | None:
        threads, _ = compute_sizes(spec.cores, self._concurrency)
        return find_preference(self._settings.choices_dir, folder, spec, threads)

    @cached_property
    def _concurrency(self) -> int:
        if self._settings.worker.concurrency:
            return self._settings.worker.concurrency
        data_dir = self._settings.data_dir
        return choose_concurrency((find_platform(data_dir) or look_at_box(data_dir)).cores, 0)

    def run(self) -> int:
        """Serve until SIGTERM; return the exit code."""
        self._open_journal()
        signals.worker_ready.connect(self._on_ready, weak=False)
        if self._frontend is not None:
            self._frontend.start()
        if self._settings.worker.preload:
            threading.Thread(target=self._preload, name="preload", daemon=True).start()
        signals.worker_shutting_down.connect(self._on_stopping, weak=False)
        controller: Any = self._app.Worker(
            hostname=f"edgeward-{os.getpid()}@{socket.gethostname()}",
            pool="threads",
            concurrency=self._concurrency,
            queues=[lane_queue(lane) for lane in self._lanes],
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            loglevel=logging.getLogger().level,
        )
        controller.start()
        if self._frontend is not None:
            self._frontend.stop()
        self._heartbeat.stop()
        self._remove_journal()
        return int(controller.exitcode or 0)

    def _preload(self) -> None:
        """Load the models that are to be ready before the first job asks for them."""
        repository = ModelRepository(self._settings.models_dir)
        for name in self._settings.worker.preload:
            try:
                self._engine.load(repository.get_folder(name))
            except (AgentError, PlatformError, WorkerError) as exc:
                log.warning("model %s cannot be loaded ahead: %s", name, exc)

    def _open_journal(self) -> None:
        try:
            journal = Journal(self._folder, self._id, self._boot, self._concurrency)
        except OSError as exc:
            log.warning("no run journal, so a crash will leave no evidence: %s", exc)
            return
        journal.save_oom(read_oom(self._oom_events))
        faulthandler.enable(journal.trace)
        self._runs.journal = journal

    def _remove_journal(self) -> None:
        if self._runs.journal is not None:
            # Nobody reads its file from here on. Celery has put a logger in place of sys.stderr.
            faulthandler.disable()
            if sys.__stderr__ is not None:
                faulthandler.enable(sys.__stderr__)
            self._runs.journal.remove()

    def _on_ready(self, **_: Any) -> None:
        # Celery says it again after each reconnect.
        if self._is_announced:
            return
        self._is_announced = True
        self._report_predecessors()
        self._heartbeat.start()
        notify("READY=1")
        log.info("worker of %s ready", ", ".join(self._lanes))

    def _report_predecessors(self) -> None:
        """Tell of crashes before the first heartbeat, which frees what the dead one held."""
        try:
            report_predecessors(
                self._folder,
                self._boot,
                read_oom(self._oom_events),
                lambda crash: send_crash(self._app, crash),
                lambda process, signal: send_death(self._app, self._reply, process, signal),
            )
        except (KombuError, OSError) as exc:
            log.warning("a crash could not be told; the next start tries again: %s", exc)

    def _on_stopping(self, **_: Any) -> None:
        notify("STOPPING=1")

    def _on_beat(self) -> None:
        if watchdog_period_s():
            notify("WATCHDOG=1")
        if self._runs.journal is not None:
            self._runs.journal.save_oom(read_oom(self._oom_events))
        hung = self._runs.check()
        if hung:
            self._end_hung(hung)
        self._end_watched()

    def _read_figures(self) -> tuple[float, list[VersionFigures]] | None:
        return self._watch.read() if self._watch is not None else None

    @property
    def _watch(self) -> EngineWatch | None:
        """Return the watch of the engine; None while there is no engine."""
        if "_built_engine" not in self.__dict__:
            return None
        return EngineWatch(self._built_engine, self._router, self._shadow)

    def _end_watched(self) -> None:
        """End the process where a version on probation hangs, and say which: it is rolled back."""
        hung = self._watch.find_hung() if self._watch is not None else None
        if hung is None:
            return
        log.error(
            "a run of %s %s has lasted %.0f s: this process ends",
            hung.model,
            hung.version,
            hung.lasts_s,
        )
        try:
            send_death(self._app, self._reply, self._id, HANG, (hung.model, hung.version))
        except KombuError as exc:
            log.warning("that it hung could not be told: %s", exc)
        self._remove_journal()
        os._exit(EXIT_HUNG)

    def _end_hung(self, hung: Sequence[tuple[Run, InferError]]) -> None:
        """End the process, for a thread cannot be: the supervisor starts a new one.

        A job that ran alone gets its outcome. One of a bundle may be innocent: the
        agent finds the task lost and runs its jobs one by one.
        """
        for run, why in hung:
            log.error(
                "task %s does not stop (%s): this process ends", run.task["task"], why.message
            )
            guilty = run.find_guilty()
            if guilty is not None:
                outcome = build_outcome(
                    guilty,
                    run.began_ms,
                    state=STATES[why.code],
                    code=why.code,
                    message=why.message,
                    retryable=why.retryable,
                )
                try:
                    send_outcomes(self._app, run.task, [outcome])
                except KombuError as exc:
                    log.warning("its outcome could not be sent: %s", exc)
        self._remove_journal()
        os._exit(EXIT_HUNG)

    def _send_progress(self, task: dict[str, Any], job: dict[str, Any]) -> None:
        try:
            send_progress(self._app, task, job)
        except KombuError as exc:
            log.info("progress could not be sent: %s", exc)

    def _infer(self, payload: str) -> None:
        """Run one task; the boundary where an unknown error becomes an outcome."""
        task: dict[str, Any] = json.loads(payload)
        reach("worker.received")
        with self._runs.hold(task) as run:
            self._heartbeat.wake_if_idle()
            outcomes = self._run(run, self._runner.run)
        reach("worker.ran")
        send_outcomes(self._app, task, outcomes)
        reach("worker.sent")

    def _maintain(self, payload: str) -> None:
        """Run one update's part that is a worker's."""
        task: dict[str, Any] = json.loads(payload)
        with self._runs.hold(task) as run:
            self._heartbeat.wake_if_idle()
            outcomes = self._run(run, self._maintainer.run)
        reach("update.told")
        send_outcomes(self._app, task, outcomes)

    @cached_property
    def _maintainer(self) -> "Maintainer":
        # It brings NumPy and the runtimes' adapters, which a worker of other lanes has anyhow.
        from worker.maintenance import Maintainer

        return Maintainer(self._settings)

    def _run(self, run: Run, work: Callable[[Run], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        try:
            return work(run)
        except Exception:  # the task boundary of style.md
            log.exception("internal_error in task %s", run.task["task"])
            message = "the worker failed; its log has the traceback"
            return [
                build_outcome(
                    item, run.began_ms, state="failed", code="internal_error", message=message
                )
                for item in run.task["jobs"]
            ]


def run_worker(settings: Settings, lanes: Sequence[Lane], slot: str | None = None) -> int:
    """Run a worker of these lanes until a signal ends it; return the exit code."""
    limit_heaps()
    return Worker(settings, lanes, slot).run()
