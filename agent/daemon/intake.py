"""Intake: what consoles and this box's own folders ask for, checked and written.

Turns received messages into ledger rows inside the writer's transaction. Bad
input never raises out of here: it becomes a `rejected` job where the topic
names one, and an event where it does not. What cannot be answered by a row
(pings, replies) is returned as effects to run after the commit.

Source: docs/protocol.md, "Jobs", rules 1–4 and 7; "Reconcile".
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from sqlalchemy import Connection

from agent.clock import Clock, parse_at
from agent.commands import (
    CANCEL,
    HANDLERS,
    UPDATE,
    Envelope,
    SubmitBody,
    check_type,
    decode_envelope,
    encode_body,
    hash_text,
    parse_ack,
    parse_desired,
    parse_submit,
    parse_sync,
)
from agent.config import Settings
from agent.daemon.budget import EventBudget
from agent.daemon.messages import Received, Spooled
from agent.errors import (
    AgentError,
    CommandError,
    InvalidBodyError,
    MalformedError,
    ModelNotFoundError,
    QueueFullError,
    StorageFullError,
    UnsupportedTypeError,
)
from agent.jobs import JobState, Reason, Source
from agent.lifecycle import Desired
from agent.store.ledger import EndedJob, Ledger, NewJob, Verdict
from agent.store.options import pack_options
from agent.store.retention import Retention, id_time_ms
from agent.topics import (
    JOB_ID_PATTERN,
    CommandAddress,
    DocumentAddress,
    JobAddress,
    Topics,
)

log = logging.getLogger(__name__)

_LOOK_AGAIN_MS = 1000
# What a sender wrote may come back in a message: not all of it.
_MESSAGE_CHARS = 512
UPDATE_TIMEOUT_S = 6 * 3600.0
"""Longest fetching and staging of an update that says nothing: a large release on a thin line."""


@dataclass
class ConsoleNews:
    """What a console has said of the records it has."""

    acked_seq: int | None = None
    """The highest number that it has without a gap."""
    replay_after: int | None = None
    """It answered a sync: what it has not acknowledged is sent again."""


@dataclass
class IntakeResult:
    """What a batch of messages led to."""

    ended: list[EndedJob] = field(default_factory=list)
    accepted: int = 0
    replies: list[Callable[[], None]] = field(default_factory=list)
    console: ConsoleNews = field(default_factory=ConsoleNews)
    desired: list[Desired] = field(default_factory=list)
    """Documents of what the console wants, in the order of arrival."""


@dataclass(frozen=True, slots=True)
class _Cancel:
    job_id: str
    source: Source


@dataclass
class _Batch:
    """One turn's messages, sorted."""

    steps: list[NewJob | _Cancel] = field(default_factory=list)
    """In the order of arrival: whether a cancel comes before a job of the same `dedupe_key`
    decides whether that is accepted."""
    lost: list[str] = field(default_factory=list)
    """Jobs that a console sends because it missed their end: it wants the results too."""
    unknown: list[str] = field(default_factory=list)
    room: int = 0
    is_storage_low: bool = False


