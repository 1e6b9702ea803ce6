"""A console's view of one device, fed by hand. Every rule is one of docs/console.md's duties."""

import json
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from agent.jobs import JobState
from console.mirror import Change, DeviceMirror, Heard, Outgoing
from console.numbering import Numbering
from console.submission import Command, Wanted, build_cancel, build_submit

AT = "2026-11-22T10:00:00.000Z"
WALL_MS = 1_800_000_000_000
OLD, NEW = "01M828YRXD24KGBPQAVBA31E00", "01M828YRXD24KGBPQAVBA31E11"


class Told:
    """A mirror, a clock, and a device that says what a test wants."""

    def __init__(self, **options: Any) -> None:
        self.mirror = DeviceMirror("box", random=Random(1), **options)
        self.now_s = 1000.0

    def hear(self, kind: str, rest: str, document: dict[str, Any], **options: Any) -> list[Change]:
        return self.mirror.hear(Heard(kind, rest, document, **options), self.now_s, WALL_MS)

    def state(
        self, job_id: str, state: str, rev: int, seq: int | None = None, **head: Any
    ) -> list[Change]:
        body = {"job_id": job_id, "state": state, "rev": rev, "attempt": 1, "reason": None}
        return self.hear("job", job_id, {"ts": AT, "seq": seq, "body": body, **head})

    def event(self, seq: int, kind: str = "alarm", **body: Any) -> list[Change]:
        return self.hear("event", kind, {"ts": AT, "seq": seq, "body": body})

    def status(
        self, state: str, boot: int = 1, conn: int = 1, ledger: str | None = None
    ) -> list[Change]:
        more = {} if ledger is None else {"ledger": ledger}
        return self.hear("status", "", {"state": state, "boot": boot, "conn": conn, **more})

    def sync(self, listed: dict[str, int], **body: Any) -> list[Change]:
        whole = {"open": list(listed.items()), "open_count": len(listed), **body}
        return self.hear("sync", "", {"ts": AT, "body": whole})

    def sent(self, after_s: float = 0.0) -> list[Outgoing]:
        self.now_s += after_s
        return self.mirror.take_due(self.now_s)

    def topics(self, after_s: float = 0.0) -> list[str]:
        return [
            message.topic.removeprefix("edgeward/v1/box/c2d/") for message in self.sent(after_s)
        ]

    def answer(self, after_s: float = 0.0) -> dict[str, Any]:
        """Return the sync answer's bodies as one."""
        whole: dict[str, Any] = {}
        for message in self.sent(after_s):
            if message.topic.endswith("/c2d/sync"):
                for key, value in json.loads(message.payload)["body"].items():
                    whole[key] = whole[key] + value if key == "missing" and key in whole else value
        return whole


def build_job(size: int = 4) -> Command:
    return build_submit(Wanted("m"), {"data_b64": "A" * size})


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def durable() -> Told:
    told = Told(acknowledges=True, follows_all=True)
    told.mirror.connected(told.now_s)
    return told


# --- resend --------------------------------------------------------------------------------


def test_job_is_sent_again_with_growing_waits_until_a_state_is_seen(told: Told) -> None:
    job = build_job()
    told.mirror.submit(job, told.now_s)
    assert told.topics() == [f"job/{job.job_id}"]
    assert told.topics(2.0) == []
    times = []
    for _ in range(200):
        if told.topics(1.0):
            times.append(told.now_s)
    waits = [after - before for before, after in pairwise(times)]
    assert times[0] - 1000.0 <= 4.0
    assert all(later >= earlier * 0.7 for earlier, later in pairwise(waits))
    assert 45.0 <= max(waits) <= 61.0

    told.state(job.job_id, "queued", 1)
    assert told.topics(1000.0) == []


def test_only_a_window_of_jobs_is_under_way_and_each_answer_lets_one_follow() -> None:
    told = Told(window=3)
    jobs = [build_job() for _ in range(5)]
    for job in jobs:
        told.mirror.submit(job, told.now_s)
    assert told.topics() == [f"job/{job.job_id}" for job in jobs[:3]]
    assert len(told.topics(5.0)) == 3
    told.state(jobs[1].job_id, "queued", 1)
    assert told.topics() == [f"job/{jobs[3].job_id}"]


