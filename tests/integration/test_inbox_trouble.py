"""Batch folders that misbehave: one that cannot be served holds up no other, and is told once."""

import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.jobs import JobState
from tests.harness.users import open_folder, ordinary_user
from tests.harness.waiting import wait_until
from tests.integration.test_inbox_recovery import Bench

OTHER = "other"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.engine.dispose()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def look_and_tell(bench: Bench) -> None:
    """Look twice, with the log lines that the thread writes after each turn."""
    bench.inbox._turn()
    bench.inbox._tell_trouble()
    bench.clock.advance(1000)
    bench.inbox._turn()
    bench.inbox._tell_trouble()


def test_folder_that_cannot_be_read_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    with open_folder() as folder:
        os.chown(folder, 65534 if os.geteuid() == 0 else -1, -1)
        with ordinary_user():
            bench = Bench(folder)
            bench.put("a.png")
            bench.put("b.png", model=OTHER)
            bench.model.chmod(0)
            look_and_tell(bench)
            look_and_tell(bench)
            assert [item.job.model for item in bench.commit() if item.job] == [""]
            assert list((bench.settings.inbox_dir / OTHER / ".work").iterdir())
            bench.model.chmod(0o700)
            look_and_tell(bench)
            assert len(bench.commit()) == 1
            bench.engine.dispose()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Permission denied" in caplog.text


def test_folder_that_cannot_be_written_is_told_once_and_holds_up_no_other(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="agent.daemon.inbox")
    for name in ("a.png", "b.png"):
        bench.put(name)
    (bench.model / ".work").write_text("a file where a folder should be")
    bench.put("c.png", model=OTHER)
    for _ in range(3):
        look_and_tell(bench)
    assert len(bench.commit()) == 2, "the unknown model's job, and the call for its end"
    (bench.model / ".work").unlink()
    look_and_tell(bench)
    assert len(bench.commit()) == 2
    told = [record.getMessage() for record in caplog.records]
    assert len([text for text in told if text.startswith(f"{bench.model}: ")]) == 2
    assert told[-1] == f"{bench.model}: served again"


def test_file_whose_claim_failed_half_way_is_taken_over(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_folder: Path) -> None:
        raise OSError(5, "Input/output error")

    path = bench.put("a.png")
    # The disk fails between the rename and its flush.
    monkeypatch.setattr("agent.daemon.inbox.fsync_dir", fail)
    bench.inbox._attempt(path, bench.inbox._claim)
    monkeypatch.undo()
    assert bench.files() == [".work/a.png"]
    bench.look()
    assert len(bench.commit()) == 1
    bench.run_jobs()
    bench.look()
    bench.expect_one_delivery()


def test_stick_pulled_before_the_delivery_has_its_line_and_is_tidied_when_it_is_back(
    bench: Bench,
) -> None:
    bench.put("a.png")
    bench.look()
    bench.commit()
    bench.run_jobs()
    away = bench.model.with_name(".away")
    bench.model.rename(away)
    bench.look()
    assert len(bench.lines()) == 1
    assert not bench.model.exists()
    away.rename(bench.model)
    bench.look()
    bench.expect_one_delivery()


@pytest.mark.parametrize("leaves_folder", [False, True])
def test_stick_pulled_before_a_failure_gets_its_reasons_when_it_is_back(
    bench: Bench, *, leaves_folder: bool
) -> None:
    bench.put("a.png")
    bench.look()
    bench.commit()
    away = bench.model.with_name(".away")
    bench.model.rename(away)
    if leaves_folder:
        bench.model.mkdir()
    bench.run_jobs(JobState.FAILED)
    bench.look()
    if leaves_folder:
        assert bench.files() == []
        bench.model.rmdir()
    away.rename(bench.model)
    bench.look()
    assert bench.files() == ["failed/a.png", "failed/a.png.reason.json"]


def test_stick_pulled_while_its_job_waits_is_one_job_when_it_is_back(bench: Bench) -> None:
    bench.put("a.png")
    bench.look()
    bench.commit()
    away = bench.model.with_name(".away")
    bench.model.rename(away)
    bench.look()
    away.rename(bench.model)
    bench.look()
    assert bench.mailbox == []
    assert len(bench.run_jobs()) == 1
    bench.look()
    bench.expect_one_delivery()


def test_line_that_finds_no_room_is_cut_off_and_written_once_there_is(bench: Bench) -> None:
    for name in ("a.png", "b.png"):
        bench.put(name)
        bench.look()
        bench.commit()
        bench.run_jobs(tell=name == "a.png")
        bench.look()
    whole = bench.results_file().read_bytes()
    bench.crash()
    with largest_file(len(whole) + 20):
        bench.look()
        bench.look()
    assert bench.results_file().read_bytes() == whole
    assert bench.files() == [".work/b.png", "done/a.png"]
    bench.look()
    assert [line["file"] for line in bench.lines()] == ["a.png", "b.png"]
    assert bench.files() == ["done/a.png", "done/b.png"]


def test_results_file_that_cannot_be_read_after_a_crash_doubles_no_line(bench: Bench) -> None:
    bench.put("a.png")
    bench.look()
    bench.commit()
    bench.run_jobs()
    (bench.model / "done").symlink_to("nowhere")
    bench.look()
    assert len(bench.lines()) == 1
    file = bench.results_file()
    hidden = file.rename(file.with_name("hidden"))
    file.mkdir()
    (bench.model / "done").unlink()
    bench.crash()
    bench.look()
    assert bench.files() == [".work/a.png"]
    file.rmdir()
    hidden.rename(file)
    bench.look()
    bench.expect_one_delivery()


def test_inbox_that_cannot_be_made_does_not_end_its_thread(bench: Bench) -> None:
    root = bench.settings.inbox_dir
    bench.put("a.png")
    away = root.rename(root.with_name("away"))
    root.write_text("a file where a folder should be")
    inbox = bench.make_inbox()
    inbox.start()
    wait_until(lambda: inbox.turns > 2, 10, "it goes on looking")
    root.unlink()
    away.rename(root)
    bench.clock.advance(10)
    wait_until(lambda: inbox._seen, 10, "it has seen the file")
    bench.clock.advance(1000)
    wait_until(lambda: bench.mailbox, 10, "it takes the file")
    inbox.stop()
