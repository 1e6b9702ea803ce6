"""The writer: the one thread that changes the store.

Every turn drains the mailbox into one transaction (group commit), and only
after its commit does what the world may see: acknowledge MQTT messages and
outcomes, send tasks, publish reports. So whatever was promised is on disk, and
whatever is not on disk is promised to nobody.

A turn that fails because the disk is full or the file is locked keeps its
messages, says so, and tries again; nothing is acknowledged meanwhile.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from sqlalchemy import Connection, Engine

from agent.daemon.dispatch import Dispatched, Dispatcher
from agent.daemon.intake import Intake, IntakeResult
from agent.daemon.messages import (
    Acknowledged,
    Call,
    Connected,
    Disconnected,
    Ended,
    JobProgress,
    Message,
    Received,
    Released,
    Spooled,
    SyncDue,
    TaskOutcomes,
    TasksLost,
    TasksStarted,
    WorkerCrashed,
)
from agent.daemon.mqtt import MqttSession
from agent.daemon.presence import Presence
from agent.daemon.reporter import Reporter, Selected
from agent.daemon.storage import Storage
from agent.daemon.updater import Updater
from agent.errors import StorageFullError, StoreDamagedError, StoreError
from agent.faults import reach
from agent.jobs import Reason
from agent.store import bounds, quarantine
from agent.store.bounds import OutboxBounds
from agent.store.database import free_room, transaction
from agent.store.ledger import EndedJob, Ledger
from agent.store.outbox import count_records
from agent.topics import JobAddress, Topics

log = logging.getLogger(__name__)

_MAX_BATCH = 128
_IDLE_S = 1.0
_MORE_S = 0.02
# Acknowledgements alone are not worth a disk flush: they wait for company.
_LAZY_S = 0.1
_LAZY_MAX = 128
_RETRY_S = 1.0
# Counting a long outbox takes its time: at most a twentieth of the thread's.
_MEASURE_S = 1.0
_MEASURE_SHARE = 20
_BOUND_S = 5.0
_FREE_AGAIN_S = 5.0
# Jobs that wait unacknowledged while the disk is low; half of the usual receive maximum, so that
# cancels and acknowledgements still come through.
_HELD_MAX = 128


@dataclass
class _Batch:
    """One turn's messages by kind, and what is to be done after the commit."""

    received: list[Received] = field(default_factory=list)
    spooled: list[Spooled] = field(default_factory=list)
    outcomes: list[TaskOutcomes] = field(default_factory=list)
    started: list[TasksStarted] = field(default_factory=list)
    lost: list[TasksLost] = field(default_factory=list)
    acks: list[Acknowledged] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    connections: list[Connected | Disconnected] = field(default_factory=list)
    progress: list[JobProgress] = field(default_factory=list)
    crashes: list[WorkerCrashed] = field(default_factory=list)
    released: list[Released] = field(default_factory=list)
    syncs: list[SyncDue] = field(default_factory=list)
    held: list[Received | Spooled] = field(default_factory=list)
    """Jobs that are not taken while the disk is low."""

    def sort(self, messages: Sequence[Message]) -> "_Batch":
        """Put each message where its kind belongs."""
        lists: dict[type, list[Any]] = {
            Received: self.received,
            Spooled: self.spooled,
            TaskOutcomes: self.outcomes,
            TasksStarted: self.started,
            TasksLost: self.lost,
            Acknowledged: self.acks,
            Call: self.calls,
            Connected: self.connections,
            Disconnected: self.connections,
            JobProgress: self.progress,
            WorkerCrashed: self.crashes,
            Released: self.released,
            SyncDue: self.syncs,
        }
        for message in messages:
            target = lists.get(type(message))
            if target is not None:
                target.append(message)
        return self


@dataclass
class _Effects:
    """What a committed turn does to the world."""

    intake: IntakeResult = field(default_factory=IntakeResult)
    ended: list[EndedJob] = field(default_factory=list)
    dispatched: Dispatched = field(default_factory=Dispatched)
    selected: Selected = field(default_factory=Selected)
    blocked: dict[quarantine.ModelVersion, str] | None = None
    """The quarantine, where it may have changed."""
    answers: list[tuple["Future[Any]", Any]] = field(default_factory=list)
    sync: dict[str, Any] | None = None


