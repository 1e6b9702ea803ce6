"""The agent as a whole: builds the parts, starts them in order, watches and stops them.

Start: migrate → count the boot → recover → threads → first turns → READY=1.
Watch: every second the main thread looks whether each loop has turned; a loop
that stands still stops the feeding of systemd's watchdog.
Stop: intake ends first, then everything committed is reported as far as the
connection allows, `stopped` is published, the store is closed.
"""

import gc
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from sqlalchemy import Connection

from agent.clock import Clock, SystemClock, format_ms
from agent.commands import (
    SUBMIT,
    UPDATE,
    Envelope,
    encode,
    encode_body,
    new_id,
    parse_submit,
)
from agent.config import Settings
from agent.daemon.dispatch import Dispatcher
from agent.daemon.figures import FigureReader
from agent.daemon.guard import Guard
from agent.daemon.inbox import Inbox
from agent.daemon.intake import Intake
from agent.daemon.messages import Call, Message, Spooled, SyncDue, Wake
from agent.daemon.metrics import AgentCollector, JobTimes, MetricsServer
from agent.daemon.mqtt import MqttSession
from agent.daemon.opening import open_ledger, report_recovery
from agent.daemon.outcomes import OutcomeConsumer
from agent.daemon.presence import PROTOCOL_VERSIONS, Presence
from agent.daemon.reporter import Reporter
from agent.daemon.storage import Storage
from agent.daemon.updater import Updater
from agent.daemon.writer import Writer
from agent.errors import MetricsError, StoreDamagedError, StoreError
from agent.faults import reach
from agent.fileio import write_atomic
from agent.jobs import Source
from agent.lease import list_leases
from agent.lifecycle import DesiredModel
from agent.platformfile import find_platform, load_platform
from agent.repository import ModelRepository
from agent.sdnotify import notify, watchdog_period_s
from agent.store import outbox
from agent.store.bounds import OutboxBounds
from agent.store.database import open_engine, transaction
from agent.store.facts import ensure_identity
from agent.store.ledger import Ledger, LedgerPolicy
from agent.store.outbox import read_counter, save_counter
from agent.store.quarantine import read_quarantine
from agent.store.records import build_telemetry
from agent.store.recovery import check_whole, suspect_ledger
from agent.store.retention import Retention
from agent.topics import Topics
from agent.window import BoxView
from platforms.heap import limit_heaps, release_freed
from platforms.resources import read_is_on_mains, read_resources
from platforms.spec import PlatformSpec

log = logging.getLogger(__name__)

STATUS_FILE = "status.json"
_TICK_S = 1.0
_STATUS_S = 2.0
_STALL_S = 20.0
_DAY_MS = 86_400_000
# 100 jobs a second can be forgotten, which is more than an edge box is asked for day after day.
_HOUSEKEEPING_S = 30.0
_DELETE_AT_ONCE = 3000
_CHECK_AFTER_S = 300.0


