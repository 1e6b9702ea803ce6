"""What counts as evidence of a crash, and when a consumer counts as stalled."""

import os
import threading
from pathlib import Path

import pytest

from worker.crashes import Crash, report_predecessors
from worker.heartbeat import StallWatch
from worker.journal import Journal, JournalEntry, claim_journal, slot_folder
from worker.oom import OomCount, find_events_file, read_oom

BOOT = "boot-1"
NOTHING = OomCount()
# As CPython 3.11 and 3.13 write them; the first of a crash in a thread that is not Python's.
NATIVE = "Fatal Python error: Segmentation fault\n\nThread 0x{other:x} (most recent call first):\n"
OURS = "Fatal Python error: Bus error\n\nCurrent thread 0x{thread:x} [pool-1] (most recent call\n"


def make_task(*job_ids: str, task: str = "task-1", model: str = "m") -> dict[str, object]:
    jobs = [{"id": job_id, "attempt": 2, "body": {}} for job_id in job_ids]
    return {"task": task, "model": model, "reply": "outcomes.box", "jobs": jobs}


class Predecessor:
    """Journals of a process of this slot, without the process: the lock is let go."""

    def __init__(self, tmp_path: Path, boot: str = BOOT, name: str = "old") -> None:
        self.folder = slot_folder(tmp_path, "box/inference")
        self.journal = Journal(self.folder, name, boot, entries=2)
        self._free = self.journal._free

    def run(
        self,
        *job_ids: str,
        at_work: str,
        task: str = "task-1",
        model: str = "m",
        is_loading: bool = False,
    ) -> None:
        entry: JournalEntry = self._free.popleft()
        entry.open(make_task(*job_ids, task=task, model=model), "7")
        entry.mark(at_work, is_loading)

    def refuse(self, crash: Crash) -> None:
        pytest.fail(f"told of {crash}")

    def refuse_death(self, process: str, signal: str) -> None:
        pytest.fail(f"told of {process}: {signal}")

    def die(self, trace: str = "") -> None:
        self.journal.trace.write(
            trace.format(thread=threading.get_ident(), other=threading.get_ident() + 1).encode()
        )
        self.journal.trace.close()
        self.journal._memory.close()
        os.close(self.journal._lock_fd)

    def report(self, oom: OomCount = NOTHING, boot: str = BOOT) -> list[Crash]:
        sent: list[Crash] = []
        self.deaths: list[tuple[str, str]] = []

        def note(process: str, signal: str) -> None:
            self.deaths.append((process, signal))

        report_predecessors(self.folder, boot, oom, sent.append, note)
        return sent


@pytest.fixture
def dead(tmp_path: Path) -> Predecessor:
    return Predecessor(tmp_path)


def test_trace_names_the_thread_and_the_journal_its_jobs(dead: Predecessor) -> None:
    dead.run("a", "b", "c", at_work="ac")
    dead.die(OURS)
    [crash] = dead.report()
    assert crash.signal == "SIGBUS"
    assert crash.counts
    record = crash.record
    assert (record.task, record.model, record.version) == ("task-1", "m", "7")
    assert record.reply == "outcomes.box"
    assert crash.jobs == record.jobs == (("a", 2), ("c", 2))
    assert not list(dead.folder.iterdir())
    assert dead.report() == []


def test_crash_in_a_runtime_s_own_thread_is_of_the_one_task_at_work(dead: Predecessor) -> None:
    dead.run("a", at_work="a")
    dead.run("b", at_work="", task="task-2")
    dead.die(NATIVE)
    assert [crash.jobs for crash in dead.report()] == [(("a", 2),)]


@pytest.mark.parametrize(("model", "counts"), [("m", [True, False]), ("n", [False, False])])
def test_where_several_tasks_were_at_work_no_job_is_accused(
    dead: Predecessor, model: str, counts: list[bool]
) -> None:
    dead.run("a", at_work="a")
    dead.run("b", at_work="b", task="task-2", model=model)
    dead.die(NATIVE)
    crashes = dead.report()
    assert [crash.record.task for crash in crashes] == ["task-1", "task-2"]
    assert [crash.jobs for crash in crashes] == [(), ()]
    # What they share is the model version: it counts, once.
    assert [crash.counts for crash in crashes] == counts


def test_crash_while_the_model_loads_is_the_model_s_alone(dead: Predecessor) -> None:
    dead.run("a", "b", at_work="ab", is_loading=True)
    dead.die(OURS)
    [crash] = dead.report()
    assert (crash.jobs, crash.counts) == ((), True)


def test_crash_in_a_thread_that_runs_no_job_is_of_none(dead: Predecessor) -> None:
    dead.run("a", at_work="a")
    dead.die(OURS.replace("{thread:x}", "1234"))
    assert dead.report() == []


def test_death_without_a_trace_is_no_evidence(dead: Predecessor) -> None:
    dead.run("a", at_work="a")
    dead.die()
    assert dead.report(OomCount(kills=3)) == []
    assert not list(dead.folder.iterdir())


@pytest.mark.parametrize(
    ("before", "after", "is_oom"),
    [
        (OomCount(3), OomCount(4), True),
        (OomCount(3), OomCount(3), False),
        (OomCount(), OomCount(4), False),
        (OomCount(3), OomCount(), False),
        # The group's own counter knows better than the machine's.
        (OomCount(3, 11, 0), OomCount(4, 11, 0), False),
        (OomCount(3, 11, 0), OomCount(4, 11, 1), True),
        # A new group counts from zero: then it is the machine's.
        (OomCount(3, 11, 2), OomCount(4, 12, 0), True),
    ],
)
def test_out_of_memory_is_told_by_the_kernel_s_counters(
    dead: Predecessor, before: OomCount, after: OomCount, is_oom: bool
) -> None:
    dead.run("a", at_work="a")
    dead.journal.save_oom(before)
    dead.die()
    assert [crash.signal for crash in dead.report(after)] == ["oom"] * is_oom


