"""The history checker: reads a console's journal and a ledger, and finds what must not be.

Written by hand from docs/protocol.md ("Jobs", "Outbox and loss"), sharing no code with the
product: it imports nothing but the standard library, and a test sees to that. It takes no
word for anything: what a console was told, what it sent and what stands in the ledger at the
end must fit together.

What it finds is of one of three classes:

- `lost`: an accepted job without its one end, an end or a result that never arrived, a number
  of the outbox that neither arrived nor was reported as dropped;
- `double`: two ends, two results, an outcome of an attempt that was not the current one, a job
  that ran although it must not, a number that was used twice;
- `illegal`: a history that the table of transitions does not have, a `rev` that jumps or means
  two things, a result without a success, a job from nowhere.

How to read it: `check(journal, ledger)` returns a `Report`; each rule is one function whose
docstring is the sentence it checks.
"""

import hashlib
import json
import re
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from math import inf
from pathlib import Path
from typing import Any

LOST, DOUBLE, ILLEGAL = "lost", "double", "illegal"

# docs/protocol.md, "Jobs", rule 5, typed out: (from, to), None for a job that is not known yet.
ALLOWED = {
    (None, "queued"),
    (None, "canceled"),
    (None, "expired"),
    (None, "rejected"),
    ("queued", "running"),
    ("queued", "failed"),
    ("queued", "timed_out"),
    ("queued", "canceled"),
    ("queued", "expired"),
    ("running", "queued"),
    ("running", "succeeded"),
    ("running", "failed"),
    ("running", "timed_out"),
    ("running", "canceled"),
}
ENDS = {"succeeded", "failed", "timed_out", "canceled", "expired", "rejected"}
_RESULT_FILE = re.compile(r"results/(?P<job>[^/.]+)\.(?P<attempt>\d+)\.json")
_SHOWN_LINES = 40


@dataclass(frozen=True)
class Finding:
    """One thing that must not be."""

    kind: str
    """`lost`, `double` or `illegal`."""
    rule: str
    job: str | None
    detail: str


@dataclass(frozen=True)
class Step:
    """A row of the ledger's history."""

    rev: int
    state: str
    attempt: int
    reason: str | None


@dataclass(frozen=True)
class LedgerJob:
    """A job as the ledger holds it."""

    state: str
    rev: int
    attempt: int
    has_ended: bool
    source: str
    reason: str | None
    body: Any
    result: Any


@dataclass
class Ledger:
    """What the ledger's file says at the end."""

    jobs: dict[str, LedgerJob] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=lambda: defaultdict(list))
    last_seq: int = 0
    unsent: int = 0
    folder: Path | None = None


@dataclass(frozen=True)
class Sent:
    """One submit or cancel that the console published."""

    t: float
    body: Any
    wall: float | None
    not_after: float | None
    expiry: int | None
    tag: int


@dataclass(frozen=True)
class Told:
    """One state that the console received."""

    t: float
    state: str
    rev: int
    attempt: int
    reason: str | None


@dataclass(frozen=True)
class Outcome:
    """One result that the console received."""

    t: float
    body: Any
    seq: int | None


@dataclass
class Log:
    """What the console's journal says."""

    submits: dict[str, list[Sent]] = field(default_factory=lambda: defaultdict(list))
    cancels: dict[str, list[Sent]] = field(default_factory=lambda: defaultdict(list))
    taken: set[int] = field(default_factory=set)
    told: dict[str, list[Told]] = field(default_factory=lambda: defaultdict(list))
    results: dict[str, list[Outcome]] = field(default_factory=lambda: defaultdict(list))
    records: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Of each outbox number, the topic and body that came under it."""
    gaps: list[tuple[int, int]] = field(default_factory=list)
    ledgers: list[str] = field(default_factory=list)
    wrong_clocks: list[tuple[float, float]] = field(default_factory=list)
    """From when until when the device's wall clock was wrong."""


@dataclass
class Report:
    """What the checker found."""

    findings: list[Finding]
    ends: dict[str, int]
    jobs: int
    notes: list[str] = field(default_factory=list)
    """What was seen and is no fault under the given rules, such as undelivered records."""

    def count(self, kind: str) -> int:
        """Return how many jobs, or numbers, have a finding of a class."""
        return len({finding.job or finding for finding in self.findings if finding.kind == kind})


# --- reading ---------------------------------------------------------------------------------