class Agent:
    """One device's agent.

    Args:
        settings: the device's settings.
        clock: wall and boot time.
    """

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self._topics = Topics(settings.device_id)
        self._mailbox: SimpleQueue[Message] = SimpleQueue()
        self._stop = threading.Event()
        self._started_at = self._clock.wall_ms()
        self._spec: PlatformSpec | None = None
        self._boot = 0
        self._models_stamp: tuple[Any, ...] = ()
        self._engine = open_engine(settings.ledger_file, settings.store.synchronous)
        self._repository = ModelRepository(settings.models_dir)
        self._guard = Guard(self._repository)
        limits = settings.store
        self._storage = Storage(settings.data_dir, limits.min_free_bytes, limits.ballast_bytes)
        self._retention = Retention(self._clock, limits.keep_ends_days, limits.keep_bodies_days)
        policy = LedgerPolicy(
            settings.queue.aging_s, settings.queue.retry_delay_s, settings.queue.retry_delay_max_s
        )
        ledger = Ledger(self._topics, self._clock, policy)
        self._ledger = ledger
        self._damage: StoreDamagedError | None = None
        self._claim: int | None = None
        self._times = JobTimes()
        self._metrics: MetricsServer | None = None
        self._writer = self._build_writer()
        post = self._mailbox.put
        self._session = MqttSession(
            settings, self._topics, post, self._next_conn, self._report_takeover
        )
        self._dispatcher = Dispatcher(
            settings.device_id,
            settings.queue_url,
            settings.queue,
            ledger,
            self._clock,
            post,
            self._guard.verify,
            self._view_box,
        )
        self._outcomes = OutcomeConsumer(
            settings.device_id, settings.queue_url, self._dispatcher, post
        )
        self._reporter = Reporter(settings, self._session, self._clock)
        self._presence = Presence(
            settings,
            self._topics,
            self._session,
            self._clock,
            info=self._describe,
            reported=self._describe_models,
            health=self._measure,
            ask_sync=lambda: post(SyncDue()),
        )
        self._intake = Intake(
            settings,
            self._topics,
            ledger,
            self._retention,
            self._clock,
            self._repository.has_active,
            self._guard.verify,
            self._presence.answer,
        )
        self._updater = Updater(
            settings,
            self._clock,
            ledger,
            self._repository,
            self._writer.call,
            FigureReader(settings.queue_url).read,
            self._view_box,
            self._submit_update,
            lambda job_id: post(Spooled(Source.LOCAL, cancel=job_id)),
        )
        self._intake.unread = self._session.take_unread
        self._writer.seen_ms = self._retention.seen_ms
        self._session.watch_mailbox(self._mailbox.qsize)
        self._inbox = Inbox(settings, self._clock, self._intake.build_job, self._read_jobs, post)
        self._writer.attach(
            self._session,
            self._intake,
            self._dispatcher,
            self._reporter,
            self._presence,
            self._updater,
        )

    def _build_writer(self) -> Writer:
        limits = self._settings.outbox
        return Writer(
            self._engine,
            self._ledger,
            self._mailbox,
            self._topics,
            OutboxBounds(limits.result_bytes, limits.result_days, limits.events, limits.telemetry),
            self._storage,
            self._on_ended,
            self._guard.update,
            self._on_damage,
        )

    # --- start and stop --------------------------------------------------------------------

    def run(self) -> None:
        """Run until SIGTERM or SIGINT; then stop cleanly.

        Raises:
            StoreDamagedError: the ledger was found damaged while running; the next start
                recovers it.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        self.start()
        try:
            self._watch()
        finally:
            self.stop()
        if self._damage is not None:
            raise self._damage

    def start(self) -> None:
        """Recover and start every thread; `_watch` says when each loop has turned once."""
        opened = open_ledger(self._settings.ledger_file, self._engine, self._storage, self._recover)
        self._claim = opened.claim
        if opened.recovery is not None:
            recovery = opened.recovery
            log.error("the ledger was damaged: %s", recovery.why)
            with transaction(self._engine) as tx:
                report_recovery(tx, self._ledger, self._clock, recovery)
                self._reporter.start(tx, self._boot, self._presence.ledger)
        reach("recovery.counted")
        self._spec = find_platform(self._settings.data_dir)
        self._writer.start()
        self._serve_metrics()
        if self._settings.mqtt.enabled:
            self._session.start()
        self._dispatcher.start()
        self._outcomes.start()
        self._updater.start()
        if self._settings.inbox.enabled:
            self._inbox.start()
        threading.Thread(target=self._look_at_box, name="detect", daemon=True).start()
        threading.Thread(target=self._check_later, name="check", daemon=True).start()
        reach("recovery.started")
        log.info("agent %s started, boot %d", self._settings.device_id, self._boot)

    def _serve_metrics(self) -> None:
        """Serve metrics where that is wanted; without them everything else goes on."""
        if self._settings.metrics.port is None:
            return
        try:
            self._metrics = MetricsServer(self._settings.metrics, self._build_collector)
        except MetricsError as exc:
            log.error("%s; the agent goes on without", exc)  # noqa: TRY400

    def _build_collector(self) -> AgentCollector:
        return AgentCollector(
            self._settings.ledger_file, self._clock, self._times, self._measure, _read_version()
        )

    def _recover(self, tx: Connection) -> None:
        """Count this boot and take over what the last run left under way."""
        reach("recovery.migrated")
        self._boot = read_counter(tx, "boot") + 1
        save_counter(tx, "boot", self._boot)
        self._presence.boot = self._boot
        self._presence.ledger = ensure_identity(tx)
        self._reporter.start(tx, self._boot, self._presence.ledger)
        self._intake.begin(self._presence.ledger)
        self._ledger.schedule.begin(tx)
        self._retention.begin(tx)
        self._guard.update(read_quarantine(tx))
        self._updater.begin(tx)
        tasks = self._ledger.find_tasks(tx)
        self._dispatcher.adopt((task_id, lane) for task_id, (lane, _, _) in tasks.items())
        self._writer.open_jobs = sum(self._ledger.count_open(tx).values())
        if self._writer.open_jobs:
            log.info("%d jobs are open, %d tasks under way", self._writer.open_jobs, len(tasks))

    def stop(self) -> None:
        """Stop every thread and close the store."""
        notify("STOPPING=1")
        if self._metrics is not None:
            self._metrics.close()
        if self._settings.inbox.enabled and self._inbox.is_alive():
            self._inbox.stop()
        self._updater.stop()
        self._drain_reports()
        if self._settings.mqtt.enabled:
            self._session.stop(self._presence.status("stopped", self._session.conn))
        self._outcomes.stop()
        self._dispatcher.stop()
        self._mailbox.put(Wake())
        self._writer.stop()
        self._engine.dispose()
        log.info("agent stopped")

    def _drain_reports(self, timeout_s: float = 2.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self._session.state == "online" and time.monotonic() < deadline:
            if not (self._reporter.has_more or self._reporter.in_flight):
                return
            self._mailbox.put(Wake())
            time.sleep(0.02)

    def _next_conn(self) -> tuple[int, str]:
        """Commit the number of the next connection; runs on the session's thread."""

        def count(tx: Connection) -> int:
            number = read_counter(tx, "conn") + 1
            save_counter(tx, "conn", number)
            return number

        number = int(self._writer.call(count))
        return number, self._presence.status("offline", number)

    def _on_damage(self, error: StoreDamagedError) -> None:
        """End the agent: its next start moves the damaged file aside and saves what can be."""
        log.critical("%s: stopping, the next start recovers it", error)
        suspect_ledger(self._settings.ledger_file)
        self._damage = error
        self._stop.set()

    def _view_box(self) -> BoxView:
        """Look at the box for the predicates of maintenance windows."""
        resources = read_resources(self._settings.data_dir)
        is_idle = self._dispatcher.count_under_way() == 0
        leases = list_leases(self._settings.leases_dir, self._clock)
        held = "; ".join(f"{one.name} {one.why}".strip() for one in leases)
        free_bytes = self._storage.describe()["free_bytes"]
        return BoxView(
            is_idle,
            resources.temperature_c,
            read_is_on_mains(),
            None if free_bytes is None else free_bytes / 10**6,
            held or None,
        )

    def _report_takeover(self, times: int) -> None:
        body: dict[str, object] = {
            "code": "duplicate_device_id",
            "message": "another client connected under this device's id",
            "times": times,
        }
        self._mailbox.put(Call(lambda tx: self._ledger.add_event(tx, "duplicate_device_id", body)))

    def _check_later(self) -> None:
        """Read the whole ledger once, when the start is over; at the start only a sample is."""
        if self._stop.wait(_CHECK_AFTER_S):
            return
        try:
            why = check_whole(self._settings.ledger_file)
        except StoreError as exc:
            log.warning("the ledger could not be checked: %s", exc)
            return
        if why is not None:
            self._on_damage(StoreDamagedError(f"the ledger is damaged: {why}"))

    def _look_at_box(self) -> None:
        if self._spec is None:
            self._spec = load_platform(self._settings.data_dir)
            self._presence.publish_info()

    # --- watching ---------------------------------------------------------------------------

    def _loops(self) -> dict[str, Callable[[], int]]:
        loops: dict[str, Callable[[], int]] = {
            "writer": lambda: self._writer.turns,
            "dispatch": lambda: self._dispatcher.turns,
            "outcomes": lambda: self._outcomes.turns,
            "updater": lambda: self._updater.turns,
        }
        if self._settings.inbox.enabled:
            loops["inbox"] = lambda: self._inbox.turns
        return loops

    def _watch(self) -> None:
        """Tick until asked to stop: heartbeat, status file, watchdog, housekeeping."""
        loops = self._loops()
        seen = {name: (0, time.monotonic()) for name in loops}
        next_beat = next_keeping = next_status = 0.0
        next_sync = time.monotonic() + self._settings.mqtt.sync_s
        watchdog_s = watchdog_period_s()
        is_ready = was_busy = False
        while not self._stop.wait(_TICK_S if is_ready else 0.02):
            now = time.monotonic()
            stalled = _find_stalled(loops, seen, now)
            if not is_ready and all(count() for count in loops.values()):
                is_ready = True
                notify("READY=1")
                _release_memory()
            if stalled:
                log.error("these loops stand still: %s", ", ".join(stalled))
            elif watchdog_s and is_ready:
                notify("WATCHDOG=1")
            if is_ready and now >= next_beat:
                next_beat = now + self._settings.heartbeat_s
                self._beat()
            if now >= next_sync:
                next_sync = now + self._settings.mqtt.sync_s
                self._mailbox.put(SyncDue())
            if is_ready:
                was_busy = self._release_after(was_busy)
                self._report_models()
            if is_ready and now >= next_status:
                next_status = now + _STATUS_S
                self._write_status()
            if now >= next_keeping:
                next_keeping = now + _HOUSEKEEPING_S
                self._forget_old()
                self._storage.maintain()
                _release_memory()

    def _beat(self) -> None:
        """Publish a heartbeat, or keep it for later while there is no connection."""
        if not self._settings.mqtt.enabled or self._session.state == "online":
            self._presence.publish_heartbeat()
            return
        row = build_telemetry(self._topics, encode(self._measure()), self._clock.wall_ms())
        self._mailbox.put(Call(lambda tx: outbox.add_records(tx, [row])))

    def _release_after(self, was_busy: bool) -> bool:
        """Give memory back when a burst is over; say whether one is going on."""
        is_busy = self._writer.open_jobs > 0
        if was_busy and not is_busy:
            _release_memory()
        return is_busy

    def _report_models(self) -> None:
        """Publish `reported` again when the repository's links have changed."""
        links = (
            (path.parent.name, path.lstat().st_mtime_ns)
            for path in sorted(self._settings.models_dir.glob("*/current"))
        )
        stamp = (self._updater.report.stamp, *links)
        if stamp != self._models_stamp:
            self._models_stamp = stamp
            self._presence.publish_reported()

    def _forget_old(self) -> None:
        before_ms = self._clock.wall_ms() - self._settings.store.keep_ends_days * _DAY_MS
        # Not waited for: with a full disk the writer is busy with more urgent things. The horizon
        # is committed before anything beyond it is forgotten.
        self._mailbox.put(Call(self._retention.advance))
        self._mailbox.put(Call(self._forget))
        folder = self._settings.results_dir
        paths = folder.glob("*.json") if folder.is_dir() else ()
        old = [path for path in paths if path.stat().st_mtime * 1000 < before_ms]
        if old:
            self._mailbox.put(Call(lambda tx: self._drop_results(tx, old[:_DELETE_AT_ONCE])))

    def _forget(self, tx: Connection) -> None:
        undelivered = self._inbox.list_undelivered() if self._settings.inbox.enabled else []
        if undelivered is None:
            return
        if self._retention.forget(tx, _DELETE_AT_ONCE, undelivered):
            reach("retention.forgotten")
        self._retention.strip(tx, _DELETE_AT_ONCE, undelivered)

    def _drop_results(self, tx: Connection, old: Sequence[Path]) -> None:
        """Remove result files of forgotten jobs; their age alone may be a wrong clock's."""
        known = self._ledger.find_jobs(tx, {path.name.partition(".")[0] for path in old})
        for path in old:
            if path.name.partition(".")[0] not in known:
                path.unlink(missing_ok=True)

    def _write_status(self) -> None:
        path = self._settings.runtime_dir / STATUS_FILE
        text = json.dumps({"at": format_ms(self._clock.wall_ms()), **self._measure()})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text, durable=False)
        except OSError as exc:
            log.warning("status file %s: %s", path, exc.strerror)

    def _on_ended(self, ended: Any) -> None:
        self._times.observe(ended)
        if self._settings.inbox.enabled:
            self._inbox.notify_ended(ended)

    def _submit_update(
        self, model: str, wanted: DesiredModel, dedupe_key: str | None = None
    ) -> str:
        """Put an update job into the ledger, as if a console had sent it; return its id."""
        job_id = new_id()
        params = wanted.model_dump(
            mode="json", exclude_defaults=True, exclude={"release", "traffic"}
        )
        body = {
            "handler": UPDATE,
            "job_id": job_id,
            "model": model,
            "version": wanted.release,
            "params": params,
            **({} if dedupe_key is None else {"dedupe_key": dedupe_key}),
        }
        envelope = Envelope(v=1, id=job_id, type=SUBMIT, body=body)
        text = encode_body(body)
        submit = parse_submit(envelope, job_id)
        job = self._intake.build_job(envelope, submit, job_id, text, Source.LOCAL)
        self._mailbox.put(Spooled(Source.LOCAL, job=job))
        return job_id

    def _read_jobs(self, job_ids: Any) -> dict[str, dict[str, Any]]:
        rows: dict[str, dict[str, Any]] = self._writer.call(
            lambda tx: self._ledger.find_jobs(tx, job_ids)
        )
        return rows

    # --- what the device says about itself ----------------------------------------------------

    def _describe(self) -> Mapping[str, Any]:
        """Return the birth certificate's body."""
        limits = self._settings.limits
        return {
            "device": self._settings.device_id,
            "agent_version": _read_version(),
            "protocols": PROTOCOL_VERSIONS,
            "started_at": format_ms(self._started_at),
            "platform": self._spec.to_json() if self._spec else None,
            "models": self._describe_models()["models"],
            "limits": {
                "payload_bytes": limits.payload_bytes,
                "open_jobs": limits.open_jobs,
                "input_bytes": limits.input_bytes,
            },
        }

    def _describe_models(self) -> Mapping[str, Any]:
        models: dict[str, Any] = {}
        for name in self._repository.list_models():
            versions = self._repository.list_versions(name)
            active = next((item for item in versions if item.is_active), None)
            previous = next((item for item in versions if item.is_previous), None)
            models[name] = {
                "active": active and {"version": active.number, "release": active.release},
                "previous": previous and {"version": previous.number, "release": previous.release},
                "versions": [item.number for item in versions],
            }
        return self._updater.report.describe(models)

    def _measure(self) -> Mapping[str, Any]:
        """Return the heartbeat's body."""
        resources = read_resources(self._settings.data_dir)
        broker = self._dispatcher.broker
        return {
            "uptime_s": round((self._clock.wall_ms() - self._started_at) / 1000, 1),
            "mqtt": self._session.state if self._settings.mqtt.enabled else "disabled",
            "queue_broker": "reachable" if broker.reachable else broker.why,
            "workers": self._dispatcher.count_workers(),
            "open_jobs": self._writer.open_jobs,
            "tasks": self._dispatcher.count_under_way(),
            "outbox": {
                "depth": self._writer.outbox_depth,
                "published": self._reporter.counts.published,
                "republished": self._reporter.counts.republished,
                "late": self._reporter.counts.late,
                "acknowledged_by": self._reporter.acknowledged_by,
            },
            "store": self._writer.why_stuck or "ok",
            "storage": self._storage.describe(),
            "quarantine": self._guard.describe(),
            "resources": asdict(resources),
        }


def _find_stalled(
    loops: Mapping[str, Callable[[], int]], seen: dict[str, tuple[int, float]], now: float
) -> list[str]:
    """Return the loops that have not turned for too long; keeps `seen` up to date."""
    stalled = []
    for name, count in loops.items():
        turns, since = seen[name]
        if count() != turns:
            seen[name] = (count(), now)
        elif now - since > _STALL_S:
            stalled.append(name)
    return stalled


def _release_memory() -> None:
    """Collect garbage and give free memory back; takes some milliseconds."""
    gc.collect()
    release_freed()


def _read_version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("edgeward")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def run_agent(settings: Settings) -> None:
    """Run the agent of this box until a signal ends it."""
    limit_heaps()
    Path(settings.data_dir).mkdir(parents=True, exist_ok=True)
    Agent(settings).run()