def test_device_that_is_away_gets_each_command_once(told: Told) -> None:
    told.status("offline")
    job = build_job()
    told.mirror.submit(job, told.now_s)
    assert told.topics() == [f"job/{job.job_id}"]
    assert [told.topics(30.0) for _ in range(10)] == [[]] * 10
    told.status("online", conn=2)
    assert told.topics() == [f"job/{job.job_id}"]


@pytest.mark.parametrize("news", ["connected", "online", "sync"])
def test_everything_unseen_is_sent_at_once_when_somebody_is_back(told: Told, news: str) -> None:
    job = build_job()
    told.mirror.submit(job, told.now_s)
    told.sent()
    told.now_s += 1.5
    if news == "connected":
        told.mirror.connected(told.now_s)
    elif news == "online":
        told.status("online")
    else:
        told.sync({})
    assert told.topics() == [f"job/{job.job_id}"]


def test_cancel_is_answered_by_an_end_only_and_takes_the_submits_place(told: Told) -> None:
    job = build_job()
    told.mirror.submit(job, told.now_s)
    told.mirror.cancel(build_cancel(job.job_id), told.now_s)
    assert told.topics() == [f"job/{job.job_id}/cancel"]
    told.state(job.job_id, "running", 2)
    assert told.topics(5.0) == [f"job/{job.job_id}/cancel"]
    told.state(job.job_id, "canceled", 3)
    assert told.topics(100.0) == []


# --- states --------------------------------------------------------------------------------


def test_state_counts_only_with_a_higher_rev_and_nothing_follows_an_end(told: Told) -> None:
    job = build_job()
    told.mirror.submit(job, told.now_s)
    view = told.mirror.jobs[job.job_id]
    said = [("running", 2), ("queued", 1), ("running", 2), ("failed", 3), ("queued", 9)]
    kinds = [[change.kind for change in told.state(job.job_id, *item)] for item in said]
    assert kinds == [["state"], [], [], ["state"], []]
    assert (view.state, view.rev) == (JobState.FAILED, 3)


def test_result_may_come_before_its_end_and_counts_once(told: Told) -> None:
    job = build_job()
    told.mirror.submit(job, told.now_s)
    document = {"ts": AT, "body": {"job_id": job.job_id, "output": [1]}}
    assert [change.kind for change in told.hear("result", job.job_id, document)] == ["result"]
    assert told.hear("result", job.job_id, document) == []
    assert not told.mirror.jobs[job.job_id].is_complete
    told.state(job.job_id, "succeeded", 3)
    assert told.mirror.jobs[job.job_id].is_complete


def test_progress_is_news_of_an_open_job_only(told: Told) -> None:
    job = build_job()
    told.mirror.submit(job, told.now_s)
    document = {"ts": AT, "body": {"job_id": job.job_id, "done": 3, "total": 7}}
    (change,) = told.hear("progress", job.job_id, document)
    assert change.job is not None
    assert change.job.progress == document["body"]
    told.state(job.job_id, "failed", 3)
    assert told.hear("progress", job.job_id, document) == []


def test_stale_is_a_mark_beside_the_state_and_any_news_clears_it() -> None:
    told = Told(stale_after_s=60.0)
    job = build_job()
    told.mirror.submit(job, told.now_s)
    told.state(job.job_id, "running", 2)
    told.sent()
    told.now_s += 61.0
    (change,) = told.mirror.watch(told.now_s)
    view = told.mirror.jobs[job.job_id]
    assert (change.kind, view.is_stale, view.state) == ("stale", True, JobState.RUNNING)
    assert told.mirror.watch(told.now_s) == []
    # A stale job is sent again: the device answers with its state.
    assert told.topics() == [f"job/{job.job_id}"]
    assert [change.kind for change in told.state(job.job_id, "running", 2)] == ["fresh"]
    assert not view.is_stale
    assert told.topics(1000.0) == []


