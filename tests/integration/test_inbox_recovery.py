"""Batch folders across crashes: at whatever step the agent dies, each file has one result.

A crash is an inbox that is thrown away, and a new one on the same folders and
the same ledger. What the inbox says to the writer is written by the real
intake into a real ledger; only the threads are left out, so that a test can
stop between any two steps.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine

from agent.clock import SystemClock
from agent.commands import CANCEL, new_id
from agent.config import Settings
from agent.daemon.inbox import COMMANDS, Inbox
from agent.daemon.intake import Intake
from agent.daemon.messages import Message, Received, Spooled
from agent.jobs import JobState, Lane, Reason
from agent.sections import InboxSettings
from agent.store.database import migrate, open_engine, transaction
from agent.store.ledger import Ledger, Outcome
from agent.store.retention import Retention
from agent.topics import Topics
from tests.conftest import wait_until
from tests.harness.box import make_body, make_envelope
from tests.harness.clocks import FakeClock

MODEL = "tiny"


def refuse_to_answer(name: str, _message: Received, _broadcast: bool) -> Callable[[], None]:
    raise AssertionError(f"nothing here asks for {name}")


def fail_to_answer(_job_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    raise TimeoutError


class Bench:
    """Inbox, intake and ledger, with a crash between any two steps."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(
            device_id="dev",
            data_dir=folder,
            inbox=InboxSettings(settle_s=1.0, scan_s=0.05),
        )
        # New ids tell the real time, and intake asks how old they are.
        self.clock = FakeClock(wall=SystemClock().wall_ms())
        self.engine: Engine = open_engine(folder / "ledger.db")
        migrate(self.engine)
        topics = Topics("dev")
        self.ledger = Ledger(topics, self.clock)
        self.intake = Intake(
            self.settings,
            topics,
            self.ledger,
            Retention(self.clock, 30, 2),
            self.clock,
            lambda name: name == MODEL,
            lambda _model, _version: None,
            refuse_to_answer,
        )
        self.model = self.settings.inbox_dir / MODEL
        self.model.mkdir(parents=True)
        (self.settings.inbox_dir / COMMANDS).mkdir()
        self.mailbox: list[Message] = []
        self.inbox = self.make_inbox()

    def make_inbox(self) -> Inbox:
        self.mailbox = []
        return Inbox(
            self.settings,
            self.clock,
            self.intake.build_job,
            self.read_jobs,
            self.mailbox.append,
        )

    def crash(self) -> None:
        """Throw the inbox away, with what it said and nobody wrote, and start a new one."""
        self.inbox = self.make_inbox()
        self.inbox._recover()

    def put(self, name: str, content: bytes = b"pixels", model: str = MODEL) -> Path:
        path = self.settings.inbox_dir / model / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    def look(self) -> None:
        """Let the inbox look twice, with the time between that makes a file complete."""
        self.inbox._turn()
        self.clock.advance(1000)
        self.inbox._turn()

    def commit(self) -> list[Spooled]:
        """Write what the inbox said, as the writer does: effects after the commit."""
        spooled = [item for item in self.mailbox if isinstance(item, Spooled)]
        assert len(spooled) == len(self.mailbox)
        self.mailbox.clear()
        with transaction(self.engine) as tx:
            result = self.intake.handle(tx, [], spooled, 0)
        for item in spooled:
            if item.done is not None:
                item.done()
        self.inbox.notify_ended(result.ended)
        return spooled

    def run_jobs(self, state: JobState = JobState.SUCCEEDED, *, tell: bool = True) -> list[str]:
        """End every queued job, and tell the inbox unless it is to die before."""

        def run(tx: Connection) -> Any:
            ready = self.ledger.schedule.find_ready(tx, Lane.BATCH, 100)
            self.ledger.schedule.assign(tx, [(new_id(), ready)])
            now_ms = self.clock.wall
            reason = Reason("ok" if state is JobState.SUCCEEDED else "bad_input", "said so")
            result = {"output": 7} if state is JobState.SUCCEEDED else None
            return self.ledger.record_outcomes(
                tx,
                [
                    Outcome(job.job_id, job.attempt + 1, state, reason, now_ms, now_ms, result)
                    for job in ready
                ],
            )

        with transaction(self.engine) as tx:
            ended = run(tx)
        if tell:
            self.inbox.notify_ended(ended)
        return [job.job_id for job in ended]

    def read_jobs(self, job_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        with transaction(self.engine) as tx:
            return self.ledger.find_jobs(tx, job_ids)

    def state_of(self, job_id: str) -> Any:
        return self.read_jobs([job_id])[job_id]["state"]

    def files(self) -> list[str]:
        """Return the names of the model's files, with job ids left out."""
        found = (path.relative_to(self.model) for path in self.model.rglob("*") if path.is_file())
        return sorted(
            str(path.with_name(path.name.partition("__")[2]))
            if path.parts[0] == ".work"
            else str(path)
            for path in found
        )

    def claimed(self) -> Path:
        [path] = (self.model / ".work").iterdir()
        return path

    def results_file(self) -> Path:
        return next(iter((self.settings.outbox_dir / MODEL).glob("results-*.jsonl")))

    def lines(self) -> list[dict[str, Any]]:
        folder = self.settings.outbox_dir / MODEL
        text = "".join(path.read_text() for path in sorted(folder.glob("results-*.jsonl")))
        return [json.loads(line) for line in text.splitlines()]

    def expect_one_delivery(self, name: str = "a.png") -> None:
        assert [(line["file"], line["state"], line["output"]) for line in self.lines()] == [
            (name, "succeeded", 7)
        ]
        assert self.files() == [f"done/{name}"]
        # And nothing more happens however often it looks, or starts.
        self.look()
        self.crash()
        self.look()
        assert self.mailbox == []
        assert len(self.lines()) == 1

    def put_command(self, name: str, content: bytes) -> Path:
        path = self.settings.inbox_dir / COMMANDS / name
        path.write_bytes(content)
        return path

    def commands(self) -> list[str]:
        return sorted(path.name for path in (self.settings.inbox_dir / COMMANDS).iterdir())


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.engine.dispose()


# --- without a crash --------------------------------------------------------------------------


def test_file_becomes_a_job_and_its_result_a_line(bench: Bench) -> None:
    bench.put("a.png")
    bench.look()
    assert bench.files() == [".work/a.png"]
    [spooled] = bench.commit()
    assert spooled.job is not None
    body = json.loads(spooled.job.body)
    assert (spooled.job.model, body["handler"]) == (MODEL, "infer.batch")
    assert body["input"]["file"] == f"{MODEL}/.work/{spooled.job.job_id}__a.png"
    assert (bench.settings.inbox_dir / body["input"]["file"]).read_bytes() == b"pixels"
    bench.run_jobs()
    bench.look()
    assert bench.lines()[0]["job_id"] == spooled.job.job_id
    bench.expect_one_delivery()


def test_file_is_taken_only_once_it_stayed_unchanged(bench: Bench) -> None:
    path = bench.put("a.png", b"pix")
    bench.inbox._turn()
    bench.clock.advance(999)
    path.write_bytes(b"pixels")
    bench.inbox._turn()
    bench.clock.advance(999)
    bench.inbox._turn()
    assert bench.mailbox == []
    bench.clock.advance(1)
    bench.inbox._turn()
    assert len(bench.mailbox) == 1
    assert bench.claimed().read_bytes() == b"pixels"


def test_file_that_somebody_writes_is_not_taken_however_long_it_rests(bench: Bench) -> None:
    with bench.put("a.png").open("ab"):
        bench.look()
        bench.look()
        assert bench.files() == ["a.png"]
    bench.inbox._turn()
    assert bench.files() == [".work/a.png"]


@pytest.mark.parametrize(
    "name",
    ["a.part", "a.png.part", "a.partial", "a.tmp", "a.crdownload", "a.png~", ".a.png", ".hidden"],
)
def test_file_with_the_name_of_an_unfinished_one_is_never_taken(bench: Bench, name: str) -> None:
    bench.put(name)
    bench.look()
    bench.look()
    assert bench.mailbox == []
    assert bench.files() == [name]


def test_only_files_in_folders_of_models_are_taken(bench: Bench, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.png").write_bytes(b"x")
    (bench.settings.inbox_dir / "loose.png").write_bytes(b"x")
    (bench.settings.inbox_dir / "linked").symlink_to(outside)
    (bench.model / "link.png").symlink_to(outside / "a.png")
    (bench.model / "folder").mkdir()
    bench.put("a.png", model=".hidden")
    bench.put("a.png", model="_reserved")
    bench.look()
    assert bench.mailbox == []


def test_file_of_an_unknown_model_fails_with_its_reason_beside_it(bench: Bench) -> None:
    bench.put("a.png", model="cats")
    bench.look()
    bench.commit()
    bench.look()
    failed = bench.settings.inbox_dir / "cats" / "failed"
    assert (failed / "a.png").read_bytes() == b"pixels"
    reason = json.loads((failed / "a.png.reason.json").read_text())
    assert (reason["state"], reason["code"], reason["file"]) == (
        "rejected",
        "unknown_model",
        "a.png",
    )
    assert bench.state_of(reason["job_id"]) == "rejected"
    assert not (bench.settings.outbox_dir / "cats").exists()


def test_file_whose_job_failed_has_its_reason_beside_it_and_no_line(bench: Bench) -> None:
    bench.put("a.png")
    bench.look()
    bench.commit()
    bench.run_jobs(JobState.FAILED)
    bench.look()
    assert bench.files() == ["failed/a.png", "failed/a.png.reason.json"]
    reason = json.loads((bench.model / "failed" / "a.png.reason.json").read_text())
    assert (reason["code"], reason["message"], reason["attempts"]) == ("bad_input", "said so", 1)
    assert bench.lines() == []


@pytest.mark.parametrize("name", [b"\xff.png", b"a" * 244], ids=["not UTF-8", "too long"])
def test_file_with_an_unusable_name_is_set_aside_and_holds_up_no_other(
    bench: Bench, name: bytes
) -> None:
    bench.put("a.png")
    (bench.model / os.fsdecode(name)).write_bytes(b"pixels")
    bench.put("z.png")
    bench.look()
    assert len(bench.commit()) == 2
    reasons = list((bench.model / "failed").glob("*.reason.json"))
    assert [json.loads(path.read_text())["code"] for path in reasons] == ["bad_file_name"]
    assert len(list((bench.model / "failed").iterdir())) == 2


def test_command_that_cannot_be_read_holds_up_no_file(bench: Bench) -> None:
    (bench.settings.inbox_dir / COMMANDS / "0.json").mkdir()
    (bench.settings.inbox_dir / COMMANDS / "1.json").symlink_to("nowhere")
    bench.put("a.png")
    bench.look()
    assert len(bench.commit()) == 1


def test_store_that_does_not_answer_for_a_moment_loses_no_result(bench: Bench) -> None:
    bench.put("a.png")
    bench.look()
    bench.commit()
    answering, bench.inbox._read_jobs = bench.inbox._read_jobs, fail_to_answer
    bench.run_jobs()
    with pytest.raises(TimeoutError):
        bench.inbox._turn()
    bench.inbox._read_jobs = answering
    bench.inbox._turn()
    assert (bench.model / "done" / "a.png").exists()


def test_second_file_of_a_name_keeps_the_first(bench: Bench) -> None:
    for content in (b"first", b"second"):
        bench.put("a.png", content)
        bench.look()
        [spooled] = bench.commit()
        bench.run_jobs()
        bench.look()
    assert spooled.job is not None
    done = bench.model / "done"
    assert (done / "a.png").read_bytes() == b"first"
    assert (done / f"{spooled.job.job_id}__a.png").read_bytes() == b"second"
    assert [line["file"] for line in bench.lines()] == ["a.png", "a.png"]


def test_file_that_was_taken_away_while_its_job_ran_still_has_its_line(bench: Bench) -> None:
    bench.put("a.png")
    bench.look()
    bench.commit()
    bench.claimed().unlink()
    bench.run_jobs()
    bench.look()
    assert len(bench.lines()) == 1
    assert bench.files() == []


def test_result_that_cannot_be_written_is_written_once_it_can(bench: Bench) -> None:
    bench.put("a.png")
    bench.look()
    bench.commit()
    obstacle = bench.settings.outbox_dir
    obstacle.write_text("a file where a folder should be")
    bench.run_jobs()
    bench.look()
    assert bench.files() == [".work/a.png"]
    obstacle.unlink()
    bench.look()
    bench.expect_one_delivery()


# --- a crash at each step -----------------------------------------------------------------------


def test_crash_after_the_claim_submits_the_file_again_under_its_id(bench: Bench) -> None:
    bench.inbox._claim(bench.put("a.png"))
    assert bench.mailbox == []
    job_id = bench.claimed().name.partition("__")[0]
    bench.crash()
    bench.look()
    [spooled] = bench.commit()
    assert spooled.job is not None
    assert spooled.job.job_id == job_id
    bench.run_jobs()
    bench.look()
    bench.expect_one_delivery()


def test_crash_before_the_commit_of_a_submit_submits_it_again(bench: Bench) -> None:
    bench.put("a.png")
    bench.look()
    assert len(bench.mailbox) == 1
    bench.crash()
    bench.look()
    assert len(bench.commit()) == 1
    assert len(bench.run_jobs()) == 1
    bench.look()
    bench.expect_one_delivery()


def test_crash_while_the_job_waits_does_not_submit_it_again(bench: Bench) -> None:
    bench.put("a.png")
    bench.look()
    bench.commit()
    bench.crash()
    bench.look()
    assert bench.mailbox == []
    assert bench.lines() == []
    assert len(bench.run_jobs()) == 1
    bench.look()
    bench.expect_one_delivery()


def test_crash_after_the_end_writes_the_line(bench: Bench) -> None:
    bench.put("a.png")
    bench.look()
    bench.commit()
    bench.run_jobs(tell=False)
    assert bench.lines() == []
    bench.crash()
    bench.look()
    bench.expect_one_delivery()


def test_crash_after_the_end_of_a_refused_file_moves_it_with_its_reason(bench: Bench) -> None:
    bench.put("a.png", model="cats")
    bench.look()
    bench.commit()
    bench.crash()
    bench.look()
    failed = bench.settings.inbox_dir / "cats" / "failed"
    assert sorted(path.name for path in failed.iterdir()) == ["a.png", "a.png.reason.json"]


def test_crash_between_line_and_move_moves_and_writes_no_second_line(bench: Bench) -> None:
    bench.put("a.png")
    bench.look()
    bench.commit()
    bench.run_jobs()
    # A link to nowhere in the place of the folder stops it exactly there.
    (bench.model / "done").symlink_to("nowhere")
    bench.look()
    assert len(bench.lines()) == 1
    assert bench.files() == [".work/a.png"]
    bench.crash()
    (bench.model / "done").unlink()
    bench.look()
    bench.expect_one_delivery()


def test_crash_inside_a_line_writes_it_whole(bench: Bench) -> None:
    for name in ("a.png", "b.png"):
        bench.put(name)
        bench.look()
        bench.commit()
        bench.run_jobs(tell=name == "a.png")
        bench.look()
    file = bench.results_file()
    first = file.read_bytes()
    assert first.count(b"\n") == 1
    b_id = bench.claimed().name.partition("__")[0]
    file.write_bytes(first + f'{{"file": "b.png", "job_id": "{b_id}", "sta'.encode())
    bench.crash()
    bench.look()
    assert file.read_bytes().startswith(first)
    assert [line["file"] for line in bench.lines()] == ["a.png", "b.png"]
    assert bench.files() == ["done/a.png", "done/b.png"]


def test_crash_inside_the_end_of_a_line_writes_it_whole(bench: Bench) -> None:
    bench.put("a.png")
    bench.look()
    bench.commit()
    bench.run_jobs()
    (bench.model / "done").symlink_to("nowhere")
    bench.look()
    file = bench.results_file()
    file.write_bytes(file.read_bytes()[:-1])
    bench.crash()
    (bench.model / "done").unlink()
    bench.look()
    bench.expect_one_delivery()


def test_file_in_work_that_no_inbox_put_there_is_left_alone(bench: Bench) -> None:
    (bench.model / ".work").mkdir()
    strange = bench.model / ".work" / "notes__a.png"
    strange.write_bytes(b"mine")
    bench.crash()
    bench.look()
    assert bench.mailbox == []
    assert strange.read_bytes() == b"mine"


# --- commands of the command line ------------------------------------------------------------


def test_submit_left_by_the_command_line_is_a_job_and_goes_after_its_commit(
    bench: Bench,
) -> None:
    job_id = new_id()
    bench.put_command("1.json", make_envelope(make_body(job_id=job_id)))
    bench.look()
    assert bench.commands() == ["1.taken"]
    bench.commit()
    assert bench.commands() == []
    assert bench.state_of(job_id) == "queued"


def test_cancel_left_by_the_command_line_cancels(bench: Bench) -> None:
    job_id = new_id()
    bench.put_command("1.json", make_envelope(make_body(job_id=job_id)))
    bench.look()
    bench.commit()
    bench.put_command("2.json", make_envelope({"job_id": job_id}, CANCEL))
    bench.look()
    bench.commit()
    assert bench.commands() == []
    assert bench.state_of(job_id) == "canceled"


def test_crash_before_the_commit_takes_the_command_again(bench: Bench) -> None:
    job_id = new_id()
    bench.put_command("1.json", make_envelope(make_body(job_id=job_id)))
    bench.look()
    bench.crash()
    bench.look()
    assert len(bench.commit()) == 1
    assert bench.commands() == []
    assert bench.state_of(job_id) == "queued"


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"{", "malformed"),
        (make_envelope({}), "malformed"),
        (make_envelope({"job_id": "../../x"}), "malformed"),
        (make_envelope(make_body(), v=2), "unsupported_version"),
        (b" " * 262145, "payload_too_large"),
    ],
    ids=["half", "no id", "path", "version", "long"],
)
def test_command_that_names_no_job_is_kept_under_its_code(
    bench: Bench, payload: bytes, code: str
) -> None:
    bench.put_command("1.json", payload)
    bench.put("a.png")
    bench.look()
    assert bench.commands() == [f"1.{code}"]
    [spooled] = bench.commit()
    assert spooled.job is not None
    assert spooled.job.source == "folder"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (make_body(handler="shell"), "unknown_handler"),
        (make_body(input={}), "invalid_body"),
        (make_body(model="cats"), "unknown_model"),
    ],
)
def test_command_with_a_bad_job_ends_as_rejected(
    bench: Bench, body: dict[str, Any], code: str
) -> None:
    job_id = new_id()
    bench.put_command("1.json", make_envelope(body | {"job_id": job_id}))
    bench.look()
    bench.commit()
    assert bench.commands() == []
    row = bench.read_jobs([job_id])[job_id]
    assert (row["state"], row["reason_code"]) == ("rejected", code)


# --- as a thread ------------------------------------------------------------------------------


def test_thread_recovers_and_looks_until_it_is_stopped(bench: Bench) -> None:
    bench.inbox._claim(bench.put("a.png"))
    bench.put_command("1.taken", make_envelope(make_body(job_id=new_id())))
    inbox = bench.make_inbox()
    inbox.start()
    wait_until(lambda: len(bench.mailbox) == 2, 10, "both are submitted again")
    inbox.stop()
    assert not inbox.is_alive()
