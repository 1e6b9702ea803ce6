"""What a console knows of one device: the console's half of the protocol, as a state machine.

Pure: takes documents in, gives out what changed (`hear`) and what is to be sent
(`take_due`); touches neither network nor disk, starts no thread, is told the time.

    command ──► unanswered ──state──► open ──end──► ended (──result──► complete)
                    ▲                  │ not in the device's sync, another ledger, stale
                    └──────────────────┘

Invariants, each a duty of docs/console.md:
- a state counts only if its `rev` is higher than the one known, and nothing follows an end;
- a command is sent again until a state answers it;
- a status counts only if its `(boot, conn)` is not lower than the one known;
- another ledger id: numbers begin anew, open jobs forget their `rev` and are sent again;
- what is acknowledged was committed by the owner before (`commit`), never only heard;
- a console's own time-out only marks a job `stale`; any news of it clears the mark.

Source: docs/protocol.md.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from agent.clock import parse_at
from agent.commands import encode, new_id
from agent.jobs import ENDS, JobState
from console.addresses import ConsoleTopics
from console.numbering import Numbering, Span
from console.resend import WINDOW, Pending, ResendQueue
from console.submission import Command, wrap

Document = dict[str, Any]

ACK_EVERY_S = 0.5
ACK_EVERY_RECORDS = 200
STALE_AFTER_S = 600.0
_ACK_EXPIRY_S = 3600
_SYNC_EXPIRY_S = 60
_CANCEL_EXPIRY_S = 7 * 86_400
_ANSWER_BYTES = 128 * 1024
"""Of whole jobs in one sync answer; the contract's bound is 256 KiB for the payload."""
_ANSWER_IDS = 1000
_FIRST_ASK_S = 5.0
_LONGEST_ASK_S = 300.0
_ASKS = 3
"""So often the device must have begun its replay behind a hole before the hole is given up."""
_ON_ITS_WAY_S = 1.0
"""A command that went out so short ago is not sent again because the device says something."""
_REBIRTH_AFTER_S = 2.0
_LONGEST_REBIRTH_S = 900.0
_AWAY = ("offline", "stopped")


@dataclass
class JobView:
    """What a console knows of one job."""

    job_id: str
    state: JobState | None = None
    rev: int = 0
    attempt: int = 0
    reason: Document | None = None
    result: Document | None = None
    progress: Document | None = None
    reported_ms: int | None = None
    """When its end was written on the device, by the device's clock."""
    received_ms: int | None = None
    """When its end came here."""
    heard_s: float = 0.0
    """When something was last heard of it, on the owner's monotonic clock."""
    is_stale: bool = False
    """Nothing was heard of it for long. Says nothing about its state."""
    has_doubtful_rev: bool = False
    """Its `rev` may be one of a ledger that is lost: an end counts then whatever its `rev`."""

    @property
    def has_ended(self) -> bool:
        """Say whether its end was heard of."""
        return self.state is not None and self.state in ENDS

    @property
    def is_complete(self) -> bool:
        """Say whether it has ended, with its result where it succeeded."""
        return self.has_ended and (self.state is not JobState.SUCCEEDED or self.result is not None)


@dataclass(frozen=True)
class Heard:
    """One report of a device, as it came."""

    kind: str
    rest: str
    document: Document
    is_retained: bool = False
    """It came from the broker's memory at a subscription, from whatever time and ledger."""


@dataclass(frozen=True)
class Change:
    """Something that is news.

    `kind` is `state`, `result`, `progress`, `stale` (marked) or `fresh` (the mark is off), all of
    a job; `event` (`name` has its type); `status`, `info`, `reported`, `heartbeat`; `ledger`
    (the device has another ledger); `lost` (numbers that the device does not have any more
    and no gap record explains); or `unreadable` (not of the protocol's form).
    """

    device: str
    kind: str
    job: JobView | None = None
    name: str = ""
    body: Document = field(default_factory=dict)
    seq: int | None = None
    ledger: str | None = None
    at: str | None = None
    is_historic: bool = False


@dataclass(frozen=True)
class Outgoing:
    """One message to publish with QoS 1."""

    topic: str
    payload: str
    expiry_s: int | None = None
    response_topic: str | None = None
    is_retained: bool = False