def test_ended_job_never_gets_stale() -> None:
    told = Told(stale_after_s=60.0)
    job = build_job()
    told.mirror.submit(job, told.now_s)
    told.state(job.job_id, "failed", 3)
    assert told.mirror.watch(told.now_s + 1000.0) == []


# --- status and ledger ---------------------------------------------------------------------


def test_status_of_a_lower_boot_or_conn_is_ignored(told: Told) -> None:
    said = [("online", 2, 5), ("offline", 2, 4), ("offline", 1, 9), ("offline", 2, 5)]
    kinds = [len(told.status(*item)) for item in said]
    assert kinds == [1, 0, 0, 1]
    assert told.mirror.device.state == "offline"


def test_another_ledger_lets_open_jobs_start_anew_and_keeps_ends(told: Told) -> None:
    ended, open_job = build_job(), build_job()
    told.status("online", boot=7, conn=9, ledger=OLD)
    for job in (ended, open_job):
        told.mirror.submit(job, told.now_s)
    told.sent()
    told.state(ended.job_id, "succeeded", 3)
    told.state(open_job.job_id, "running", 8)

    kinds = [change.kind for change in told.status("online", boot=1, conn=1, ledger=NEW)]
    assert kinds == ["ledger", "status"]
    assert told.topics() == [f"job/{open_job.job_id}"]
    assert told.state(ended.job_id, "queued", 99) == []
    # A state of the old ledger that is late must not hide the new one's end.
    told.state(open_job.job_id, "running", 8)
    told.state(open_job.job_id, "succeeded", 3)
    assert told.mirror.jobs[open_job.job_id].state is JobState.SUCCEEDED


@pytest.mark.parametrize("late", [{"boot": 57}, {"is_retained": True}], ids=["boot", "retained"])
def test_late_state_of_a_lost_ledger_does_not_hide_the_end_of_the_present_one(
    durable: Told, late: dict[str, Any]
) -> None:
    durable.status("online", boot=1, ledger=NEW)
    is_retained = late.pop("is_retained", False)
    body = {"state": "running", "rev": 8}
    durable.hear("job", "J", {"ts": AT, "body": body, **late}, is_retained=is_retained)
    durable.state("J", "succeeded", 3, boot=1)
    assert durable.mirror.jobs["J"].state is JobState.SUCCEEDED


def test_first_word_of_a_ledger_changes_nothing(durable: Told) -> None:
    durable.event(1)
    assert [change.kind for change in durable.status("online", ledger=OLD)] == ["status"]
    assert durable.mirror.numbering.cumulative == 1


@pytest.mark.parametrize("kind", ["info", "sync"])
def test_ledger_is_heard_of_in_info_and_sync_too(durable: Told, kind: str) -> None:
    durable.status("online", ledger=OLD)
    if kind == "info":
        changes = durable.hear("info", "", {"ts": AT, "body": {"ledger": NEW}})
    else:
        changes = durable.sync({}, ledger=NEW)
    assert changes[0].kind == "ledger"
    assert changes[0].body == {"ledger": NEW, "before": OLD}


# --- acknowledging -------------------------------------------------------------------------


def acks(told: Told, after_s: float = 1.0) -> list[dict[str, Any]]:
    messages = [json.loads(message.payload) for message in told.sent(after_s)]
    return [message["body"] for message in messages if message["type"] == "ack"]


def test_nothing_is_acknowledged_before_it_is_committed(durable: Told) -> None:
    durable.status("online", ledger=OLD)
    durable.event(1)
    durable.event(2)
    assert acks(durable) == []
    durable.mirror.commit()
    assert acks(durable) == [{"seq": 2, "ledger": OLD}]
    assert acks(durable) == []


def test_ack_never_passes_a_hole_and_a_gap_record_closes_it(durable: Told) -> None:
    for seq in (1, 2, 5):
        durable.event(seq)
    durable.mirror.commit()
    assert acks(durable)[0]["seq"] == 2
    changes = durable.event(6, "gap", **{"class": "P2", "from_seq": 3, "to_seq": 4, "count": 2})
    assert changes[0].name == "gap"
    durable.mirror.commit()
    assert acks(durable)[0]["seq"] == 6