class Intake:
    """Checks commands and writes them to the ledger.

    Args:
        settings: limits and defaults of jobs.
        topics: the device's topics.
        ledger: where jobs go.
        retention: tells which ids are too old to be new.
        clock: wall and boot time.
        has_model: says whether the repository has an active version of a model.
        verify_served: raises where a model version is in quarantine.
        answer: runs a request/reply command; returns what to do after the commit.
    """

    def __init__(
        self,
        settings: Settings,
        topics: Topics,
        ledger: Ledger,
        retention: Retention,
        clock: Clock,
        has_model: Callable[[str], bool],
        verify_served: Callable[[str, str | None], None],
        answer: Callable[[str, Received, bool], Callable[[], None]],
    ) -> None:
        self._settings = settings
        self._topics = topics
        self._ledger = ledger
        self._retention = retention
        self._clock = clock
        self._has_model = has_model
        self._verify_served = verify_served
        self._answer = answer
        self._seen_models: dict[str, int] = {}
        self._budget = EventBudget(clock, settings.limits.bad_commands_per_min)
        self._identity: str | None = None
        self.unread: Callable[[], int] = lambda: 0
        """Returns how many messages were thrown away unread since it was last asked."""

    def begin(self, identity: str) -> None:
        """Take note of the ledger's identity: what is meant for another one is ignored."""
        self._identity = identity

    def handle(
        self,
        tx: Connection,
        received: Sequence[Received],
        spooled: Sequence[Spooled],
        open_jobs: int,
        *,
        is_storage_low: bool = False,
    ) -> IntakeResult:
        """Write a batch of messages; the caller acknowledges them after its commit."""
        result = IntakeResult()
        batch = _Batch(
            room=self._settings.limits.open_jobs - open_jobs, is_storage_low=is_storage_low
        )
        for item in spooled:
            if item.job is not None:
                batch.steps.append(item.job)
            if item.cancel is not None:
                batch.steps.append(_Cancel(item.cancel, item.source))
        for message in received:
            try:
                self._sort(message, batch, result)
            except CommandError as exc:
                self._refuse(tx, message, exc)
        self._write(tx, batch, result)
        self._settle_budget(tx)
        return result

    def _write(self, tx: Connection, batch: _Batch, result: IntakeResult) -> None:
        # Runs of one kind are written together.
        for source, run in groupby(batch.steps, _cancels_of):
            if source is None:
                jobs = [step for step in run if isinstance(step, NewJob)]
                accepted = self._ledger.accept(tx, jobs, with_results=batch.lost)
                result.ended += accepted.ended
                result.accepted += sum(
                    verdict is Verdict.ACCEPTED and job.state is JobState.QUEUED
                    for job, verdict in zip(jobs, accepted.verdicts, strict=True)
                )
            else:
                job_ids = list(dict.fromkeys(step.job_id for step in run))
                result.ended += self._ledger.cancel(tx, job_ids, source)
        if batch.unknown:
            self._ledger.report_again(tx, batch.unknown)

    def _sort(self, message: Received, batch: _Batch, result: IntakeResult) -> None:
        match self._topics.find_address(message.topic):
            case JobAddress(job_id, cancel):
                _check_job_id(job_id)
                if cancel:
                    self._check_cancel(message)
                    batch.steps.append(_Cancel(job_id, Source.MQTT))
                else:
                    batch.steps.append(self._read_job(message, job_id, batch))
            case CommandAddress(name, broadcast):
                result.replies.append(self._answer(name, message, broadcast))
            case DocumentAddress("ack"):
                self._read_ack(message, result)
            case DocumentAddress("sync"):
                self._read_sync(message, batch, result)
            case DocumentAddress(_):
                self._read_desired(message, result)
            case None:
                msg = f"{message.topic!r} is no topic of the protocol"
                raise UnsupportedTypeError(msg)

    def _check_cancel(self, message: Received) -> None:
        check_type(self._decode(message), CANCEL)

    def _decode(self, message: Received) -> Envelope:
        return decode_envelope(message.payload, self._settings.limits.payload_bytes)

    def _read_desired(self, message: Received, result: IntakeResult) -> None:
        if not message.payload:
            # The console has cleared the retained message: nothing is wanted any more, or yet.
            return
        result.desired.append(parse_desired(self._decode(message)))

    # --- reconciliation ----------------------------------------------------------------------

    def _read_ack(self, message: Received, result: IntakeResult) -> None:
        body = parse_ack(self._decode(message))
        if body.ledger in (None, self._identity):
            result.console.acked_seq = max(body.seq, result.console.acked_seq or 0)

    def _read_sync(self, message: Received, batch: _Batch, result: IntakeResult) -> None:
        """Take in what a console has, misses, does not know and wants cancelled."""
        body = parse_sync(self._decode(message))
        if body.acked_seq is not None and body.ledger in (None, self._identity):
            result.console.acked_seq = max(body.acked_seq, result.console.acked_seq or 0)
            result.console.replay_after = body.acked_seq
        for job_id in body.cancel:
            _check_job_id(job_id)
            batch.steps.append(_Cancel(job_id, Source.MQTT))
        batch.unknown += body.unknown
        for document in body.missing:
            payload = encode_body(document).encode()
            job_id = _find_job_id(document)
            whole = Received(message.conn, 0, self._topics.submit(job_id), payload)
            batch.steps.append(self._read_job(whole, job_id, batch))
            batch.lost.append(job_id)

    # --- jobs --------------------------------------------------------------------------------

    def _read_job(self, message: Received, job_id: str, batch: _Batch) -> NewJob:
        """Return the job of a message, ended already where it cannot be accepted."""
        self._retention.observe(job_id)
        try:
            envelope = self._decode(message)
            # The id stands in the topic or the body; a body is the same one with and without it.
            text = encode_body({k: v for k, v in envelope.body.items() if k != "job_id"})
        except CommandError as exc:
            return refuse(job_id, Source.MQTT, exc, hash_text(message.payload))
        try:
            body = parse_submit(envelope, job_id)
            self._check_room(batch)
            return self.build_job(envelope, body, job_id, text, Source.MQTT, message.expiry_s)
        except (CommandError, ModelNotFoundError, StorageFullError) as exc:
            return refuse(job_id, Source.MQTT, exc, hash_text(text), text)

    def _check_room(self, batch: _Batch) -> None:
        if batch.room - len(batch.steps) <= 0:
            limit = self._settings.limits.open_jobs
            msg = f"{limit} jobs are open; wait until some have ended"
            raise QueueFullError(msg)
        if batch.is_storage_low:
            msg = "the disk of the box is nearly full: no new work is taken"
            raise StorageFullError(msg)

    def build_job(
        self,
        envelope: Envelope,
        body: SubmitBody,
        job_id: str,
        text: str,
        source: Source,
        expiry_s: float | None = None,
    ) -> NewJob:
        """Return the ledger's form of a checked submit; `text` is its body as JSON.

        Raises:
            ModelNotFoundError: the repository has no active version of the model.
            QuarantinedError: the version is not served for its crashes.
        """
        is_update = body.handler == UPDATE
        if not is_update:
            self._verify_known(body)
        limits = self._settings.limits
        # No job comes before it was made. A box that wakes up in 1970 would otherwise place
        # `not_before` decades ahead on its boot clock, and leave it there when it has the time.
        now_ms = max(self._clock.wall_ms(), id_time_ms(job_id))
        left_ms = self._time_left_ms(envelope, body, expiry_s, now_ms)
        late = left_ms is not None and left_ms <= 0
        reason = Reason("deadline_passed", "the job arrived after its deadline") if late else None
        # What this box has just made is not old. A message that the broker still counts down may
        # be: its sender gave it a new life, and an id that was forgotten must not run again.
        if source is Source.MQTT and self._retention.is_forgotten(job_id):
            late, reason = True, Reason("too_old", "the job is older than ends are remembered")
        not_before_ms = parse_at(envelope.not_before) if envelope.not_before else None
        boot_ms = self._clock.boot_ms()
        return NewJob(
            job_id,
            source,
            body=text,
            body_hash=hash_text(text),
            handler=body.handler,
            lane=body.lane or HANDLERS[body.handler],
            model=body.model,
            version=body.version,
            priority=body.priority,
            state=JobState.EXPIRED if late else JobState.QUEUED,
            reason=reason,
            not_before_ms=not_before_ms,
            ready_boot_ms=_place(not_before_ms, now_ms, boot_ms),
            expires_ms=None if left_ms is None else int(now_ms + left_ms),
            expires_boot_ms=None if left_ms is None else int(boot_ms + left_ms),
            max_attempts=body.max_attempts or limits.max_attempts,
            on_interrupt=body.on_interrupt,
            run_timeout_s=body.run_timeout_s
            or (UPDATE_TIMEOUT_S if is_update else limits.run_timeout_s),
            dedupe_key=body.dedupe_key,
            dedupe=body.dedupe,
            options=pack_options(body),
        )

    def _verify_known(self, body: SubmitBody) -> None:
        """Refuse a job of a model that nobody can run.

        Raises:
            ModelNotFoundError: the repository has no active version of the model.
            QuarantinedError: the version is not served for its crashes.
        """
        if not self._is_model_known(body.model):
            msg = f"no model {body.model!r} is active here: add it with `edgeward models add`"
            raise ModelNotFoundError(msg)
        self._verify_served(body.model, body.version)

    def _is_model_known(self, model: str) -> bool:
        """Look at the disk at most once a second for each model that is there."""
        now_ms = self._clock.boot_ms()
        if now_ms - self._seen_models.get(model, -_LOOK_AGAIN_MS) < _LOOK_AGAIN_MS:
            return True
        if not self._has_model(model):
            return False
        self._seen_models[model] = now_ms
        return True

    def _time_left_ms(
        self, envelope: Envelope, body: SubmitBody, expiry_s: float | None, now_ms: int
    ) -> float | None:
        """Return how long the job may wait for its start, or None for ever.

        The broker's remaining expiry beats `not_after`: the broker counted it
        down, so a device whose clock is wrong is right.
        """
        given: list[float] = []
        if expiry_s is not None:
            given.append(expiry_s * 1000)
        elif envelope.not_after is not None:
            given.append(parse_at(envelope.not_after) - now_ms)
        if body.queue_ttl_s is not None:
            given.append(body.queue_ttl_s * 1000)
        return min(given, default=None)

    def _refuse(self, tx: Connection, message: Received, exc: CommandError) -> None:
        if not self._budget.take(exc.code):
            return
        body: dict[str, object] = {
            "code": exc.code,
            "topic": message.topic[:256],
            "message": str(exc)[:_MESSAGE_CHARS],
        }
        self._ledger.add_event(tx, "bad_command", body)

    def _settle_budget(self, tx: Connection) -> None:
        """Report what was only counted, once a minute."""
        self._budget.count("flood", self.unread())
        over = self._budget.settle()
        if over:
            body: dict[str, object] = {
                "code": "too_many",
                "count": sum(over.values()),
                "by_code": over,
                "message": "more bad commands than are reported one by one",
            }
            self._ledger.add_event(tx, "bad_command", body)