class Writer(threading.Thread):
    """Runs turns until stopped.

    Args:
        engine: the store.
        ledger: jobs.
        mailbox: where messages come from.
        topics: the device's topics.
        outbox_bounds: how much may wait for the console.
        storage: the disk and its reserve.
        on_ended: told after the commit which jobs ended.
        on_quarantine: told after the commit which model versions are not served.
        on_damage: told that the ledger is damaged; the agent has to start anew.
    """

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        mailbox: "SimpleQueue[Message]",
        topics: Topics,
        outbox_bounds: OutboxBounds,
        storage: Storage,
        on_ended: Callable[[Sequence[EndedJob]], None],
        on_quarantine: Callable[[dict[quarantine.ModelVersion, str]], None],
        on_damage: Callable[[StoreDamagedError], None],
    ) -> None:
        super().__init__(name="writer", daemon=True)
        self._engine = engine
        self._ledger = ledger
        self._mailbox = mailbox
        self._topics = topics
        self._bounds = outbox_bounds
        self._storage = storage
        self._on_ended = on_ended
        self._on_quarantine = on_quarantine
        self._on_damage = on_damage
        self._held: list[Received | Spooled] = []
        self._stopping = threading.Event()
        self.open_jobs = 0
        self.outbox_depth = 0
        self._freed = -_FREE_AGAIN_S
        self._next_measure = 0.0
        self._next_bound = 0.0
        self._was_quiet = False
        self.turns = 0
        self.why_stuck: str | None = None
        self.seen_ms: Callable[[], int | None] = lambda: None
        """Returns a time that is surely not ahead, None for the wall clock's."""

    def attach(
        self,
        session: MqttSession,
        intake: Intake,
        dispatcher: Dispatcher,
        reporter: Reporter,
        presence: Presence,
        updater: Updater,
    ) -> None:
        """Connect the parts that work inside a turn; before `start`."""
        self._session = session
        self._intake = intake
        self._dispatcher = dispatcher
        self._reporter = reporter
        self._presence = presence
        self._updater = updater

    def call(self, run: Callable[[Connection], Any], timeout_s: float = 30.0) -> Any:
        """Run something inside the next transaction and return its result.

        Raises:
            TimeoutError: the store could not be written for `timeout_s`.
        """
        request = Call(run)
        self._mailbox.put(request)
        return request.future.result(timeout_s)

    def run(self) -> None:
        """Turn until stopped; an error that is nobody's fault stops a message, not the writer."""
        kept: list[Message] = []
        while not self._stopping.is_set():
            messages = kept or self._collect()
            kept = []
            self.turns += 1
            # Nothing came, nothing waits for its time, nothing is to be sent: the first such
            # turn still measures, the next ones rest.
            is_quiet = not (messages or self.open_jobs or self._reporter.has_more or self._held)
            was_quiet, self._was_quiet = self._was_quiet, is_quiet
            if is_quiet and was_quiet:
                continue
            try:
                self._turn(messages)
                self.why_stuck = None
            except StoreDamagedError as exc:
                self.why_stuck = str(exc)
                self._on_damage(exc)
                return
            except StoreError as exc:
                if isinstance(exc, StorageFullError) and self._free_room():
                    log.warning("%s; its reserve is freed", exc)
                else:
                    self.why_stuck = str(exc)
                    log.error("%s; nothing is acknowledged, trying again", exc)  # noqa: TRY400
                    self._stopping.wait(_RETRY_S)
                kept = list(messages)
            except Exception:  # the supervisor loop boundary of style.md
                log.exception("internal_error in a turn of %d messages", len(messages))
                self._isolate(messages)

    def _free_room(self) -> bool:
        """Free the reserve and cut the log; say whether that is worth another try at once."""
        now = time.monotonic()
        if now - self._freed < _FREE_AGAIN_S:
            return False
        self._freed = now
        try:
            return free_room(self._engine, self._storage.release)
        except StoreError as exc:
            log.warning("no room could be freed: %s", exc)
            return False

    def _isolate(self, messages: Sequence[Message]) -> None:
        """Run the messages of a failed turn one by one; drop only what fails alone."""
        for message in messages:
            try:
                self._turn([message])
            except StoreError:
                self._mailbox.put(message)
            except Exception as exc:  # same boundary: what did it is named and dropped
                log.exception("internal_error: dropped %s", type(message).__name__)
                if isinstance(message, Received) and message.mid:
                    self._session.ack(message.conn, message.mid)
                if isinstance(message, Call):
                    message.future.set_exception(exc)

    def _collect(self) -> list[Message]:
        """Wait for messages and take all there are, up to a batch."""
        messages: list[Message] = []
        wait_s = _MORE_S if self._reporter.has_more else _IDLE_S
        lazy_until = 0.0
        while len(messages) < _MAX_BATCH:
            try:
                message = self._mailbox.get(block=wait_s > 0, timeout=wait_s or None)
            except Empty:
                break
            messages.append(message)
            if not isinstance(message, Acknowledged) or len(messages) >= _LAZY_MAX:
                wait_s = 0.0
            elif wait_s:
                lazy_until = lazy_until or time.monotonic() + _LAZY_S
                wait_s = max(0.0, min(wait_s, lazy_until - time.monotonic()))
        return messages

    def _turn(self, messages: Sequence[Message]) -> None:
        batch = _Batch().sort(messages)
        if batch.received:
            reach("intake.received")
        is_low = self._hold(batch)
        with transaction(self._engine) as tx:
            effects = self._write(tx, batch, is_low=is_low)
        self._reach_committed(batch, effects)
        self._held = batch.held
        self._apply(batch, effects)

    def _hold(self, batch: _Batch) -> bool:
        """While the disk is low keep jobs unacknowledged; say whether more of them are refused.

        The broker, the folder and the spool keep what is not acknowledged. Where a broker has
        more jobs than may wait, those are refused with a state, so that other messages get through.
        """
        if any(isinstance(event, Connected) for event in batch.connections):
            # The broker sends them again, under numbers of the new connection.
            self._held = [item for item in self._held if isinstance(item, Spooled)]
        is_low = self._storage.is_low()
        # What has waited longest goes first.
        batch.received[:0] = [item for item in self._held if isinstance(item, Received)]
        batch.spooled[:0] = [item for item in self._held if isinstance(item, Spooled)]
        if not is_low:
            return False
        received = [message for message in batch.received if self._is_job(message)]
        jobs: list[Received | Spooled] = [*received[:_HELD_MAX]]
        jobs += [item for item in batch.spooled if item.job is not None]
        chosen = {id(item) for item in jobs}
        batch.held = jobs
        batch.received = [item for item in batch.received if id(item) not in chosen]
        batch.spooled = [item for item in batch.spooled if id(item) not in chosen]
        return True

    def _is_job(self, message: Received) -> bool:
        address = self._topics.find_address(message.topic)
        return bool(message.mid) and isinstance(address, JobAddress) and not address.cancel

    @staticmethod
    def _reach_committed(batch: _Batch, effects: _Effects) -> None:
        """Pass the fault points that lie between a commit and what it allows."""
        if batch.received:
            reach("intake.committed")
        if batch.outcomes:
            reach("outcome.committed")
        if effects.dispatched.tasks:
            reach("dispatch.committed")
        if effects.selected.records:
            reach("outbox.numbered")

    def _write(self, tx: Connection, batch: _Batch, *, is_low: bool) -> _Effects:
        effects = _Effects()
        for request in batch.calls:
            value = request.run(tx)
            if isinstance(value, Ended):
                effects.ended += value.jobs
                value = value.value
            effects.answers.append((request.future, value))
        self._follow_connections(tx, batch, effects)
        acked = self._reporter.acknowledge(tx, batch.acks)
        self._write_progress(tx, batch, effects)
        effects.intake = self._intake.handle(
            tx, batch.received, batch.spooled, self.open_jobs, is_storage_low=is_low
        )
        if batch.received:
            reach("intake.written")
        effects.ended += effects.intake.ended
        self._reporter.hear(tx, effects.intake.console)
        for desired in effects.intake.desired:
            self._updater.want(tx, desired)
        effects.ended += self._ledger.schedule.expire(tx)
        effects.dispatched = self._dispatcher.select(tx)
        if effects.dispatched.tasks:
            reach("dispatch.written")
        effects.ended += effects.dispatched.ended
        self._measure_outbox(tx)
        waiting = self.open_jobs + effects.intake.accepted - len(effects.ended)
        effects.selected = self._reporter.select(tx, waiting, acked)
        return effects

    def _measure_outbox(self, tx: Connection) -> None:
        now = time.monotonic()
        if now >= self._next_measure:
            self.outbox_depth = count_records(tx)
            self._next_measure = _plan_next(now, _MEASURE_S)
        if now >= self._next_bound:
            wall_ms = self._ledger.wall_ms()
            self._ledger.results_full = bounds.enforce(
                tx, self._topics, self._bounds, wall_ms, self.seen_ms()
            )
            self._next_bound = _plan_next(now, _BOUND_S)

    def _follow_connections(self, tx: Connection, batch: _Batch, effects: _Effects) -> None:
        for event in batch.connections:
            if isinstance(event, Disconnected):
                self._reporter.disconnected(event.conn)
            else:
                self._reporter.connected(event)
        if batch.syncs or any(isinstance(item, Connected) for item in batch.connections):
            effects.sync = self._ledger.describe_open(tx)
            effects.sync["outbox_depth"] = count_records(tx)
            effects.sync.update(self._updater.report.describe_followed())

    def _write_progress(self, tx: Connection, batch: _Batch, effects: _Effects) -> None:
        started = [task_id for item in batch.started for task_id in item.task_ids]
        if started:
            self._ledger.record_started(tx, started)
        outcomes = [outcome for task in batch.outcomes for outcome in task.outcomes]
        if outcomes:
            outcomes, ended = self._updater.take(tx, outcomes)
            effects.ended += ended
            effects.ended += self._ledger.record_outcomes(tx, outcomes)
            reach("outcome.written")
        for crashed in batch.crashes:
            effects.ended += self._ledger.record_crash(tx, crashed.report)
        self._updater.note_crashes(tx, [crashed.report for crashed in batch.crashes])
        for item in batch.released:
            quarantine.release(tx, item.model, item.version)
        if batch.crashes or batch.released:
            effects.blocked = quarantine.read_quarantine(tx)
        for step in batch.progress:
            self._ledger.record_progress(tx, step.job_id, step.attempt, step.progress)
        for lost in batch.lost:
            reason = Reason(lost.code, lost.message)
            effects.ended += self._ledger.requeue(tx, lost.task_ids, reason, counts=lost.counts)

    def _apply(self, batch: _Batch, effects: _Effects) -> None:
        """Do what the world may see, now that the turn is on disk."""
        # What memory must know of the commit comes first and cannot fail.
        self.open_jobs += effects.intake.accepted - len(effects.ended)
        self._reporter.settle(batch.acks, effects.selected)
        self._dispatcher.forget(task.task_id for task in batch.outcomes)
        self._dispatcher.forget(item.report.task_id for item in batch.crashes)
        self._dispatcher.send(effects.dispatched.tasks)
        if effects.blocked is not None:
            self._on_quarantine(effects.blocked)
        for future, value in effects.answers:
            future.set_result(value)
        for effect in self._list_effects(batch, effects):
            try:
                effect()
            except Exception:  # the supervisor loop boundary: the commit stands, the rest goes on
                log.exception("internal_error after a commit")

    def _list_effects(self, batch: _Batch, effects: _Effects) -> list[Callable[[], None]]:
        session, presence, reporter = self._session, self._presence, self._reporter
        todo: list[Callable[[], None]] = [
            partial(session.ack, message.conn, message.mid) for message in batch.received
        ]
        if todo:
            todo.append(partial(reach, "intake.acked"))
        todo += [task.ack for task in batch.outcomes]
        todo += [item.ack for item in batch.crashes]
        todo += [item.done for item in batch.released]
        todo.append(partial(self._dispatcher.stop_runs, effects.ended))
        if batch.syncs and effects.sync is not None:
            todo.append(partial(presence.publish_sync, effects.sync))
        todo += [
            partial(presence.connected, event, effects.sync or {})
            for event in batch.connections
            if isinstance(event, Connected)
        ]
        todo.append(partial(reporter.publish, effects.selected.records))
        todo += effects.intake.replies
        todo += [item.done for item in batch.spooled if item.done is not None]
        if effects.ended:
            todo.append(partial(self._on_ended, effects.ended))
        return todo

    def stop(self) -> None:
        """End the thread after the turn it is in."""
        self._stopping.set()
        self.join(10.0)


def _plan_next(began: float, period_s: float) -> float:
    """Return when to do something again that began then and has just ended."""
    now = time.monotonic()
    return now + max(period_s, _MEASURE_SHARE * (now - began))