def test_acks_are_bounded_in_time_and_number(durable: Told) -> None:
    durable.event(1)
    durable.mirror.commit()
    assert len(acks(durable)) == 1
    durable.event(2)
    durable.mirror.commit()
    assert acks(durable, 0.1) == []
    for seq in range(3, 203):
        durable.event(seq)
    durable.mirror.commit()
    assert [ack["seq"] for ack in acks(durable, 0.0)] == [202]


def test_link_that_is_not_durable_neither_acknowledges_nor_answers(told: Told) -> None:
    told.event(1)
    told.sync({"X": 1}, seq=1, outbox_depth=0)
    told.mirror.commit()
    assert told.sent(1000.0) == []


def test_retained_record_is_not_acknowledged(durable: Told) -> None:
    body = {"state": "queued", "rev": 1}
    durable.hear("job", "J", {"ts": AT, "seq": 1, "body": body}, is_retained=True)
    durable.mirror.commit()
    assert durable.mirror.jobs["J"].state is JobState.QUEUED
    assert acks(durable) == []


def test_record_of_another_boot_is_taken_in_and_not_acknowledged(durable: Told) -> None:
    durable.status("online", boot=2, ledger=NEW)
    durable.state("J", "queued", 1, seq=1, boot=57)
    durable.mirror.commit()
    assert durable.mirror.jobs["J"].rev == 1
    assert acks(durable) == []
    durable.state("J", "queued", 1, seq=1, boot=2)
    durable.mirror.commit()
    assert [ack["seq"] for ack in acks(durable)] == [1]


def test_numbers_of_each_ledger_are_kept_apart(durable: Told) -> None:
    durable.status("online", ledger=OLD)
    durable.event(1)
    durable.status("online", ledger=NEW)
    durable.event(1)
    durable.event(2)
    durable.mirror.commit()
    assert acks(durable) == [{"seq": 2, "ledger": NEW}]
    assert durable.mirror.numberings[OLD].cumulative == 1


def test_replayed_event_is_no_news(durable: Told) -> None:
    assert len(durable.event(1)) == 1
    assert durable.event(1) == []


def test_unreadable_record_is_kept_and_holds_up_nothing(durable: Told) -> None:
    document = {"ts": AT, "seq": 1, "body": {"state": "dreaming", "rev": 1}}
    (change,) = durable.hear("job", "J", document)
    assert change.kind == "unreadable"
    durable.mirror.commit()
    assert acks(durable)[0]["seq"] == 1


def test_hole_is_asked_for_and_given_up_only_when_the_device_begins_behind_it_thrice(
    durable: Told,
) -> None:
    durable.event(1)
    durable.event(4)
    lost: list[Change] = []
    asked = 0
    for _ in range(400):
        durable.now_s += 1.0
        lost += durable.mirror.watch(durable.now_s)
        durable.mirror.commit()
        if durable.answer().get("acked_seq") == 1:
            asked += 1
            # The replay begins with the lowest number that the device has.
            durable.event(4)
            assert not lost
        if lost:
            break
    assert asked >= 3
    assert [change.body for change in lost] == [{"from_seq": 2, "to_seq": 3, "count": 2}]
    assert durable.mirror.numbering.cumulative == 4


def test_hole_is_not_given_up_while_the_device_answers_nothing(durable: Told) -> None:
    durable.event(1)
    durable.event(4)
    for _ in range(2000):
        durable.now_s += 1.0
        assert durable.mirror.watch(durable.now_s) == []
        durable.sent()
    assert durable.mirror.numbering.cumulative == 1


def test_empty_outbox_closes_every_hole_and_says_what_was_lost(durable: Told) -> None:
    durable.event(1)
    durable.event(4)
    changes = durable.sync({}, seq=6, outbox_depth=0)
    assert [change.body["from_seq"] for change in changes] == [2, 5]
    assert durable.mirror.numbering.cumulative == 6


