"""Submits, duplicates, cancels and their orders, typed out from docs/protocol.md, "Rules".

A case is a list of steps and what the device says after each. A step is a message or something
that happens on the box; what it says is written as `state rev`, `conflict state rev`,
`result`, `bad code` or nothing. Each case runs twice: every message in a turn of its own, and
all messages between two happenings in one turn, which must lead to the same history.
"""

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from ulid import ULID

from agent.daemon.messages import Received
from agent.jobs import JobState
from tests.harness.desk import IDENTITY, MODEL, Desk

DAY_MS = 86_400_000
PAST, FUTURE = "2020-01-01T00:00:00Z", "2099-01-01T00:00:00Z"
BODY = {"handler": "infer", "model": MODEL, "input": {"data_b64": ""}}
OTHER = {**BODY, "params": {"top_k": 2}}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.close()


def make_id(desk: Desk, age_ms: int = 0) -> str:
    return str(ULID.from_timestamp((desk.clock.wall - age_ms) / 1000))


class Script:
    """Plays steps about one job."""

    def __init__(self, desk: Desk, job_id: str) -> None:
        self.desk = desk
        self.job_id = job_id
        self.tasks = 0

    def submit(self, body: Any = None, expiry_s: int | None = None, **envelope: Any) -> Received:
        document = {"v": 1, "id": "m", "type": "job.submit", "body": body or BODY, **envelope}
        return self.raw(json.dumps(document).encode(), expiry_s)

    def raw(self, payload: bytes, expiry_s: int | None = None) -> Received:
        return self.desk.message(self.desk.topics.submit(self.job_id), payload, expiry_s)

    def sync(self, **body: Any) -> Received:
        document = {"v": 1, "id": "m", "type": "sync", "body": {"ledger": IDENTITY, **body}}
        return self.desk.message("edgeward/v1/dev/c2d/sync", json.dumps(document).encode())

    def missing(self, body: Any) -> Received:
        document = {"v": 1, "id": "m", "type": "job.submit", "body": body}
        document["body"] = {**body, "job_id": self.job_id}
        return self.sync(missing=[document])

    def cancel(self, payload: bytes = b'{"v":1,"id":"c","type":"job.cancel"}') -> Received:
        return self.desk.message(self.desk.topics.cancel(self.job_id), payload)

    def message(self, step: str) -> Received | None:
        """Return the message of a step, None where the step is no message."""
        spelt = json.dumps(dict(reversed(BODY.items())), indent=1)
        makers: dict[str, Callable[[], Received]] = {
            "submit": self.submit,
            "spelt otherwise": lambda: self.raw(
                f'{{"type":"job.submit","id":"n","v":1,"body":{spelt}}}'.encode()
            ),
            "other body": lambda: self.submit(OTHER),
            "named in body": lambda: self.submit({**BODY, "job_id": self.job_id}),
            "another's id in body": lambda: self.submit({**BODY, "job_id": "0" * 26}),
            "late": lambda: self.submit(not_after=PAST),
            "in time": lambda: self.submit(not_after=FUTURE),
            "late but alive at the broker": lambda: self.submit(expiry_s=60, not_after=PAST),
            "dead at the broker": lambda: self.submit(expiry_s=0, not_after=FUTURE),
            "alive at the broker": lambda: self.submit(expiry_s=60),
            "to start within 10 s": lambda: self.submit({**BODY, "queue_ttl_s": 10}),
            "garbage": lambda: self.raw(b"\xff\x00"),
            "garbage of another kind": lambda: self.raw(b"[1"),
            "of version 2": lambda: self.submit(v=2),
            "of type shell": lambda: self.submit(type="shell"),
            "shell handler": lambda: self.submit({**BODY, "handler": "shell"}),
            "unknown model": lambda: self.submit({**BODY, "model": "nope"}),
            "cancel": self.cancel,
            "unreadable cancel": lambda: self.cancel(b"stop!"),
            "sync: missing": lambda: self.missing(BODY),
            "sync: missing, other body": lambda: self.missing(OTHER),
            "sync: unknown": lambda: self.sync(unknown=[self.job_id]),
            "sync: cancel": lambda: self.sync(cancel=[self.job_id]),
        }
        maker = makers.get(step)
        return maker() if maker else None

    def happen(self, step: str) -> None:
        """Let something happen on the box."""
        store = self.desk.store
        match step:
            case "dispatched":
                self.tasks += 1
                assert store.dispatch(f"task-{self.tasks}") == [self.job_id]
            case "started":
                store.run(lambda tx: store.ledger.record_started(tx, [f"task-{self.tasks}"]))
            case "succeeded":
                store.finish(self.job_id, self.tasks)
            case "failed":
                store.finish(self.job_id, self.tasks, JobState.FAILED)
            case "worker lost":
                store.requeue(f"task-{self.tasks}")
            case "11 s":
                self.desk.clock.advance(11_000)
                store.run(store.ledger.schedule.expire)
            case _:
                raise ValueError(step)

    def heard(self) -> list[str]:
        return [self._describe(kind, body) for kind, body in self.desk.publish_all()]

    def _describe(self, kind: str, body: dict[str, Any]) -> str:
        if kind == "job.state":
            assert body["job_id"] == self.job_id
            return f"{body['state']} {body['rev']}"
        if kind == "event.id_conflict":
            return f"conflict {body['state']} {body['rev']}"
        if kind == "event.bad_command":
            return f"bad {body['code']}"
        assert kind == "job.result", kind
        return "result"


