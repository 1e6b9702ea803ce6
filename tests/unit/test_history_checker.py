"""Every rule of the history checker, broken once by hand.

The healthy history below holds one job of each sort and has no finding; each case changes one
thing in it and names the rule that must notice.
"""

import ast
import hashlib
import json
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.fault.chaos import checker
from tests.fault.chaos.checker import DOUBLE, ILLEGAL, LOST, check

PREFIX = "edgeward/v1/box/"
ECHO_BODY = {
    "handler": "infer",
    "model": "echo",
    "input": {"tensors": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]},
}
SLOW_BODY = {
    "handler": "infer",
    "model": "slow",
    "input": {"tensors": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [9]}]},
}
OTHER_BODY = {**ECHO_BODY, "priority": 1}
LONG_OUTPUT = json.dumps([[9, 9, 9]]).encode()
Steps = list[tuple[int, str, int, str | None]]
RAN: Steps = [(1, "queued", 0, None), (2, "running", 1, None), (3, "succeeded", 1, "ok")]


@dataclass
class History:
    """A journal and a ledger, written by hand."""

    folder: Path
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, Steps] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    last_seq: int = 0

    def add_job(self, job: str, steps: Steps, body: Any, output: Any = None) -> None:
        """Put a job into the ledger."""
        _, state, attempt, reason = steps[-1]
        result = None
        if output is not None:
            result = {"job_id": job, "attempt": attempt, "output": output}
        self.jobs[job] = {
            "state": state,
            "rev": len(steps),
            "attempt": attempt,
            "ended_ms": 1 if state not in ("queued", "running") else None,
            "source": "mqtt",
            "reason_code": reason,
            "body": body,
            "result": result,
        }
        self.steps[job] = list(steps)

    def send(self, job: str, body: Any, *, cancel: bool = False, **changes: Any) -> None:
        """Write that the console sent a submit or a cancel, and that the broker took it."""
        topic = f"{PREFIX}c2d/job/{job}" + ("/cancel" if cancel else "")
        envelope = {"ts": "2026-11-22T10:00:00Z", "not_after": changes.pop("not_after", None)}
        line = {"do": "send", "topic": topic, "expiry": None, "tag": len(self.lines), **changes}
        self.lines.append({**line, "text": json.dumps({**envelope, "body": body})})
        self.lines.append({"do": "puback", "tag": line["tag"]})

    def hear(self, rest: str, kind: str, body: Any, seq: int | None = None) -> None:
        """Write that the console received a record, numbered by default."""
        if seq is None:
            self.last_seq += 1
            seq = self.last_seq
        text = json.dumps({"type": kind, "seq": seq, "body": body})
        self.lines.append({"do": "heard", "topic": f"{PREFIX}d2c/{rest}", "text": text})

    def hear_state(self, job: str, step: int, **changes: Any) -> None:
        """Write that the console was told a state as the ledger's history has it."""
        rev, state, attempt, code = self.steps[job][step - 1]
        reason = code and {"code": code, "message": ""}
        body = {"job_id": job, "state": state, "rev": rev, "attempt": attempt, "reason": reason}
        self.hear(f"job/{job}", "job.state", {**body, **changes})

    def hear_result(self, job: str, seq: int | None = None, **changes: Any) -> None:
        """Write that the console received the ledger's result of a job."""
        self.hear(f"result/{job}", "job.result", {**self.jobs[job]["result"], **changes}, seq)

    def find_line(self, topic: str) -> dict[str, Any]:
        """Return the last message heard on a topic."""
        return next(
            line for line in reversed(self.lines) if line.get("topic") == f"{PREFIX}d2c/{topic}"
        )

    def forget(self, topic: str) -> None:
        """Take the last message heard on a topic away."""
        self.lines.remove(self.find_line(topic))

    def write(self) -> tuple[Path, Path]:
        """Write both files."""
        journal, ledger = self.folder / "journal.jsonl", self.folder / "ledger.db"
        timed = [{"t": float(index), **line} for index, line in enumerate(self.lines)]
        journal.write_text("".join(json.dumps(line) + "\n" for line in timed))
        with sqlite3.connect(ledger) as connection:
            connection.execute(
                "CREATE TABLE jobs (job_id, state, rev, attempt, ended_ms, source, reason_code,"
                " body, result)"
            )
            connection.execute(
                "CREATE TABLE transitions (job_id, rev, state, attempt, reason_code)"
            )
            connection.execute("CREATE TABLE counters (name, value)")
            connection.execute("CREATE TABLE outbox (id)")
            for job, row in self.jobs.items():
                values = {**row, "body": _encode(row["body"]), "result": _encode(row["result"])}
                connection.execute(
                    "INSERT INTO jobs VALUES (:job_id, :state, :rev, :attempt, :ended_ms,"
                    " :source, :reason_code, :body, :result)",
                    {"job_id": job, **values},
                )
            for job, steps in self.steps.items():
                rows = [(job, *step) for step in steps]
                connection.executemany("INSERT INTO transitions VALUES (?, ?, ?, ?, ?)", rows)
            connection.execute("INSERT INTO counters VALUES ('seq', ?)", (self.last_seq,))
        connection.close()
        return journal, ledger


