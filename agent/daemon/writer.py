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

from agent.daemon.dispatch import Dispatcher, Task
from agent.daemon.intake import Intake, IntakeResult
from agent.daemon.messages import (
    Acknowledged,
    Call,
    Connected,
    Disconnected,
    Message,
    Received,
    Spooled,
    TaskOutcomes,
    TasksLost,
    TasksStarted,
)
from agent.daemon.mqtt import MqttSession
from agent.daemon.presence import Presence
from agent.daemon.reporter import Reporter
from agent.errors import StoreError
from agent.jobs import Reason
from agent.store.database import transaction
from agent.store.ledger import EndedJob, Ledger
from agent.store.outbox import Record, count_records

log = logging.getLogger(__name__)

_MAX_BATCH = 128
_IDLE_S = 1.0
_MORE_S = 0.02
# Acknowledgements alone are not worth a disk flush: they wait for company.
_LAZY_S = 0.1
_LAZY_MAX = 128
_RETRY_S = 1.0
_MEASURE_S = 1.0


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
    tasks: list[Task] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    answers: list[tuple["Future[Any]", Any]] = field(default_factory=list)
    sync: dict[str, Any] | None = None


class Writer(threading.Thread):
    """Runs turns until stopped.

    Args:
        engine: the store.
        ledger: jobs.
        mailbox: where messages come from.
        on_ended: told after the commit which jobs ended.
    """

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        mailbox: "SimpleQueue[Message]",
        on_ended: Callable[[Sequence[EndedJob]], None],
    ) -> None:
        super().__init__(name="writer", daemon=True)
        self._engine = engine
        self._ledger = ledger
        self._mailbox = mailbox
        self._on_ended = on_ended
        self._stopping = threading.Event()
        self.open_jobs = 0
        self.outbox_depth = 0
        self._measured = 0.0
        self._was_quiet = False
        self.turns = 0
        self.why_stuck: str | None = None

    def attach(
        self,
        session: MqttSession,
        intake: Intake,
        dispatcher: Dispatcher,
        reporter: Reporter,
        presence: Presence,
    ) -> None:
        """Connect the parts that work inside a turn; before `start`."""
        self._session = session
        self._intake = intake
        self._dispatcher = dispatcher
        self._reporter = reporter
        self._presence = presence

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
            is_quiet = not (messages or self.open_jobs or self._reporter.has_more)
            was_quiet, self._was_quiet = self._was_quiet, is_quiet
            if is_quiet and was_quiet:
                continue
            try:
                self._turn(messages)
                self.why_stuck = None
            except StoreError as exc:
                self.why_stuck = str(exc)
                log.error("%s; nothing is acknowledged, trying again", exc)  # noqa: TRY400
                kept = list(messages)
                self._stopping.wait(_RETRY_S)
            except Exception:  # the supervisor loop boundary of style.md
                log.exception("internal_error in a turn of %d messages", len(messages))
                self._isolate(messages)

    def _isolate(self, messages: Sequence[Message]) -> None:
        """Run the messages of a failed turn one by one; drop only what fails alone."""
        for message in messages:
            try:
                self._turn([message])
            except StoreError:
                self._mailbox.put(message)
            except Exception as exc:  # same boundary: what did it is named and dropped
                log.exception("internal_error: dropped %s", type(message).__name__)
                if isinstance(message, Received):
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
        with transaction(self._engine) as tx:
            effects = self._write(tx, batch)
        self._apply(batch, effects)

    def _write(self, tx: Connection, batch: _Batch) -> _Effects:
        effects = _Effects()
        for request in batch.calls:
            effects.answers.append((request.future, request.run(tx)))
        self._follow_connections(tx, batch, effects)
        acked = self._reporter.acknowledge(tx, batch.acks)
        self._write_progress(tx, batch, effects)
        effects.intake = self._intake.handle(tx, batch.received, batch.spooled, self.open_jobs)
        effects.ended += effects.intake.ended
        effects.ended += self._ledger.expire(tx)
        effects.tasks = self._dispatcher.select(tx)
        self._measure_outbox(tx)
        waiting = self.open_jobs + effects.intake.accepted - len(effects.ended)
        effects.records = self._reporter.select(tx, waiting, acked)
        return effects

    def _measure_outbox(self, tx: Connection) -> None:
        now = time.monotonic()
        if now - self._measured > _MEASURE_S:
            self._measured = now
            self.outbox_depth = count_records(tx)

    def _follow_connections(self, tx: Connection, batch: _Batch, effects: _Effects) -> None:
        for event in batch.connections:
            if isinstance(event, Disconnected):
                self._reporter.disconnected(event.conn)
            else:
                self._reporter.connected(event)
                effects.sync = self._ledger.describe_open(tx)
                effects.sync["outbox_depth"] = count_records(tx)

    def _write_progress(self, tx: Connection, batch: _Batch, effects: _Effects) -> None:
        started = [task_id for item in batch.started for task_id in item.task_ids]
        if started:
            self._ledger.record_started(tx, started)
        outcomes = [outcome for task in batch.outcomes for outcome in task.outcomes]
        if outcomes:
            effects.ended += self._ledger.record_outcomes(tx, outcomes)
        for lost in batch.lost:
            reason = Reason(lost.code, lost.message)
            effects.ended += self._ledger.requeue(tx, lost.task_ids, reason, counts=lost.counts)

    def _apply(self, batch: _Batch, effects: _Effects) -> None:
        """Do what the world may see, now that the turn is on disk."""
        # What memory must know of the commit comes first and cannot fail.
        self.open_jobs += effects.intake.accepted - len(effects.ended)
        self._reporter.settle(batch.acks, effects.records)
        self._dispatcher.forget(task.task_id for task in batch.outcomes)
        self._dispatcher.send(effects.tasks)
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
        todo += [task.ack for task in batch.outcomes]
        todo += [
            partial(presence.connected, event, effects.sync or {})
            for event in batch.connections
            if isinstance(event, Connected)
        ]
        todo.append(partial(reporter.publish, effects.records))
        todo += effects.intake.replies
        todo += [item.done for item in batch.spooled if item.done is not None]
        if effects.ended:
            todo.append(partial(self._on_ended, effects.ended))
        return todo

    def stop(self) -> None:
        """End the thread after the turn it is in."""
        self._stopping.set()
        self.join(10.0)