@dataclass
class DeviceView:
    """What a console knows of the device itself."""

    state: str | None = None
    """`online`, `offline`, `stopped`, or None where its status was never heard."""
    boot: int = 0
    conn: int = 0
    ledger: str | None = None
    info: Document | None = None
    reported: Document | None = None
    heartbeat: Document | None = None


@dataclass
class _Ask:
    """Asking the device again and again for records below a hole."""

    first: int
    due_s: float
    wait_s: float = _FIRST_ASK_S
    lowest: int | None = None
    """Lowest number above `cumulative` that came since the last time."""
    behind: int = 0
    """How many times in a row the replay began right behind the hole."""


class DeviceMirror:
    """One console's view of one device. Not thread-safe.

    Args:
        device: its id.
        acknowledges: whether this console keeps what it hears and so may acknowledge it and
            answer syncs. Only one durable console a device may: what it acknowledges, the
            device forgets.
        follows_all: whether jobs of others count too.
        window: submits under way at a time.
        stale_after_s: after so long without news an open job is marked stale.
        random: the source of jitter.
        reply: the last level of the response topic of `rebirth`.
    """

    def __init__(
        self,
        device: str,
        *,
        acknowledges: bool = False,
        follows_all: bool = False,
        window: int = WINDOW,
        stale_after_s: float = STALE_AFTER_S,
        random: Random | None = None,
        reply: str = "console",
    ) -> None:
        self.topics = ConsoleTopics(device)
        self.device = DeviceView()
        self.jobs: dict[str, JobView] = {}
        self.follows_all = follows_all
        self.numbering = Numbering()
        self.is_changed = False
        """Whether numbers or the device's view changed since the last `commit`."""
        self._acknowledges = acknowledges
        self._stale_after_s = stale_after_s
        self._reply = reply
        self._queue = ResendQueue(window, random)
        self._submits: dict[str, Command] = {}
        self._numberings: dict[str | None, Numbering] = {None: self.numbering}
        self._committed = 0
        self._acked = 0
        self._acked_s = float("-inf")
        self._sync: Document | None = None
        self._ask: _Ask | None = None
        self._asks_now = False
        self._needs_sync_s: float | None = None
        self._rebirth_wait_s = _REBIRTH_AFTER_S

    # --- what the owner wants -------------------------------------------------------------

    def submit(self, command: Command, now_s: float) -> None:
        """Send a job, and again until a state of it is heard, in every ledger anew."""
        job = self.jobs.setdefault(command.job_id, JobView(command.job_id, heard_s=now_s))
        self._submits[command.job_id] = command
        if job.state is None:
            self._queue.put(command)

    def cancel(self, command: Command, now_s: float) -> None:
        """Send a cancel, and again until the job's end is heard."""
        job = self.jobs.setdefault(command.job_id, JobView(command.job_id, heard_s=now_s))
        if not job.has_ended:
            self._queue.put(command, is_cancel=True)

    def restore(
        self,
        device: DeviceView | None = None,
        numberings: dict[str | None, Numbering] | None = None,
        jobs: Iterable[JobView] = (),
    ) -> None:
        """Take over what the owner kept from before, or of jobs that were forgotten since."""
        if numberings is not None:
            self._numberings = numberings
        if device is not None:
            self.device = device
            self.numbering = self._numberings.setdefault(device.ledger, Numbering())
            self._committed = self.numbering.cumulative
        for job in jobs:
            self.jobs.setdefault(job.job_id, job)

    def forget_complete(self) -> None:
        """Let go of jobs that are complete; `restore` them before they are heard of again."""
        done = [
            job_id
            for job_id, job in self.jobs.items()
            if job.is_complete or (job.has_ended and job.is_stale)
        ]
        for job_id in done:
            del self.jobs[job_id]
            self._submits.pop(job_id, None)

    def commit(self) -> None:
        """Take note that everything heard so far is safe: it may be acknowledged now."""
        self._committed = self.numbering.cumulative
        self.is_changed = False

    @property
    def unanswered(self) -> int:
        """How many commands wait for an answer."""
        return len(self._queue)

    @property
    def numberings(self) -> dict[str | None, Numbering]:
        """The numbers that count, by ledger."""
        return self._numberings

    @property
    def is_away(self) -> bool:
        """Say whether the device is known to be offline or stopped."""
        return self.device.state in _AWAY

    # --- what comes from the network ------------------------------------------------------

    def connected(self, now_s: float) -> None:
        """Take note of a new connection of ours: what was sent before it may be lost."""
        self._queue.hurry()
        self._acked = 0
        self._needs_sync_s = now_s
        self._rebirth_wait_s = _REBIRTH_AFTER_S

    def hear(self, heard: Heard, now_s: float, wall_ms: int) -> list[Change]:
        """Take in one report and return what is news."""
        try:
            changes = self._hear(heard, now_s, wall_ms)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            # Numbered all the same: it would come again for ever, and hold up all behind it.
            changes = [self._change("unreadable", heard, body={"error": repr(exc)[:200]})]
        self._count_record(heard)
        return changes

    def _hear(self, heard: Heard, now_s: float, wall_ms: int) -> list[Change]:
        match heard.kind:
            case "status":
                return self._hear_status(heard.document, now_s)
            case "job":
                return self._hear_state(heard, now_s, wall_ms)
            case "result":
                return self._hear_result(heard, now_s)
            case "event":
                return self._hear_event(heard)
            case "progress":
                return self._hear_progress(heard, now_s)
            case "sync":
                return self._hear_sync(_body(heard), now_s)
            case "info" | "reported" | "heartbeat":
                return self._hear_snapshot(heard, now_s)
        return []

    def _hear_status(self, document: Document, now_s: float) -> list[Change]:
        state, place = str(document["state"]), (int(document["boot"]), int(document["conn"]))
        changes = self._meet_ledger(document.get("ledger"), now_s)
        known = self.device
        if place < (known.boot, known.conn):
            return changes
        if (state, place) == (known.state, (known.boot, known.conn)):
            return changes
        came_back = state == "online"
        known.state, (known.boot, known.conn) = state, place
        self.is_changed = True
        if came_back:
            self._queue.hurry(now_s - _ON_ITS_WAY_S)
        return [*changes, self._change("status", body=dict(document))]

    def _meet_ledger(self, ledger: object, now_s: float) -> list[Change]:
        """Begin anew where the device says that it has another ledger than it had."""
        known = self.device.ledger
        if not isinstance(ledger, str) or ledger == known:
            return []
        self.is_changed = True
        self.device.ledger = ledger
        if known is None:
            # An older device did not say; its numbers go on.
            self._numberings[ledger] = self._numberings.pop(None, self.numbering)
            return []
        self.numbering = self._numberings.setdefault(ledger, Numbering())
        self._committed = self._acked = 0
        self._ask = None
        # Its counters of starts and connections are in the ledger too.
        self.device.boot = self.device.conn = 0
        for job in self.jobs.values():
            if not job.has_ended:
                job.rev, job.has_doubtful_rev = 0, True
                self._send_again(job)
        return [self._change("ledger", body={"ledger": ledger, "before": known})]

    def _send_again(self, job: JobView) -> bool:
        """Put a job's own command in the queue again; say whether there is one."""
        command = self._submits.get(job.job_id)
        if command is not None and job.job_id not in self._queue:
            self._queue.put(command)
        return command is not None

    def _hear_state(self, heard: Heard, now_s: float, wall_ms: int) -> list[Change]:
        body = _body(heard)
        state, rev = JobState(body["state"]), int(body["rev"])
        reported_ms = parse_at(heard.document["ts"])
        job = self._find_job(heard.rest, now_s)
        if job is None:
            return []
        fresh = self._freshen(job, now_s)
        self._queue.answer(job.job_id, by_end=state in ENDS)
        if not _counts(job, state, rev):
            return fresh
        job.rev, job.state, job.attempt = rev, state, int(body.get("attempt", 0))
        job.reason = body.get("reason")
        if not self._is_present(heard):
            job.has_doubtful_rev = True
        if state in ENDS:
            job.reported_ms, job.received_ms = reported_ms, wall_ms
        return [self._change("state", heard, job=replace(job))]

    def _hear_result(self, heard: Heard, now_s: float) -> list[Change]:
        body = _body(heard)
        job = self._find_job(heard.rest, now_s)
        if job is None or job.result is not None:
            return []
        self._freshen(job, now_s)
        job.result = body
        return [self._change("result", heard, job=replace(job))]

    def _hear_progress(self, heard: Heard, now_s: float) -> list[Change]:
        job = self._find_job(heard.rest, now_s)
        if job is None or job.has_ended:
            return []
        self._freshen(job, now_s)
        job.progress = _body(heard)
        return [self._change("progress", heard, job=replace(job))]

    def _hear_event(self, heard: Heard) -> list[Change]:
        body, seq = _body(heard), self._find_seq(heard)
        if seq is not None and seq in self.numbering:
            return []
        if heard.rest == "gap" and seq is not None:
            self._count(int(body["from_seq"]), int(body["to_seq"]))
        return [self._change("event", heard)]

    def _hear_snapshot(self, heard: Heard, now_s: float) -> list[Change]:
        body = _body(heard)
        changes = self._meet_ledger(body.get("ledger"), now_s) if heard.kind == "info" else []
        is_historic = heard.document.get("hist") is True
        if getattr(self.device, heard.kind) == body and not is_historic:
            return changes
        if not is_historic:
            setattr(self.device, heard.kind, body)
            self.is_changed = True
        return [*changes, self._change(heard.kind, heard)]

    def _find_job(self, job_id: str, now_s: float) -> JobView | None:
        if job_id not in self.jobs and self.follows_all:
            self.jobs[job_id] = JobView(job_id, heard_s=now_s)
        return self.jobs.get(job_id)

    def _freshen(self, job: JobView, now_s: float) -> list[Change]:
        """Take note that something was heard of a job."""
        job.heard_s = now_s
        if not job.is_stale:
            return []
        job.is_stale = False
        return [self._change("fresh", job=replace(job))]

    # --- numbers --------------------------------------------------------------------------

    def _find_seq(self, heard: Heard) -> int | None:
        """Return a record's number, where it is one of the device's present ledger.

        What is not counted here comes again, because it is not acknowledged.
        """
        seq = heard.document.get("seq")
        return seq if isinstance(seq, int) and seq >= 1 and self._is_present(heard) else None

    def _is_present(self, heard: Heard) -> bool:
        """Say whether a report is surely one of the device's present ledger."""
        ledger = heard.document.get("ledger")
        if isinstance(ledger, str) and self.device.ledger is not None:
            return not heard.is_retained and ledger == self.device.ledger
        boot = heard.document.get("boot")
        return not heard.is_retained and (boot is None or self.device.boot in (0, boot))

    def _count_record(self, heard: Heard) -> None:
        """Count a record's number once the record has been taken in."""
        seq = self._find_seq(heard)
        if seq is None:
            return
        self._count(seq, seq)
        if self._ask is not None and seq > self.numbering.cumulative:
            lowest = self._ask.lowest
            self._ask.lowest = seq if lowest is None else min(lowest, seq)

    def _count(self, first: int, last: int) -> None:
        if first >= 1:
            self.is_changed = self.numbering.add(first, last) or self.is_changed

    def _give_up(self, spans: list[Span]) -> list[Change]:
        """Count numbers that the device does not have any more, and say so."""
        for span in spans:
            self._count(*span)
        return [
            self._change("lost", body={"from_seq": s.first, "to_seq": s.last, "count": s.size})
            for s in spans
        ]

    # --- reconcile ------------------------------------------------------------------------

    def _hear_sync(self, body: Document, now_s: float) -> list[Change]:
        listed = {str(job_id): int(rev) for job_id, rev in body["open"]}
        is_whole = int(body.get("open_count", len(listed))) <= len(listed)
        changes = self._meet_ledger(body.get("ledger"), now_s)
        self._needs_sync_s = None
        if self._acknowledges:
            changes += self._hear_highest(body)
            self._sync = {"listed": listed, "is_whole": is_whole}
        for job_id in listed:
            if job_id in self.jobs:
                changes += self._freshen(self.jobs[job_id], now_s)
        self._queue.hurry(now_s - _ON_ITS_WAY_S)
        return changes

    def _hear_highest(self, body: Document) -> list[Change]:
        """Give up numbers that the device does not have any more."""
        oldest, highest = body.get("oldest_seq"), body.get("seq")
        if isinstance(oldest, int):
            highest = oldest - 1
        elif body.get("outbox_depth") != 0:
            return []
        if not isinstance(highest, int):
            return []
        is_first = self.numbering.cumulative == 0 and not self.numbering.hole
        holes = self.numbering.holes_up_to(highest)
        # What was before a console's time was some other console's.
        changes = self._give_up(holes)
        return [] if is_first else changes

    def _build_answer(self, now_s: float) -> list[Outgoing]:
        """Answer the newest sync: acknowledge, send what the device lacks, ask for what we lack."""
        if self._sync is None:
            return []
        listed, is_whole = self._sync["listed"], self._sync["is_whole"]
        self._sync = None
        missing, unknown = self._compare(listed, is_whole=is_whole)
        pending = {item.command.job_id: item for item in self._queue.find_active()}
        cancel = [job_id for job_id, item in pending.items() if item.is_cancel]
        # Those beyond the window wait for their turn.
        chosen = [item for job_id in missing if (item := self._pick(job_id, pending)) is not None]
        for item in chosen:
            self._queue.mark_sent(item, now_s)
        first: Document = {"acked_seq": self._committed}
        if unknown:
            first["unknown"] = unknown[:_ANSWER_IDS]
        if cancel:
            first["cancel"] = cancel
        self._acked, self._acked_s = self._committed, now_s
        return [self._sync_message(part) for part in _split(first, chosen)]

    def _pick(self, job_id: str, pending: dict[str, Pending]) -> Pending | None:
        job, item = self.jobs[job_id], pending.get(job_id)
        if item is not None:
            return None if item.is_cancel else item
        # It succeeded and its result has not come: only `missing` brings that again.
        return Pending(self._submits[job_id]) if job.has_ended else None

    def _compare(self, listed: dict[str, int], *, is_whole: bool) -> tuple[list[str], list[str]]:
        """Return the jobs that the device lacks, and those whose state we lack."""
        missing: list[str] = []
        unknown = [job_id for job_id in listed if job_id not in self.jobs and self.follows_all]
        for job_id, job in self.jobs.items():
            if job_id in listed:
                if job.has_ended or job.rev == listed[job_id]:
                    continue
                # Lower there than here: perhaps a ledger from a backup, whose ends must count.
                job.has_doubtful_rev = job.has_doubtful_rev or listed[job_id] < job.rev
                unknown.append(job_id)
            elif not job.is_complete and (is_whole or job.state is None or job.has_ended):
                self._sort_out(job, missing, unknown)
        return missing, unknown

    def _sort_out(self, job: JobView, missing: list[str], unknown: list[str]) -> None:
        """Put a job that the device does not list where it belongs."""
        if job.has_ended:
            if job.job_id in self._submits:
                missing.append(job.job_id)
        elif self._send_again(job):
            missing.append(job.job_id)
        else:
            unknown.append(job.job_id)

    def _sync_message(self, body: Document) -> Outgoing:
        ledger = {} if self.device.ledger is None else {"ledger": self.device.ledger}
        payload = wrap("sync", {**ledger, **body})
        return Outgoing(self.topics.answer, payload, _SYNC_EXPIRY_S)

    # --- what is to be sent ---------------------------------------------------------------

    def take_due(self, now_s: float) -> list[Outgoing]:
        """Return what is to be sent now; call it while connected only."""
        sent: list[Outgoing] = []
        if self._acknowledges:
            if self._asks_now and self._sync is None:
                sent.append(self._sync_message({"acked_seq": self._committed}))
            self._asks_now = False
            sent += self._build_answer(now_s)
            sent += self._build_ack(now_s)
            sent += self._build_rebirth(now_s)
        for item in self._queue.take_due(now_s, is_away=self.is_away):
            job_id = item.command.job_id
            topic = self.topics.cancel(job_id) if item.is_cancel else self.topics.submit(job_id)
            expiry_s = _CANCEL_EXPIRY_S if item.is_cancel else None
            sent.append(Outgoing(topic, item.command.payload, expiry_s))
        return sent

    def take_last(self, now_s: float) -> list[Outgoing]:
        """Return the acknowledgement that is still owed, at once: this console is about to go."""
        return self._build_ack(now_s, at_once=True) if self._acknowledges else []

    def _build_ack(self, now_s: float, *, at_once: bool = False) -> list[Outgoing]:
        fresh = self._committed - self._acked
        # A device that is away asks with its next sync.
        if fresh <= 0 or self.is_away:
            return []
        is_soon = fresh < ACK_EVERY_RECORDS and now_s - self._acked_s < ACK_EVERY_S
        if is_soon and not at_once:
            return []
        self._acked, self._acked_s = self._committed, now_s
        ledger = {} if self.device.ledger is None else {"ledger": self.device.ledger}
        return [
            Outgoing(self.topics.ack, wrap("ack", {"seq": self._acked, **ledger}), _ACK_EXPIRY_S)
        ]

    def _build_rebirth(self, now_s: float) -> list[Outgoing]:
        """Ask a device that is online for its sync, where this connection has heard none."""
        if self._needs_sync_s is None or self.device.state != "online":
            return []
        if now_s - self._needs_sync_s < self._rebirth_wait_s:
            return []
        self._needs_sync_s = now_s
        self._rebirth_wait_s = min(self._rebirth_wait_s * 8, _LONGEST_REBIRTH_S)
        topic = self.topics.command("rebirth")
        payload = encode({"v": 1, "id": new_id(), "type": "cmd.rebirth", "body": {}})
        return [Outgoing(topic, payload, _SYNC_EXPIRY_S, self.topics.reply(self._reply))]

    def watch(self, now_s: float) -> list[Change]:
        """Mark what was not heard of for long; give up numbers that do not come."""
        changes = [
            change
            for job in self.jobs.values()
            if not (job.is_complete or job.is_stale) and now_s - job.heard_s >= self._stale_after_s
            for change in self._mark_stale(job)
        ]
        return changes + self._watch_hole(now_s)

    def _mark_stale(self, job: JobView) -> list[Change]:
        job.is_stale = True
        if not job.has_ended:
            self._send_again(job)
        return [self._change("stale", job=replace(job))]

    def _watch_hole(self, now_s: float) -> list[Change]:
        """Ask for numbers below a hole; give them up where the device has begun behind it thrice.

        A replay goes in order, from `acked_seq` on: what it begins with is the lowest
        number that the device has.
        """
        hole = self.numbering.hole
        if hole is None or not self._acknowledges or self.is_away:
            self._ask = None
            return []
        ask = self._ask
        if ask is None or ask.first != hole.first:
            self._ask = _Ask(hole.first, now_s + _FIRST_ASK_S)
            return []
        if now_s < ask.due_s:
            return []
        ask.behind = ask.behind + 1 if ask.lowest == hole.last + 1 else 0
        if ask.behind > _ASKS:
            self._ask = None
            return self._give_up([hole])
        ask.lowest = None
        ask.wait_s = min(ask.wait_s * 2, _LONGEST_ASK_S)
        ask.due_s = now_s + ask.wait_s
        self._asks_now = True
        return []

    def _change(
        self,
        kind: str,
        heard: Heard | None = None,
        *,
        job: JobView | None = None,
        body: Document | None = None,
    ) -> Change:
        document = heard.document if heard else {}
        return Change(
            self.topics.device,
            kind,
            job,
            heard.rest if heard else "",
            document.get("body", {}) if body is None else body,
            self._find_seq(heard) if heard else None,
            self.device.ledger,
            document.get("ts"),
            document.get("hist") is True,
        )


def _counts(job: JobView, state: JobState, rev: int) -> bool:
    """Say whether a reported state is newer than what is known."""
    if job.has_ended:
        return False
    if state in ENDS and job.has_doubtful_rev:
        return True
    return rev > job.rev


def _body(heard: Heard) -> Document:
    body = heard.document["body"]
    if not isinstance(body, dict):
        msg = "the body is no object"
        raise TypeError(msg)
    return body


def _split(first: Document, items: list[Pending]) -> list[Document]:
    """Return the bodies of one answer: whole jobs fill each up to its bound."""
    bodies, size = [first], 0
    for item in items:
        payload = item.command.payload
        if size and size + len(payload) > _ANSWER_BYTES:
            bodies.append({})
            size = 0
        bodies[-1].setdefault("missing", []).append(json.loads(payload))
        size += len(payload)
    return bodies