def _encode(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


@pytest.fixture
def history(tmp_path: Path) -> History:
    """A run in which everything went as it should."""
    history = History(tmp_path)
    file = tmp_path / "results" / "SLOW.2.json"
    file.parent.mkdir()
    file.write_bytes(LONG_OUTPUT)
    digest = hashlib.sha256(LONG_OUTPUT).hexdigest()

    history.send("GOOD", ECHO_BODY)
    history.add_job("GOOD", RAN, ECHO_BODY, [{"name": "y", "shape": [1, 2], "data": [1.0, 2.0]}])
    history.hear_state("GOOD", 1)
    history.hear_state("GOOD", 3)
    history.hear_result("GOOD")

    again: Steps = [(3, "queued", 1, "worker_lost"), (4, "running", 2, None)]
    again.append((5, "succeeded", 2, "ok"))
    history.send("SLOW", SLOW_BODY)
    output = {"file": "results/SLOW.2.json", "sha256": digest, "size_bytes": len(LONG_OUTPUT)}
    history.add_job("SLOW", RAN[:2] + again, SLOW_BODY, output)
    history.hear_state("SLOW", 5)
    history.hear_result("SLOW")

    history.send("CANCELED", {}, cancel=True)
    history.add_job("CANCELED", [(1, "canceled", 0, "canceled")], None)
    history.hear_state("CANCELED", 1)
    history.send("CANCELED", ECHO_BODY)

    history.send("CONFLICT", ECHO_BODY)
    history.add_job("CONFLICT", RAN, ECHO_BODY, [1, 2])
    history.hear_state("CONFLICT", 3)
    history.hear_result("CONFLICT")
    history.send("CONFLICT", OTHER_BODY)

    history.send("EXPIRED", ECHO_BODY, not_after="2026-11-22T09:00:00Z")
    history.add_job("EXPIRED", [(1, "expired", 0, "deadline_passed")], ECHO_BODY)
    history.hear_state("EXPIRED", 1)

    history.last_seq += 2
    gap = {"class": "P2", "from_seq": history.last_seq - 1, "to_seq": history.last_seq, "count": 2}
    history.hear("event/gap", "event.gap", gap)
    return history


def find(history: History) -> set[tuple[str, str]]:
    """Return class and rule of what the checker finds."""
    return {(item.kind, item.rule) for item in check(*history.write()).findings}


def test_a_healthy_history_has_no_finding(history: History) -> None:
    report = check(*history.write())

    assert report.findings == []
    assert report.ends == {"canceled": 1, "expired": 1, "succeeded": 3}


def test_a_record_that_came_twice_is_no_finding(history: History) -> None:
    history.lines += [history.find_line("result/GOOD"), history.find_line("job/GOOD")]

    assert find(history) == set()


def _lose_submit(history: History) -> None:
    history.send("GONE", ECHO_BODY)


def _lose_job(history: History) -> None:
    del history.jobs["EXPIRED"], history.steps["EXPIRED"]


def _invent_job(history: History) -> None:
    history.add_job("NEW", [(1, "expired", 0, "too_old")], ECHO_BODY)
    history.hear_state("NEW", 1)


def _swap_body(history: History) -> None:
    history.jobs["EXPIRED"]["body"] = SLOW_BODY


def _never_end(history: History) -> None:
    history.send("OPEN", ECHO_BODY)
    history.add_job("OPEN", RAN[:2], ECHO_BODY)
    history.hear_state("OPEN", 2)


def _end_twice(history: History) -> None:
    history.steps["EXPIRED"].append((2, "canceled", 0, "canceled"))
    history.jobs["EXPIRED"] |= {"state": "canceled", "rev": 2}
    history.hear_state("EXPIRED", 2)


def _end_without_reason(history: History) -> None:
    history.steps["GOOD"][2] = (3, "succeeded", 1, None)


def _end_in_one_table(history: History) -> None:
    history.jobs["GOOD"]["ended_ms"] = None


def _skip_running(history: History) -> None:
    history.steps["CONFLICT"] = [RAN[0], (2, "succeeded", 1, "ok")]
    history.jobs["CONFLICT"]["rev"] = 2


def _skip_rev(history: History) -> None:
    history.steps["GOOD"][1] = (7, "running", 1, None)


def _go_back_an_attempt(history: History) -> None:
    history.steps["GOOD"][1] = (2, "running", 5, None)


def _differ_from_row(history: History) -> None:
    history.jobs["GOOD"]["rev"] = 4


def _tell_unknown_rev(history: History) -> None:
    history.hear_state("EXPIRED", 1, rev=9)


def _tell_another_state(history: History) -> None:
    history.hear_state("GOOD", 3, state="failed")


def _tell_no_end(history: History) -> None:
    history.forget("job/SLOW")
    history.hear_state("SLOW", 4)


def _tell_nothing(history: History) -> None:
    history.forget("job/EXPIRED")


def _tell_another_end(history: History) -> None:
    history.hear_state("GOOD", 3, state="failed", rev=4)


def _fail_with_result(history: History) -> None:
    history.steps["GOOD"][2] = (3, "failed", 1, "bad_input")
    history.jobs["GOOD"]["state"] = "failed"


def _keep_no_result(history: History) -> None:
    history.jobs["GOOD"]["result"] = None


def _tell_no_result(history: History) -> None:
    history.forget("result/GOOD")


def _tell_two_results(history: History) -> None:
    history.hear_result("GOOD", output=[3, 4])


def _tell_another_result(history: History) -> None:
    history.forget("result/GOOD")
    history.hear_result("GOOD", output=[3, 4])


def _tell_stray_result(history: History) -> None:
    history.hear("result/STRAY", "job.result", {"job_id": "STRAY", "attempt": 1})


def _take_another_attempt(history: History) -> None:
    history.jobs["SLOW"]["result"]["attempt"] = 1


def _name_old_attempt(history: History) -> None:
    history.jobs["SLOW"]["result"]["output"]["file"] = "results/SLOW.1.json"


def _name_other_job(history: History) -> None:
    history.jobs["SLOW"]["result"]["output"]["file"] = "results/GOOD.2.json"


def _answer_other_job(history: History) -> None:
    history.jobs["GOOD"]["result"]["output"] = [2, 1]


def _damage_file(history: History) -> None:
    (history.folder / "results" / "SLOW.2.json").write_bytes(b"[]")


def _run_canceled(history: History) -> None:
    history.steps["CANCELED"] += [(2, "queued", 0, None)]


def _replace_original(history: History) -> None:
    history.jobs["CONFLICT"]["body"] = OTHER_BODY


def _run_expired(history: History) -> None:
    history.steps["EXPIRED"] = [RAN[0], (2, "running", 1, None), (3, "canceled", 1, "canceled")]
    history.jobs["EXPIRED"] |= {"state": "canceled", "rev": 3, "attempt": 1}


def _dispatch_expired(history: History) -> None:
    history.jobs["EXPIRED"]["attempt"] = 1


def _expire_fresh(history: History) -> None:
    history.send("FRESH", ECHO_BODY)
    history.add_job("FRESH", [RAN[0], (2, "expired", 0, "deadline_passed")], ECHO_BODY)
    history.hear_state("FRESH", 2)


def _expire_early(history: History) -> None:
    body = {**ECHO_BODY, "queue_ttl_s": 60}
    history.send("EARLY", body)
    history.add_job("EARLY", [RAN[0], (2, "expired", 0, "ttl_passed")], body)
    history.hear_state("EARLY", 2)


def _skip_number(history: History) -> None:
    history.last_seq += 1


def _reuse_number(history: History) -> None:
    history.hear("event/alarm", "event.alarm", {"code": "hot"}, seq=1)


@pytest.mark.parametrize(
    ("damage", "kind", "rule"),
    [
        (_lose_submit, LOST, "accepted and unknown"),
        (_lose_job, LOST, "reported and unknown"),
        (_invent_job, ILLEGAL, "job from nowhere"),
        (_swap_body, ILLEGAL, "body from nowhere"),
        (_never_end, LOST, "no end"),
        (_end_twice, DOUBLE, "two ends"),
        (_end_without_reason, ILLEGAL, "end without a reason"),
        (_end_in_one_table, ILLEGAL, "end in one table only"),
        (_skip_running, ILLEGAL, "transition queued → succeeded"),
        (_skip_rev, ILLEGAL, "rev with a gap"),
        (_go_back_an_attempt, ILLEGAL, "attempt went back"),
        (_differ_from_row, ILLEGAL, "row and history differ"),
        (_tell_unknown_rev, ILLEGAL, "rev from nowhere"),
        (_tell_another_state, ILLEGAL, "rev means two things"),
        (_tell_no_end, LOST, "end not told"),
        (_tell_nothing, LOST, "end not told"),
        (_tell_another_end, DOUBLE, "two ends told"),
        (_fail_with_result, ILLEGAL, "result without a success"),
        (_keep_no_result, LOST, "no result kept"),
        (_tell_no_result, LOST, "no result told"),
        (_tell_two_results, DOUBLE, "two results"),
        (_tell_another_result, DOUBLE, "two results"),
        (_tell_stray_result, ILLEGAL, "result without a job"),
        (_take_another_attempt, DOUBLE, "result of another attempt"),
        (_name_old_attempt, DOUBLE, "outcome of an old attempt"),
        (_name_other_job, ILLEGAL, "result file of another job"),
        (_answer_other_job, DOUBLE, "output of another job"),
        (_damage_file, LOST, "result file damaged"),
        (_run_canceled, DOUBLE, "ran after its cancel"),
        (_replace_original, DOUBLE, "conflict replaced the original"),
        (_run_expired, DOUBLE, "ran after its time"),
        (_dispatch_expired, DOUBLE, "ran after its time"),
        (_expire_fresh, LOST, "expired without a time limit"),
        (_expire_early, LOST, "expired before its time"),
        (_skip_number, LOST, "number never arrived"),
        (_reuse_number, DOUBLE, "number used twice"),
    ],
)
def test_a_broken_rule_is_found(
    history: History, damage: Callable[[History], None], kind: str, rule: str
) -> None:
    damage(history)

    assert (kind, rule) in find(history)


@pytest.mark.parametrize(("begins", "ends"), [(True, True), (True, False), (False, False)])
def test_late_job_may_run_only_where_the_clock_of_the_device_was_wrong(
    history: History, begins: bool, ends: bool
) -> None:
    broken = {"do": "note", "what": "broken", "fault": "clock", "target": "-3600"}
    history.lines += [broken] if begins else []
    history.send("LATE", ECHO_BODY, not_after="2026-11-22T09:00:00Z")
    history.add_job("LATE", RAN, ECHO_BODY, [1, 2])
    history.hear_state("LATE", 3)
    history.hear_result("LATE")
    history.lines += [{**broken, "what": "healed"}] if ends else []

    assert find(history) == (set() if begins else {(DOUBLE, "ran after its time")})


@pytest.mark.parametrize("before", [None, *sorted(checker.ENDS), "queued", "running"])
@pytest.mark.parametrize("after", [*sorted(checker.ENDS), "queued", "running"])
def test_only_the_transitions_of_the_protocol_are_legal(
    history: History, before: str | None, after: str
) -> None:
    steps: Steps = [(1, after, 0, "x")] if before is None else [(1, before, 0, "x")]
    if before is not None:
        steps.append((2, after, 0, "x"))
    history.send("ONE", ECHO_BODY)
    history.add_job("ONE", steps, ECHO_BODY)
    history.hear_state("ONE", len(steps))
    # docs/protocol.md, "Jobs", rule 5, row by row.
    table = {
        None: "queued canceled expired rejected",
        "queued": "running failed timed_out canceled expired",
        "running": "queued succeeded failed timed_out canceled",
    }
    is_legal = after in table.get(before, "").split()

    assert ((ILLEGAL, f"transition {before} → {after}") in find(history)) is not is_legal


def test_what_the_broker_lost_is_a_note_where_its_word_counted(history: History) -> None:
    history.forget("result/GOOD")
    report = check(*history.write(), is_acked=False)

    assert report.findings == []
    assert "did not arrive" in report.notes[0]


def test_the_checker_shares_no_code_with_the_product() -> None:
    tree = ast.parse(Path(checker.__file__).read_text(encoding="utf-8"))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }

    assert imported <= set(sys.stdlib_module_names)