def read_ledger(path: Path) -> Ledger:
    """Read the ledger's file, without changing it."""
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    try:
        ledger = Ledger(folder=path.parent)
        for row in connection.execute("SELECT * FROM jobs"):
            ledger.jobs[row["job_id"]] = LedgerJob(
                state=row["state"],
                rev=row["rev"],
                attempt=row["attempt"],
                has_ended=row["ended_ms"] is not None,
                source=row["source"],
                reason=row["reason_code"],
                body=_without_id(json.loads(row["body"])) if row["body"] else None,
                result=json.loads(row["result"]) if row["result"] else None,
            )
        for row in connection.execute("SELECT * FROM transitions ORDER BY job_id, rev"):
            step = Step(row["rev"], row["state"], row["attempt"], row["reason_code"])
            ledger.steps[row["job_id"]].append(step)
        for row in connection.execute("SELECT value FROM counters WHERE name = 'seq'"):
            ledger.last_seq = row["value"]
        ledger.unsent = connection.execute("SELECT count(*) FROM outbox").fetchone()[0]
        return ledger
    finally:
        connection.close()


def read_log(path: Path) -> Log:
    """Read the console's journal."""
    log = Log()
    with path.open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            if line["do"] == "send":
                _read_send(log, line)
            elif line["do"] == "puback":
                log.taken.add(line["tag"])
            elif line["do"] == "heard":
                _read_heard(log, line)
            elif line["do"] == "note" and line.get("fault") == "clock":
                _read_clock(log, line)
    return log


def _read_send(log: Log, line: dict[str, Any]) -> None:
    words = line["topic"].split("/")[4:]
    if words[0] != "job":
        return
    envelope = json.loads(line["text"])
    sent = Sent(
        line["t"],
        _without_id(envelope["body"]),
        _parse_time(envelope.get("ts")),
        _parse_time(envelope.get("not_after")),
        line["expiry"],
        line["tag"],
    )
    target = log.cancels if words[2:] == ["cancel"] else log.submits
    target[words[1]].append(sent)


def _read_clock(log: Log, line: dict[str, Any]) -> None:
    if line["what"] == "broken":
        log.wrong_clocks.append((line["t"], inf))
    else:
        log.wrong_clocks[-1] = (log.wrong_clocks[-1][0], line["t"])


def _without_id(body: Any) -> Any:
    """Return a job's body as it is compared: the id in it does not count (rule 2)."""
    return {k: v for k, v in body.items() if k != "job_id"} if isinstance(body, dict) else body


def _parse_time(text: str | None) -> float | None:
    return None if text is None else datetime.fromisoformat(text).timestamp()


def _read_heard(log: Log, line: dict[str, Any]) -> None:
    kind, *rest = line["topic"].split("/")[4:]
    document = json.loads(line["text"])
    body = document.get("body")
    ledger = document.get("ledger") or (body or {}).get("ledger")
    if ledger and kind in ("status", "info", "sync") and ledger not in log.ledgers:
        log.ledgers.append(ledger)
    seq = document.get("seq")
    if seq is not None:
        record = json.dumps([line["topic"], document["type"], body], sort_keys=True)
        if record not in log.records[seq]:
            log.records[seq].append(record)
    if kind == "job":
        reason = body["reason"] and body["reason"]["code"]
        told = Told(line["t"], body["state"], body["rev"], body["attempt"], reason)
        log.told[rest[0]].append(told)
    elif kind == "result":
        log.results[rest[0]].append(Outcome(line["t"], body, seq))
    elif kind == "event" and rest == ["gap"]:
        log.gaps.append((body["from_seq"], body["to_seq"]))


# --- rules -----------------------------------------------------------------------------------

Findings = Iterator[Finding]


def check_acceptance(log: Log, ledger: Ledger) -> Findings:
    """A job that the broker took, or that the device spoke of, is in the ledger."""
    for job, sends in log.submits.items():
        if job not in ledger.jobs and any(sent.tag in log.taken for sent in sends):
            yield Finding(LOST, "accepted and unknown", job, "submitted, and not in the ledger")
    for job in log.told.keys() | log.results.keys():
        if job not in ledger.jobs:
            yield Finding(LOST, "reported and unknown", job, "reported, and not in the ledger")