Q, R, OK = ("queued", None), ("running", None), ("succeeded", "ok")
CANCELED = ("canceled", "canceled")
LATE, TOO_OLD = ("expired", "deadline_passed"), ("expired", "too_old")
Case = tuple[list[tuple[str, str]], list[tuple[str, str | None]]]
RAN = [("submit", "queued 1"), ("dispatched", ""), ("started", "running 2")]
DONE = [*RAN, ("succeeded", "succeeded 3, result")]

CASES: dict[str, Case] = {
    # Rule 2: same id, same body.
    "submit": ([("submit", "queued 1")], [Q]),
    "duplicate": ([("submit", "queued 1"), ("submit", "queued 1")], [Q]),
    "three": ([("submit", "queued 1"), ("submit", "queued 1"), ("submit", "queued 1")], [Q]),
    "spelling": ([("submit", "queued 1"), ("spelt otherwise", "queued 1")], [Q]),
    "envelope does not count": ([("submit", "queued 1"), ("in time", "queued 1")], [Q]),
    "late duplicate of a waiting job": ([("submit", "queued 1"), ("late", "queued 1")], [Q]),
    "duplicate while dispatched": (
        [("submit", "queued 1"), ("dispatched", ""), ("submit", "queued 1")],
        [Q],
    ),
    "duplicate while running": ([*RAN, ("submit", "running 2")], [Q, R]),
    "duplicate after the end": ([*DONE, ("submit", "succeeded 3")], [Q, R, OK]),
    "late duplicate after the end": ([*DONE, ("late", "succeeded 3")], [Q, R, OK]),
    "dead duplicate after the end": ([*DONE, ("dead at the broker", "succeeded 3")], [Q, R, OK]),
    "two duplicates after the end": (
        [*DONE, ("submit", "succeeded 3"), ("submit", "succeeded 3")],
        [Q, R, OK],
    ),
    "duplicate after a lost attempt": (
        [*RAN, ("worker lost", "queued 3"), ("submit", "queued 3")],
        [Q, R, ("queued", "worker_lost")],
    ),
    # Rule 2: same id, another body.
    "conflict": ([("submit", "queued 1"), ("other body", "conflict queued 1")], [Q]),
    "named in its body is the same body": (
        [("submit", "queued 1"), ("named in body", "queued 1")],
        [Q],
    ),
    "conflict then duplicate": (
        [("submit", "queued 1"), ("other body", "conflict queued 1"), ("submit", "queued 1")],
        [Q],
    ),
    "other first": ([("other body", "queued 1"), ("submit", "conflict queued 1")], [Q]),
    "conflict while running": ([*RAN, ("other body", "conflict running 2")], [Q, R]),
    "conflict after the end": ([*DONE, ("other body", "conflict succeeded 3")], [Q, R, OK]),
    # Rule 7: cancel.
    "cancel": ([("submit", "queued 1"), ("cancel", "canceled 2")], [Q, CANCELED]),
    "cancel twice": (
        [("submit", "queued 1"), ("cancel", "canceled 2"), ("cancel", "canceled 2")],
        [Q, CANCELED],
    ),
    "cancel and duplicate": (
        [("submit", "queued 1"), ("cancel", "canceled 2"), ("submit", "canceled 2")],
        [Q, CANCELED],
    ),
    "cancel and conflict": (
        [("submit", "queued 1"), ("cancel", "canceled 2"), ("other body", "conflict canceled 2")],
        [Q, CANCELED],
    ),
    "cancel first": ([("cancel", "canceled 1")], [CANCELED]),
    "cancel first, twice": ([("cancel", "canceled 1"), ("cancel", "canceled 1")], [CANCELED]),
    "cancel overtakes": ([("cancel", "canceled 1"), ("submit", "canceled 1")], [CANCELED]),
    "cancel overtakes two": (
        [("cancel", "canceled 1"), ("submit", "canceled 1"), ("submit", "canceled 1")],
        [CANCELED],
    ),
    "tombstone meets any body": (
        [("cancel", "canceled 1"), ("submit", "canceled 1"), ("other body", "canceled 1")],
        [CANCELED],
    ),
    "cancel overtakes a late submit": (
        [("cancel", "canceled 1"), ("late", "canceled 1")],
        [CANCELED],
    ),
    "cancel overtakes garbage": (
        [("cancel", "canceled 1"), ("garbage", "canceled 1")],
        [CANCELED],
    ),
    "cancel while dispatched": (
        [("submit", "queued 1"), ("dispatched", ""), ("cancel", "canceled 2"), ("succeeded", "")],
        [Q, CANCELED],
    ),
    "cancel while running": (
        [*RAN, ("cancel", "canceled 3"), ("succeeded", ""), ("submit", "canceled 3")],
        [Q, R, CANCELED],
    ),
    "cancel while running, then its worker is lost": (
        [*RAN, ("cancel", "canceled 3"), ("worker lost", ""), ("cancel", "canceled 3")],
        [Q, R, CANCELED],
    ),
    "cancel after the end": ([*DONE, ("cancel", "succeeded 3")], [Q, R, OK]),
    "cancel after a failure": (
        [*RAN, ("failed", "failed 3"), ("cancel", "failed 3"), ("submit", "failed 3")],
        [Q, R, ("failed", "ok")],
    ),
    "unreadable cancel": (
        [("submit", "queued 1"), ("unreadable cancel", "bad malformed")],
        [Q],
    ),
    # Rules 4 and 8: late.
    "late": ([("late", "expired 1")], [LATE]),
    "late, then in time": ([("late", "expired 1"), ("in time", "expired 1")], [LATE]),
    "late, then cancel": ([("late", "expired 1"), ("cancel", "expired 1")], [LATE]),
    "late, then another body": (
        [("late", "expired 1"), ("other body", "conflict expired 1")],
        [LATE],
    ),
    "broker's time beats not_after": ([("late but alive at the broker", "queued 1")], [Q]),
    "dead at the broker": ([("dead at the broker", "expired 1")], [LATE]),
    "not started in time": (
        [("to start within 10 s", "queued 1"), ("11 s", "expired 2")],
        [Q, LATE],
    ),
    "not started in time, then again": (
        [
            ("to start within 10 s", "queued 1"),
            ("11 s", "expired 2"),
            ("to start within 10 s", "expired 2"),
        ],
        [Q, LATE],
    ),
    "dispatched and not started in time": (
        [
            ("to start within 10 s", "queued 1"),
            ("dispatched", ""),
            ("11 s", "expired 2"),
            ("succeeded", ""),
        ],
        [Q, LATE],
    ),
    "started in time": (
        [
            ("to start within 10 s", "queued 1"),
            ("dispatched", ""),
            ("started", "running 2"),
            ("11 s", ""),
            ("succeeded", "succeeded 3, result"),
        ],
        [Q, R, OK],
    ),
    # Rule 3: refused.
    "garbage": ([("garbage", "rejected 1")], [("rejected", "malformed")]),
    "garbage twice": (
        [("garbage", "rejected 1"), ("garbage", "rejected 1")],
        [("rejected", "malformed")],
    ),
    "garbage of two kinds": (
        [("garbage", "rejected 1"), ("garbage of another kind", "conflict rejected 1")],
        [("rejected", "malformed")],
    ),
    "garbage, then good": (
        [("garbage", "rejected 1"), ("submit", "conflict rejected 1")],
        [("rejected", "malformed")],
    ),
    "good, then garbage": ([("submit", "queued 1"), ("garbage", "conflict queued 1")], [Q]),
    "good, then of another version": (
        [("submit", "queued 1"), ("of version 2", "conflict queued 1")],
        [Q],
    ),
    "good, then of another type": ([("submit", "queued 1"), ("of type shell", "queued 1")], [Q]),
    "version 2": ([("of version 2", "rejected 1")], [("rejected", "unsupported_version")]),
    "type": ([("of type shell", "rejected 1")], [("rejected", "unsupported_type")]),
    "handler": ([("shell handler", "rejected 1")], [("rejected", "unknown_handler")]),
    "model": (
        [("unknown model", "rejected 1"), ("unknown model", "rejected 1")],
        [("rejected", "unknown_model")],
    ),
    "id in the body": ([("named in body", "queued 1")], [Q]),
    "another's id in the body": (
        [("another's id in body", "rejected 1")],
        [("rejected", "invalid_body")],
    ),
    "rejected, then cancel": (
        [("unknown model", "rejected 1"), ("cancel", "rejected 1")],
        [("rejected", "unknown_model")],
    ),
    # Reconcile.
    "missing": ([("sync: missing", "queued 1")], [Q]),
    "missing twice": ([("sync: missing", "queued 1"), ("sync: missing", "queued 1")], [Q]),
    "missing is a submit with its id in the body": (
        [("sync: missing", "queued 1"), ("named in body", "queued 1")],
        [Q],
    ),
    "missing and cancelled": (
        [("sync: missing", "queued 1"), ("sync: cancel", "canceled 2")],
        [Q, CANCELED],
    ),
    "cancelled, then missing": (
        [("sync: cancel", "canceled 1"), ("sync: missing", "canceled 1")],
        [CANCELED],
    ),
    "missing with another body": (
        [("sync: missing", "queued 1"), ("sync: missing, other body", "conflict queued 1")],
        [Q],
    ),
    "missing its result": (
        [
            ("named in body", "queued 1"),
            ("dispatched", ""),
            ("succeeded", "succeeded 3, result"),
            ("sync: missing", "succeeded 3, result"),
        ],
        [Q, R, OK],
    ),
    "duplicate does not bring the result again": ([*DONE, ("submit", "succeeded 3")], [Q, R, OK]),
    "unknown to the console": ([("submit", "queued 1"), ("sync: unknown", "queued 1")], [Q]),
    "running and unknown to the console": ([*RAN, ("sync: unknown", "running 2")], [Q, R]),
    "unknown to both": ([("sync: unknown", "")], []),
}