def test_what_was_before_a_consoles_time_is_no_loss(durable: Told) -> None:
    assert durable.sync({}, seq=500, outbox_depth=0) == []
    assert durable.mirror.numbering.cumulative == 500


# --- reconcile -----------------------------------------------------------------------------


def test_sync_is_answered_with_what_the_device_lacks_and_what_we_lack(durable: Told) -> None:
    lacking, listed, ended = build_job(), build_job(), build_job()
    for job in (lacking, listed, ended):
        durable.mirror.submit(job, durable.now_s)
    durable.sent()
    durable.state(lacking.job_id, "queued", 1, seq=1)
    durable.state(listed.job_id, "queued", 1, seq=2)
    durable.state(ended.job_id, "failed", 2, seq=3)
    durable.mirror.commit()
    durable.sync({listed.job_id: 1, "STRANGE": 4}, ledger=OLD)
    answer = durable.answer()
    assert [item["body"]["job_id"] for item in answer["missing"]] == [lacking.job_id]
    assert answer["unknown"] == ["STRANGE"]
    assert (answer["acked_seq"], answer["ledger"]) == (3, OLD)
    # Sent by the answer, so not once more on its topic.
    assert durable.topics(1.0) == []


def test_job_beyond_a_list_that_was_cut_is_not_taken_for_lost(durable: Told) -> None:
    job = build_job()
    durable.mirror.submit(job, durable.now_s)
    durable.state(job.job_id, "queued", 1)
    durable.sync({"STRANGE": 1}, open_count=300)
    assert "missing" not in durable.answer()


def test_succeeded_job_without_its_result_is_asked_for_by_its_whole_command(durable: Told) -> None:
    job = build_job()
    durable.mirror.submit(job, durable.now_s)
    durable.state(job.job_id, "succeeded", 3)
    durable.sync({})
    assert [item["body"]["job_id"] for item in durable.answer()["missing"]] == [job.job_id]


def test_answer_is_cut_into_messages_below_the_bound(durable: Told) -> None:
    jobs = [build_job(60_000) for _ in range(9)]
    for job in jobs:
        durable.mirror.submit(job, durable.now_s)
    durable.sync({})
    messages = [item for item in durable.sent() if item.topic.endswith("/c2d/sync")]
    bodies = [json.loads(item.payload)["body"] for item in messages]
    assert max(len(item.payload) for item in messages) < 256 * 1024
    ids = [item["body"]["job_id"] for body in bodies for item in body.get("missing", [])]
    assert ids == [job.job_id for job in jobs]
    assert ["acked_seq" in body for body in bodies] == [True] + [False] * (len(bodies) - 1)


def test_pending_cancel_goes_with_the_answer(durable: Told) -> None:
    durable.mirror.cancel(build_cancel("J"), durable.now_s)
    durable.sync({"J": 1})
    assert durable.answer()["cancel"] == ["J"]


def test_device_that_is_online_and_sent_no_sync_is_asked_for_one(durable: Told) -> None:
    durable.status("online")
    assert durable.topics() == []
    (message,) = durable.sent(3.0)
    assert message.topic.endswith("/c2d/cmd/rebirth")
    assert message.response_topic == "edgeward/v1/box/d2c/reply/console"
    durable.sync({})
    assert "cmd/rebirth" not in durable.topics(10_000.0)


def test_what_was_kept_is_taken_over_and_what_was_let_go_of_stays_ended(durable: Told) -> None:
    durable.state("J", "failed", 2)
    view = durable.mirror.jobs["J"]
    durable.mirror.forget_complete()
    assert "J" not in durable.mirror.jobs
    durable.mirror.restore(jobs=[view])
    assert durable.state("J", "running", 9) == []

    again = Told(acknowledges=True)
    device = durable.mirror.device
    device.ledger = OLD
    again.mirror.restore(device, {OLD: Numbering(7)})
    again.event(8)
    again.mirror.commit()
    assert acks(again) == [{"seq": 8, "ledger": OLD}]