def test_counters_are_read_from_the_kernel_s_files(tmp_path: Path) -> None:
    assert read_oom(None).kills >= 0
    group = tmp_path / "sys/fs/cgroup/edgeward"
    group.mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cgroup.controllers").write_text("memory")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/edgeward\n")
    assert find_events_file(tmp_path) is None
    (group / "memory.events").write_text("low 0\noom 4\noom_kill 2\noom_group_kill 9\n")
    count = read_oom(find_events_file(tmp_path), tmp_path / "none")
    assert count == OomCount(-1, group.stat().st_ino, 2)


def test_death_that_no_task_is_to_blame_for_is_told_by_the_process_s_name(
    dead: Predecessor,
) -> None:
    # It answered somebody at once: the journal knows of tasks only.
    dead.die(OURS)
    assert dead.report() == []
    assert dead.deaths == [(dead.journal.path.stem, "SIGBUS")]
    assert not list(dead.folder.iterdir())


def test_death_that_a_task_is_to_blame_for_is_told_once(dead: Predecessor) -> None:
    dead.run("a", at_work="a")
    dead.die(OURS)
    assert len(dead.report()) == 1
    assert dead.deaths == []


def test_death_without_evidence_is_not_told(dead: Predecessor) -> None:
    dead.die()
    assert dead.report() == []
    assert dead.deaths == []


def test_files_of_another_boot_are_removed_and_tell_nothing(tmp_path: Path) -> None:
    dead = Predecessor(tmp_path, boot="boot-0")
    dead.run("a", at_work="a")
    dead.die(OURS)
    assert dead.report() == []
    assert not list(dead.folder.iterdir())


def test_files_of_another_slot_go_only_after_a_boot(tmp_path: Path) -> None:
    dead = Predecessor(tmp_path)
    dead.run("a", at_work="a")
    dead.die(OURS)
    other = slot_folder(tmp_path, "box/batch")
    report_predecessors(other, BOOT, NOTHING, dead.refuse, dead.refuse_death)
    assert len(list(dead.folder.iterdir())) == 2
    report_predecessors(other, "boot-2", NOTHING, dead.refuse, dead.refuse_death)
    assert not list(dead.folder.iterdir())


def test_files_stay_until_the_message_is_sent(dead: Predecessor) -> None:
    dead.run("a", at_work="a")
    dead.die(OURS)

    def fail(_: Crash) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        report_predecessors(dead.folder, BOOT, NOTHING, fail, dead.refuse_death)
    assert [crash.jobs for crash in dead.report()] == [(("a", 2),)]


def test_living_process_s_journal_is_left_alone(dead: Predecessor) -> None:
    dead.run("a", at_work="a")
    with claim_journal(dead.journal.path) as found:
        assert found is None
    assert dead.report() == []
    assert len(list(dead.folder.iterdir())) == 2
    dead.die()


@pytest.mark.parametrize("damage", [b"", b"rubbish", b"edgeward-journal-1\n{]"])
def test_damaged_journal_is_removed_and_tells_nothing(dead: Predecessor, damage: bytes) -> None:
    dead.run("a", at_work="a")
    dead.die(OURS)
    dead.journal.path.write_bytes(damage)
    assert dead.report() == []
    assert not list(dead.folder.iterdir())


def test_torn_entry_counts_as_none_and_the_others_stand(dead: Predecessor) -> None:
    dead.run("a", at_work="a")
    dead.run("b", at_work="b", task="task-2")
    dead.die(NATIVE)
    data = dead.journal.path.read_bytes()
    dead.journal.path.write_bytes(data.replace(b'"task": "task-1"', b'"task": "tas\xff\xff"}'))
    assert [crash.record.task for crash in dead.report()] == ["task-2"]


def test_journal_has_its_size_from_the_start_and_never_grows(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "slot", "p", BOOT, entries=1)
    size = journal.path.stat().st_size
    ids = [f"{number:026}" for number in range(256)]
    for _ in range(3):
        with journal.take() as entry, journal.take() as none_left:
            assert entry is not None
            assert none_left is None
            entry.open(make_task(*ids), "1")
            entry.mark(ids)
    with journal.take() as entry:
        assert entry is not None
        # More than fits is left out, not written beyond the entry.
        entry.open(make_task(*ids, *ids), "1")
        entry.mark(ids)
    assert journal.path.stat().st_size == size
    assert journal.path.stat().st_blocks * 512 >= size
    journal.remove()
    assert not list((tmp_path / "slot").iterdir())


def test_idle_consumer_that_leaves_tasks_waiting_is_stalled() -> None:
    watch = StallWatch(after_s=5)
    assert not watch.observe(100, waiting=1, holding=0, taken=0)
    assert watch.is_suspicious
    assert not watch.observe(105, waiting=1, holding=0, taken=0)
    assert watch.observe(105.1, waiting=1, holding=0, taken=0)


@pytest.mark.parametrize("change", [{"waiting": 0}, {"holding": 1}, {"taken": 1}])
def test_consumer_that_does_anything_begins_anew(change: dict[str, int]) -> None:
    watch = StallWatch(after_s=5)
    watch.observe(100, waiting=1, holding=0, taken=0)
    look = {"waiting": 1, "holding": 0, "taken": 0, **change}
    assert not watch.observe(104, **look)
    assert not watch.is_suspicious
    taken = look["taken"]
    assert not watch.observe(106, waiting=1, holding=0, taken=taken)
    assert not watch.observe(111, waiting=1, holding=0, taken=taken)
    assert watch.observe(111.1, waiting=1, holding=0, taken=taken)
