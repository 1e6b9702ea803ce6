"""Intake: what consoles and this box's own folders ask for, checked and written.

Turns received messages into ledger rows inside the writer's transaction. Bad
input never raises out of here: it becomes a `rejected` job where the topic
names one, and an event where it does not. What cannot be answered by a row
(pings, replies) is returned as effects to run after the commit.

Source: docs/protocol.md, "Jobs", rules 1–4 and 7.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection
from ulid import ULID

from agent.clock import Clock, parse_at
from agent.commands import (
    CANCEL,
    HANDLERS,
    Envelope,
    SubmitBody,
    check_type,
    decode_envelope,
    encode_body,
    hash_text,
    parse_submit,
)
from agent.config import Settings
from agent.daemon.messages import Received, Spooled
from agent.errors import (
    AgentError,
    CommandError,
    MalformedError,
    ModelNotFoundError,
    QueueFullError,
    UnsupportedTypeError,
)
from agent.jobs import JobState, Reason, Source
from agent.store.ledger import EndedJob, Ledger, NewJob, Verdict
from agent.topics import (
    JOB_ID_PATTERN,
    CommandAddress,
    DocumentAddress,
    JobAddress,
    Topics,
)

log = logging.getLogger(__name__)

_DAY_MS = 86_400_000
_LOOK_AGAIN_MS = 1000


@dataclass
class IntakeResult:
    """What a batch of messages led to."""

    ended: list[EndedJob] = field(default_factory=list)
    accepted: int = 0
    replies: list[Callable[[], None]] = field(default_factory=list)


class Intake:
    """Checks commands and writes them to the ledger.

    Args:
        settings: limits and defaults of jobs.
        topics: the device's topics.
        ledger: where jobs go.
        clock: wall and boot time.
        has_model: says whether the repository has an active version of a model.
        answer: runs a request/reply command; returns what to do after the commit.
    """

    def __init__(
        self,
        settings: Settings,
        topics: Topics,
        ledger: Ledger,
        clock: Clock,
        has_model: Callable[[str], bool],
        answer: Callable[[str, Received, bool], Callable[[], None]],
    ) -> None:
        self._settings = settings
        self._topics = topics
        self._ledger = ledger
        self._clock = clock
        self._has_model = has_model
        self._answer = answer
        self._seen_models: dict[str, int] = {}
        self._oldest_id = ""
        self._oldest_until_ms = 0

    def handle(
        self,
        tx: Connection,
        received: Sequence[Received],
        spooled: Sequence[Spooled],
        open_jobs: int,
    ) -> IntakeResult:
        """Write a batch of messages; the caller acknowledges them after its commit."""
        result = IntakeResult()
        jobs: list[NewJob] = [item.job for item in spooled if item.job is not None]
        room = self._settings.limits.open_jobs - open_jobs
        cancels: dict[str, Source] = {
            item.cancel: item.source for item in spooled if item.cancel is not None
        }
        for message in received:
            try:
                self._sort(tx, message, jobs, cancels, result, room)
            except CommandError as exc:
                self._refuse(tx, message, exc)
        verdicts = self._ledger.accept(tx, jobs)
        result.accepted = sum(
            verdict is Verdict.ACCEPTED and job.state is JobState.QUEUED
            for job, verdict in zip(jobs, verdicts, strict=True)
        )
        for source in set(cancels.values()):
            ids = [job_id for job_id, origin in cancels.items() if origin is source]
            result.ended += self._ledger.cancel(tx, ids, source)
        return result

    def _sort(
        self,
        tx: Connection,
        message: Received,
        jobs: list[NewJob],
        cancels: dict[str, Source],
        result: IntakeResult,
        room: int,
    ) -> None:
        match self._topics.find_address(message.topic):
            case JobAddress(job_id, cancel):
                _check_job_id(job_id)
                if cancel:
                    self._check_cancel(message)
                    cancels[job_id] = Source.MQTT
                else:
                    jobs.append(self._read_job(message, job_id, room - len(jobs)))
            case CommandAddress(name, broadcast):
                result.replies.append(self._answer(name, message, broadcast))
            case DocumentAddress("ack" | "sync"):
                # The broker's PUBACK counts in this version; see docs/protocol.md, "Outbox".
                log.debug("%s ignored: this device counts the broker's PUBACK", message.topic)
            case DocumentAddress(name):
                msg = f"{name} documents are not understood by this version of the device"
                raise UnsupportedTypeError(msg)
            case None:
                msg = f"{message.topic!r} is no topic of the protocol"
                raise UnsupportedTypeError(msg)

    def _check_cancel(self, message: Received) -> None:
        envelope = decode_envelope(message.payload, self._settings.limits.payload_bytes)
        check_type(envelope, CANCEL)

    def _read_job(self, message: Received, job_id: str, room: int) -> NewJob:
        """Return the job of a message, ended already where it cannot be accepted."""
        try:
            envelope = decode_envelope(message.payload, self._settings.limits.payload_bytes)
            text = encode_body(envelope.body)
        except CommandError as exc:
            return refuse(job_id, Source.MQTT, exc, hash_text(message.payload))
        try:
            body = parse_submit(envelope, job_id)
            if room <= 0:
                limit = self._settings.limits.open_jobs
                msg = f"{limit} jobs are open; wait until some have ended"
                raise QueueFullError(msg)
            return self.build_job(envelope, body, job_id, text, Source.MQTT, message.expiry_s)
        except (CommandError, ModelNotFoundError) as exc:
            return refuse(job_id, Source.MQTT, exc, hash_text(text), text)

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
        """
        if not self._is_model_known(body.model):
            msg = f"no model {body.model!r} is active here: add it with `edgeward models add`"
            raise ModelNotFoundError(msg)
        limits = self._settings.limits
        now_ms = self._clock.wall_ms()
        left_ms = self._time_left_ms(envelope, body, expiry_s, now_ms)
        late = left_ms is not None and left_ms <= 0
        reason = Reason("deadline_passed", "the job arrived after its deadline") if late else None
        # What the broker still counts down is not old, whatever our own clock says.
        if expiry_s is None and self._is_forgotten(job_id, now_ms):
            late, reason = True, Reason("too_old", "the job is older than ends are remembered")
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
            not_before_ms=parse_at(envelope.not_before) if envelope.not_before else None,
            expires_ms=None if left_ms is None else int(now_ms + left_ms),
            expires_boot_ms=None if left_ms is None else int(self._clock.boot_ms() + left_ms),
            max_attempts=body.max_attempts or limits.max_attempts,
            on_interrupt=body.on_interrupt,
            run_timeout_s=body.run_timeout_s or limits.run_timeout_s,
        )

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

    def _is_forgotten(self, job_id: str, now_ms: int) -> bool:
        """Say whether the job's id is older than ended jobs are remembered."""
        if now_ms > self._oldest_until_ms:
            oldest_ms = max(0, now_ms - self._settings.store.keep_ends_days * _DAY_MS)
            self._oldest_id = str(ULID.from_timestamp(oldest_ms / 1000))[:10]
            self._oldest_until_ms = now_ms + _LOOK_AGAIN_MS
        # ULIDs sort by the time of their making, which is in the first ten characters.
        return job_id[:10] < self._oldest_id

    def _refuse(self, tx: Connection, message: Received, exc: CommandError) -> None:
        body: dict[str, object] = {
            "code": exc.code,
            "topic": message.topic[:256],
            "message": str(exc),
        }
        self._ledger.add_event(tx, "bad_command", body)


def _check_job_id(job_id: str) -> None:
    if not JOB_ID_PATTERN.fullmatch(job_id):
        msg = f"{job_id[:64]!r} is no job id: a ULID (26 characters, base 32) is"
        raise MalformedError(msg)


def refuse(job_id: str, source: Source, exc: AgentError, body_hash: str, body: str = "") -> NewJob:
    """Return a job that ends as `rejected` for this reason."""
    reason = Reason(exc.code, str(exc))
    return NewJob(
        job_id, source, body=body, body_hash=body_hash, state=JobState.REJECTED, reason=reason
    )