def play(script: Script, case: Case) -> None:
    """Play a case with a turn for every message."""
    for number, (step, expected) in enumerate(case[0]):
        message = script.message(step)
        if message is None:
            script.happen(step)
        else:
            script.desk.hear(message)
        assert ", ".join(script.heard()) == expected, f"step {number}: {step}"


@pytest.mark.parametrize("name", CASES)
def test_messages_one_by_one(desk: Desk, name: str) -> None:
    script = Script(desk, make_id(desk))
    play(script, CASES[name])
    assert desk.history(script.job_id) == CASES[name][1]


@pytest.mark.parametrize("name", CASES)
def test_messages_in_one_turn_lead_to_the_same_history(desk: Desk, name: str) -> None:
    script = Script(desk, make_id(desk))
    steps, history = CASES[name]
    messages = [(script.message(step), step) for step, _ in steps]
    said: list[str] = []
    for is_message, run in groupby(messages, lambda item: item[0] is not None):
        if is_message:
            desk.hear(*[message for message, _ in run if message is not None])
        else:
            for _, step in run:
                script.happen(step)
        said += script.heard()
    assert desk.history(script.job_id) == history
    states = [text for text in said if text.split()[0] not in ("conflict", "bad", "result")]
    if history:
        assert states[-1] == f"{history[-1][0]} {len(history)}"
    events = [text for _, text in steps if text.startswith(("conflict", "bad"))]
    kinds = [text.split()[0] for text in said if text.startswith(("conflict", "bad"))]
    assert kinds == [text.split()[0] for text in events]