def check_origin(log: Log, ledger: Ledger) -> Findings:
    """A job came from somewhere, with a body that was sent."""
    for job, row in ledger.jobs.items():
        if row.source != "mqtt":
            continue
        sends = log.submits.get(job, [])
        if not sends and job not in log.cancels:
            yield Finding(ILLEGAL, "job from nowhere", job, "in the ledger, and never submitted")
        if row.body and sends and all(sent.body != row.body for sent in sends):
            yield Finding(ILLEGAL, "body from nowhere", job, "its body was never submitted")


def check_ends(log: Log, ledger: Ledger) -> Findings:
    """Every job has one end, with a reason, and it is the last thing in its history."""
    del log
    for job, row in ledger.jobs.items():
        ends = [step for step in ledger.steps[job] if step.state in ENDS]
        if not ends:
            yield Finding(LOST, "no end", job, f"it is still {row.state}")
        if len(ends) > 1:
            yield Finding(DOUBLE, "two ends", job, _show(ledger.steps[job]))
        if any(not end.reason for end in ends):
            yield Finding(ILLEGAL, "end without a reason", job, _show(ledger.steps[job]))
        if bool(ends) != row.has_ended:
            yield Finding(ILLEGAL, "end in one table only", job, f"{row} {_show(ends)}")


def check_order(log: Log, ledger: Ledger) -> Findings:
    """A history follows the table of transitions, with `rev` from 1 without a gap."""
    del log
    for job, row in ledger.jobs.items():
        steps = ledger.steps[job]
        before: str | None = None
        attempt = 0
        for number, step in enumerate(steps, 1):
            if (before, step.state) not in ALLOWED:
                name = f"{before} → {step.state}"
                yield Finding(ILLEGAL, f"transition {name}", job, _show(steps))
            if step.rev != number:
                yield Finding(ILLEGAL, "rev with a gap", job, _show(steps))
                break
            if step.attempt < attempt:
                yield Finding(ILLEGAL, "attempt went back", job, _show(steps))
            before, attempt = step.state, step.attempt
        if steps and (steps[-1].rev, steps[-1].state) != (row.rev, row.state):
            yield Finding(ILLEGAL, "row and history differ", job, f"{row} {_show(steps)}")


def check_states_told(log: Log, ledger: Ledger) -> Findings:
    """What the console was told under a `rev` is what the ledger's history has under it."""
    for job, told in log.told.items():
        history = {step.rev: step for step in ledger.steps.get(job, [])}
        for item in told:
            step = history.get(item.rev)
            if job in ledger.jobs and step is None:
                detail = f"told {item.state} as rev {item.rev}; {_show(list(history.values()))}"
                yield Finding(ILLEGAL, "rev from nowhere", job, detail)
            elif step is not None and step.state != item.state:
                detail = f"rev {item.rev}: told {item.state}, the ledger has {step.state}"
                yield Finding(ILLEGAL, "rev means two things", job, detail)


def check_ends_told(log: Log, ledger: Ledger) -> Findings:
    """The console's view, by the highest `rev` it was told, is the ledger's end."""
    for job, row in ledger.jobs.items():
        told = max(log.told.get(job, []), key=lambda item: item.rev, default=None)
        if told is None:
            yield Finding(LOST, "end not told", job, f"{row.state}; the console heard nothing")
        elif row.has_ended and told.state != row.state and told.rev <= row.rev:
            detail = f"{row.state} (rev {row.rev}); the console heard {told.state} ({told.rev})"
            yield Finding(LOST, "end not told", job, detail)
        elif told.state in ENDS and told.state != row.state:
            yield Finding(DOUBLE, "two ends told", job, f"{told} {row.state}")


def check_results(log: Log, ledger: Ledger) -> Findings:
    """A job that succeeded has exactly one result, and no other job has any."""
    for job, row in ledger.jobs.items():
        results = log.results.get(job, [])
        if row.state != "succeeded":
            if results or row.result is not None:
                yield Finding(ILLEGAL, "result without a success", job, f"it is {row.state}")
            continue
        if row.result is None:
            yield Finding(LOST, "no result kept", job, "succeeded, and the ledger has no result")
        if not results:
            yield Finding(LOST, "no result told", job, "succeeded, and no result arrived")
        different = {json.dumps(item.body, sort_keys=True) for item in results}
        if len(different) > 1:
            yield Finding(DOUBLE, "two results", job, " / ".join(sorted(different))[:500])
        elif results and row.result is not None and results[0].body != row.result:
            yield Finding(DOUBLE, "two results", job, "told another than the ledger keeps")
    for job in log.results.keys() - ledger.jobs.keys():
        yield Finding(ILLEGAL, "result without a job", job, "the ledger does not know it")