def _cancels_of(step: NewJob | _Cancel) -> Source | None:
    """Return whose cancel a step is, None for a job."""
    return step.source if isinstance(step, _Cancel) else None


def _check_job_id(job_id: str) -> None:
    if not JOB_ID_PATTERN.fullmatch(job_id):
        msg = f"{job_id[:64]!r} is no job id: a ULID (26 characters, base 32) is"
        raise MalformedError(msg)


def _find_job_id(document: dict[str, object]) -> str:
    """Return the id in a job that came inside a sync.

    Raises:
        InvalidBodyError: it names none.
    """
    body = document.get("body")
    job_id = body.get("job_id") if isinstance(body, dict) else None
    if not isinstance(job_id, str):
        msg = "body: missing: each job is a whole envelope with body.job_id"
        raise InvalidBodyError(msg)
    _check_job_id(job_id)
    return job_id


def _place(not_before_ms: int | None, now_ms: int, boot_ms: int) -> int | None:
    """Return where a wall time stands on the boot clock, None where it is past."""
    if not_before_ms is None or not_before_ms <= now_ms:
        return None
    return boot_ms + not_before_ms - now_ms


def refuse(job_id: str, source: Source, exc: AgentError, body_hash: str, body: str = "") -> NewJob:
    """Return a job that ends as `rejected` for this reason."""
    reason = Reason(exc.code, str(exc)[:_MESSAGE_CHARS])
    return NewJob(
        job_id, source, body=body, body_hash=body_hash, state=JobState.REJECTED, reason=reason
    )