@pytest.mark.parametrize("step", ["submit", "alive at the broker", "sync: missing"])
def test_unknown_id_beyond_the_horizon_is_too_old(desk: Desk, step: str) -> None:
    desk.hear(Script(desk, make_id(desk)).submit())
    desk.store.run(desk.retention.advance)
    desk.publish_all()
    script = Script(desk, make_id(desk, age_ms=31 * DAY_MS))
    play(script, ([(step, "expired 1"), (step, "expired 1"), ("cancel", "expired 1")], []))
    assert desk.history(script.job_id) == [TOO_OLD]


def test_cancel_beyond_the_horizon_leaves_a_tombstone_too(desk: Desk) -> None:
    desk.hear(Script(desk, make_id(desk)).submit())
    desk.store.run(desk.retention.advance)
    desk.publish_all()
    script = Script(desk, make_id(desk, age_ms=31 * DAY_MS))
    play(script, ([("cancel", "canceled 1"), ("submit", "canceled 1")], []))


def test_forgotten_job_does_not_run_again_because_its_sender_gave_it_a_new_life(
    desk: Desk,
) -> None:
    script = Script(desk, make_id(desk))
    play(script, CASES["duplicate after the end"])
    desk.clock.advance(31 * DAY_MS)
    desk.hear(Script(desk, make_id(desk)).submit())
    desk.store.run(desk.retention.advance)
    assert desk.store.run(lambda tx: desk.retention.forget(tx, 100)) == 1
    desk.publish_all()
    play(script, ([("alive at the broker", "expired 1")], []))