def check_result_attempts(log: Log, ledger: Ledger) -> Findings:
    """A result is of the attempt that was current when the job ended, and of this job."""
    for job, row in ledger.jobs.items():
        body = row.result
        ends = [step for step in ledger.steps[job] if step.state == "succeeded"]
        if body is None or not ends:
            continue
        if body.get("job_id") != job or body.get("attempt") != ends[-1].attempt:
            detail = f"attempt {ends[-1].attempt} ended, the result says {body.get('attempt')}"
            yield Finding(DOUBLE, "result of another attempt", job, detail)
        output = body.get("output")
        if not (isinstance(output, dict) and "file" in output):
            continue
        named = _RESULT_FILE.fullmatch(output["file"])
        if named is None or named["job"] != job:
            yield Finding(ILLEGAL, "result file of another job", job, output["file"])
        elif int(named["attempt"]) != ends[-1].attempt:
            detail = f"attempt {ends[-1].attempt} ended, its output is {output['file']}"
            yield Finding(DOUBLE, "outcome of an old attempt", job, detail)
    del log


def check_outputs(log: Log, ledger: Ledger) -> Findings:
    """A result's output is what this job's own input gives, and its file is there and whole.

    The models of a chaos run tell: `echo` gives its input back, `slow` its number.
    """
    del log
    for job, row in ledger.jobs.items():
        # Of a file from a folder there is no input in the job to compare with.
        if row.result is None or not row.body or "tensors" not in row.body["input"]:
            continue
        output = row.result.get("output")
        if isinstance(output, dict) and "file" in output:
            data = _read_file(ledger.folder, output["file"])
            if data is None or hashlib.sha256(data).hexdigest() != output["sha256"]:
                yield Finding(LOST, "result file damaged", job, str(output))
                continue
            output = json.loads(data)
        expected = [float(item) for item in row.body["input"]["tensors"][0]["data"]]
        got = list(_numbers(output))
        is_slow = row.body["model"] in ("slow", "endless")
        if (set(got) != set(expected)) if is_slow else (got != expected):
            yield Finding(DOUBLE, "output of another job", job, f"{got[:8]} for {expected[:8]}")


def _read_file(folder: Path | None, name: str) -> bytes | None:
    path = None if folder is None else folder / name
    return path.read_bytes() if path is not None and path.is_file() else None


def _numbers(value: Any) -> Iterator[float]:
    """Yield the numbers of a result's tensor data, in order."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("shape", "name", "datatype"):
                yield from _numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def check_cancel_first(log: Log, ledger: Ledger) -> Findings:
    """A job whose cancel was answered before its submit was sent is canceled, and never ran."""
    for job, sends in log.submits.items():
        first = min(sent.t for sent in sends)
        told = [item for item in log.told.get(job, []) if item.t < first]
        if not any(item.state == "canceled" for item in told) or job not in ledger.jobs:
            continue
        if [step.state for step in ledger.steps[job]] != ["canceled"]:
            yield Finding(DOUBLE, "ran after its cancel", job, _show(ledger.steps[job]))


def check_conflicts(log: Log, ledger: Ledger) -> Findings:
    """Where an id comes again with another body, the one that was accepted stands."""
    for job, sends in log.submits.items():
        row = ledger.jobs.get(job)
        first = sends[0].body
        others = [sent.t for sent in sends if sent.body != first]
        if not others or row is None or not row.body:
            continue
        accepted = any(item.t < min(others) for item in log.told.get(job, []))
        if accepted and row.body != first:
            yield Finding(DOUBLE, "conflict replaced the original", job, str(row.body)[:300])


def check_expired(log: Log, ledger: Ledger) -> Findings:
    """A job that was past its time whenever it was sent never runs; one that expired never ran.

    And none expires that has no time limit, or before its `queue_ttl_s` has passed since it was
    first sent, whatever the device's clock says.
    """
    for job, row in ledger.jobs.items():
        steps = ledger.steps[job]
        if row.state == "expired" and steps[0].state == "expired" and row.attempt:
            yield Finding(DOUBLE, "ran after its time", job, _show(steps))
        sends = log.submits.get(job, [])
        is_late = bool(sends) and all(_was_late(sent) for sent in sends)
        if is_late and (row.attempt or len(steps) != 1) and not _was_clock_wrong(log, job):
            yield Finding(DOUBLE, "ran after its time", job, _show(steps))
        if row.state == "expired" and sends:
            yield from _check_expiry(log, job, sends)


def _check_expiry(log: Log, job: str, sends: list[Sent]) -> Findings:
    if any(sent.expiry is not None or sent.not_after is not None for sent in sends):
        return
    bodies = [sent.body for sent in sends if isinstance(sent.body, dict)]
    limits = [float(body["queue_ttl_s"]) for body in bodies if "queue_ttl_s" in body]
    if not limits:
        yield Finding(LOST, "expired without a time limit", job, _show_times(log, job))
        return
    told = [item.t for item in log.told.get(job, []) if item.state == "expired"]
    if told and min(told) < min(sent.t for sent in sends) + min(limits):
        yield Finding(LOST, "expired before its time", job, _show_times(log, job))


def _was_clock_wrong(log: Log, job: str) -> bool:
    """Say whether the device's clock was wrong at any time between first submit and first state."""
    first = min(sent.t for sent in log.submits[job])
    last = min((item.t for item in log.told.get(job, [])), default=inf)
    return any(begin <= last and first <= end for begin, end in log.wrong_clocks)