def make_keyed(policy: str = "drop_new") -> dict[str, Any]:
    return {**BODY, "dedupe_key": "k", "dedupe": policy}


@pytest.mark.parametrize("in_one_turn", [True, False])
def test_job_after_the_cancel_of_its_predecessor_is_no_duplicate_work(
    desk: Desk, in_one_turn: bool
) -> None:
    old, new = Script(desk, make_id(desk)), Script(desk, make_id(desk))
    desk.hear(old.submit(make_keyed()))
    messages = [old.cancel(), new.submit(make_keyed())]
    for turn in [messages] if in_one_turn else [[message] for message in messages]:
        desk.hear(*turn)
    assert desk.history(old.job_id)[-1] == CANCELED
    assert desk.history(new.job_id) == [Q]


@pytest.mark.parametrize("in_one_turn", [True, False])
def test_job_before_the_cancel_of_its_predecessor_is_duplicate_work(
    desk: Desk, in_one_turn: bool
) -> None:
    old, new = Script(desk, make_id(desk)), Script(desk, make_id(desk))
    desk.hear(old.submit(make_keyed()))
    messages = [new.submit(make_keyed()), old.cancel()]
    for turn in [messages] if in_one_turn else [[message] for message in messages]:
        desk.hear(*turn)
    assert desk.history(new.job_id) == [("rejected", "dedupe_dropped")]


def test_open_jobs_are_counted_right_whatever_becomes_of_submits(desk: Desk) -> None:
    a, b, c, d = (Script(desk, make_id(desk)) for _ in range(4))
    desk.hear(
        a.submit(make_keyed("replace_queued")),
        a.submit(make_keyed("replace_queued")),
        b.submit(make_keyed("replace_queued")),
        c.submit(make_keyed()),
        d.cancel(),
        d.submit(),
        a.cancel(),
    )
    counted = desk.store.run(desk.store.ledger.count_open)
    assert sum(counted.values()) == desk.open_jobs == 1


def test_number_that_json_cannot_carry_inside_a_sync_is_refused(desk: Desk) -> None:
    script = Script(desk, make_id(desk))
    good = Script(desk, make_id(desk))
    payload = script.missing({**BODY, "params": {"x": 123}}).payload.replace(b"123", b"1e999")
    topic = "edgeward/v1/dev/c2d/sync"
    desk.hear(desk.message(topic, payload), good.submit())
    assert desk.history(good.job_id) == [Q]
    [code] = [body["code"] for kind, body in desk.publish_all() if kind == "event.bad_command"]
    assert code == "malformed"


def test_sender_s_words_are_not_sent_back_at_any_length(desk: Desk) -> None:
    script = Script(desk, make_id(desk))
    desk.hear(script.submit({**BODY, "handler": "x" * 200_000}))
    [(_, body)] = desk.publish_all()
    assert body["reason"]["code"] == "unknown_handler"
    assert len(body["reason"]["message"]) <= 512


@pytest.mark.parametrize("job_id", ["", "x", "8" * 26, "0" * 25, "0" * 27, "0" * 25 + "U"])
def test_what_is_no_ulid_is_no_job(desk: Desk, job_id: str) -> None:
    desk.hear(Script(desk, job_id).submit())
    [(kind, body)] = desk.publish_all()
    assert (kind, body["code"]) in {
        ("event.bad_command", "malformed"),
        ("event.bad_command", "unsupported_type"),
    }
    assert desk.store.run(desk.store.ledger.count_open) == {}