def _show_times(log: Log, job: str) -> str:
    sent = [round(item.t, 3) for item in log.submits[job]]
    return f"sent {sent}, told {[(round(item.t, 3), item.state) for item in log.told.get(job, [])]}"


def _was_late(sent: Sent) -> bool:
    if sent.expiry is not None or sent.not_after is None or sent.wall is None:
        return False
    return sent.not_after <= sent.wall


def check_numbers(log: Log, ledger: Ledger) -> Findings:
    """Every outbox number up to the last arrived or was reported as dropped, and means one thing.

    Both may be true of a number: the device cannot know what arrived. Only for a run with one
    ledger: a new one counts anew.
    """
    if len(log.ledgers) > 1:
        return
    for seq, records in log.records.items():
        if len(records) > 1:
            yield Finding(DOUBLE, "number used twice", f"seq {seq}", " / ".join(records)[:600])
    dropped = {seq for first, last in log.gaps for seq in range(first, last + 1)}
    last = max([ledger.last_seq, *log.records])
    for seq in range(1, last + 1):
        if seq not in log.records and seq not in dropped:
            yield Finding(LOST, "number never arrived", f"seq {seq}", f"of {last}")


RULES: tuple[Callable[[Log, Ledger], Findings], ...] = (
    check_acceptance,
    check_origin,
    check_ends,
    check_order,
    check_states_told,
    check_ends_told,
    check_results,
    check_result_attempts,
    check_outputs,
    check_cancel_first,
    check_conflicts,
    check_expired,
    check_numbers,
)
UNDELIVERED = {"no result told", "number never arrived"}
"""What a device may lose that takes the broker's word for a delivery."""


def check(journal: Path, ledger: Path, *, is_acked: bool = True) -> Report:
    """Check a run.

    Args:
        journal: the console's log.
        ledger: the device's SQLite file; nobody writes it any more.
        is_acked: whether the device keeps its records until the console acknowledges them. One
            that does not may lose what the broker lost: those findings become notes.
    """
    log, kept = read_log(journal), read_ledger(ledger)
    findings = [finding for rule in RULES for finding in rule(log, kept)]
    notes: list[str] = []
    if not is_acked:
        undelivered = [finding for finding in findings if finding.rule in UNDELIVERED]
        findings = [finding for finding in findings if finding.rule not in UNDELIVERED]
        if undelivered:
            notes.append(f"{len(undelivered)} records did not arrive (the broker's word counted)")
    if kept.unsent:
        notes.append(f"{kept.unsent} records were still in the outbox")
    ends: dict[str, int] = defaultdict(int)
    for row in kept.jobs.values():
        ends[row.state] += 1
    return Report(findings, dict(sorted(ends.items())), len(kept.jobs), notes)


def describe_job(journal: Path, ledger: Path, job: str) -> str:
    """Return everything that journal and ledger know of a job, for a person."""
    kept = read_ledger(ledger)
    lines = [f"ledger: {kept.jobs.get(job)}", f"steps: {_show(kept.steps.get(job, []))}"]
    with journal.open(encoding="utf-8") as file:
        lines += [text.rstrip()[:400] for text in file if job in text][:_SHOWN_LINES]
    return "\n".join(lines)


def _show(steps: list[Step]) -> str:
    return " → ".join(
        f"{step.rev}:{step.state}[{step.attempt}]({step.reason or ''})" for step in steps
    )
