"""Batch folders on real disks that fill up, go away, or may not be written; real processes.

Whatever happens to one folder, its files end in `done/` with one line or in `failed/` with their
reason, once that can be; meanwhile the agent lives and the other folder is served. What needs a
mount is skipped where this user may not mount; tests/integration/test_inbox_trouble.py has the
same stories without.
"""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.repository import ModelRepository
from benchmarks.tiny_model import write_tiny_model
from tests.harness.box import MODEL, Box
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.disks import NoMountError, fill_disk, mounted_disk
from tests.harness.folders import (
    DAMAGED,
    array_bytes,
    list_names,
    put_arrays,
    put_file,
    read_lines,
)
from tests.harness.waiting import wait_until

OTHER = "other"
WAIT_S = 20.0
DISK_BYTES = 1 << 20


class Desk:
    """A box of folders only, and what lies in them."""

    def __init__(self, box: Box, label: str) -> None:
        self.box = box
        self.inbox = box.data_dir / "inbox" / MODEL
        self.outbox = box.data_dir / "outbox" / MODEL
        self.other = box.data_dir / "inbox" / OTHER
        self._label = label
        self._others = 0

    def names(self, count: int) -> set[str]:
        """Return names that no other test uses."""
        return {f"{self._label}-{index}.npy" for index in range(count)}

    def check_alive(self) -> None:
        """Make sure that the agent lives and serves the other folder."""
        name = f"{self._label}-other-{self._others}.npy"
        self._others += 1
        put_arrays(self.other, [name])
        wait_until(
            lambda: name in list_names(self.other / "done"),
            WAIT_S,
            f"the other folder is served; log:\n{self.box.read_log()[-3000:]}",
        )
        assert self.box.processes["agent"].poll() is None

    @contextmanager
    def paused_worker(self) -> Iterator[None]:
        """Let no job run in the block."""
        worker = self.box.processes["worker"]
        worker.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            worker.send_signal(signal.SIGCONT)

    def list_work(self) -> set[str]:
        """Return the names under way, without the ids before them."""
        return {name.partition("__")[2] for name in list_names(self.inbox / ".work")}

    def wait_claimed(self, names: set[str]) -> None:
        """Wait until the files are under way and in the ledger."""

        def is_claimed() -> bool:
            ids = [path.partition("__")[0] for path in list_names(self.inbox / ".work")]
            rows = {row[0] for row in self.box.query("SELECT job_id FROM jobs")}
            return names <= self.list_work() and set(ids) <= rows

        wait_until(is_claimed, WAIT_S, f"claimed; log:\n{self.box.read_log()[-2000:]}")

    def wait_ended(self) -> None:
        """Wait until no job is open."""
        query = "SELECT count(*) FROM jobs WHERE ended_ms IS NULL"
        wait_until(lambda: self.box.query(query)[0][0] == 0, WAIT_S, "all jobs have ended")

    def wait_delivered(self, names: set[str]) -> None:
        """Wait until these files are done, each with one line, and nothing is under way."""
        wait_until(
            lambda: names <= list_names(self.inbox / "done") and not self.list_work(),
            WAIT_S,
            f"delivered; log:\n{self.box.read_log()[-3000:]}",
        )
        assert self.count_lines(names) == Counter(names)

    def wait_explained(self, names: set[str]) -> None:
        """Wait until these files have failed, each with its reason, and nothing is under way."""
        wanted = names | {f"{name}.reason.json" for name in names}
        wait_until(
            lambda: wanted <= list_names(self.inbox / "failed") and not self.list_work(),
            WAIT_S,
            f"explained; log:\n{self.box.read_log()[-3000:]}",
        )
        assert self.count_lines(names) == Counter()

    def count_lines(self, names: set[str]) -> Counter[str]:
        """Return how many lines the results have of each of these files."""
        return Counter(line["file"] for line in read_lines(self.outbox) if line["file"] in names)

    def count_told(self, text: str) -> int:
        """Return how many warnings of the inbox name a text."""
        lines = self.box.read_log().splitlines()
        return sum("WARNING agent.daemon.inbox" in line and text in line for line in lines)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("folders")
    queue = QueueProcess(folder / "queue")
    queue.start()
    box = Box(
        folder,
        # Never started: these boxes have no console.
        MqttProcess(folder / "mqtt"),
        queue,
        EDGEWARD_MQTT__ENABLED="false",
        EDGEWARD_INBOX__SETTLE_S="0.1",
        EDGEWARD_INBOX__SCAN_S="0.1",
    )
    write_tiny_model(folder / "other-model", OTHER)
    ModelRepository(box.data_dir / "models").add(folder / "other-model")
    (box.data_dir / "inbox" / MODEL).mkdir(parents=True)
    box.start("agent")
    box.start("worker")
    wait_until(box.is_ready, 30, "the box is ready")
    yield box
    box.close()
    queue.stop()


@pytest.fixture
def desk(box: Box, request: pytest.FixtureRequest) -> Desk:
    return Desk(box, request.node.name.replace("/", "-")[:80])


@pytest.fixture
def disk(desk: Desk) -> Iterator[Path]:
    """The inbox folder on a small disk of its own."""
    with mount_small(desk.inbox) as folder:
        yield folder


@contextmanager
def mount_small(folder: Path) -> Iterator[Path]:
    """Mount a small disk over a folder, with what was there out of sight."""
    hidden = folder.with_name(f".{folder.name}")
    if folder.exists():
        folder.rename(hidden)
    try:
        with mounted_disk(folder, DISK_BYTES) as disk:
            yield disk
    except NoMountError:
        pytest.skip("this user may not mount")
    finally:
        folder.rmdir()
        if hidden.exists():
            hidden.rename(folder)


def run_as_root(*argv: str) -> None:
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    subprocess.run([*prefix, *argv], check=True)


def pull(folder: Path) -> Path:
    """Take a folder away as a pulled stick goes, and leave an empty mount point."""
    away = folder.with_name(".away")
    folder.rename(away)
    folder.mkdir()
    return away


def put_back(folder: Path, away: Path) -> None:
    """Put it where it was; fails where something was written into the empty place."""
    folder.rmdir()
    away.rename(folder)


# --- sticks -------------------------------------------------------------------------------------


def test_stick_pulled_while_its_jobs_wait_has_reasons_for_all_when_it_is_back(desk: Desk) -> None:
    names = desk.names(6)
    with desk.paused_worker():
        put_arrays(desk.inbox, sorted(names))
        desk.wait_claimed(names)
        away = pull(desk.inbox)
    desk.wait_ended()
    desk.check_alive()
    put_back(desk.inbox, away)
    desk.wait_explained(names)


def test_stick_pulled_across_a_restart_goes_on_where_it_was(desk: Desk) -> None:
    names = desk.names(6)
    with desk.paused_worker():
        put_arrays(desk.inbox, sorted(names))
        desk.wait_claimed(names)
        away = pull(desk.inbox)
        desk.box.kill("agent")
        desk.box.start("agent")
        put_back(desk.inbox, away)
    desk.wait_delivered(names)
    desk.check_alive()


def test_stick_unmounted_under_a_file_that_is_read_is_only_that_files_loss(
    desk: Desk, disk: Path
) -> None:
    names = desk.names(4)
    with desk.paused_worker():
        put_arrays(desk.inbox, sorted(names))
        desk.wait_claimed(names)
        with next(iter((disk / ".work").iterdir())).open("rb"):
            run_as_root("umount", "-l", str(disk))
    desk.wait_ended()
    desk.check_alive()
    assert list_names(desk.inbox) == set()
    codes = desk.box.query(
        "SELECT DISTINCT state, reason_code FROM jobs WHERE state != 'succeeded'"
    )
    assert ("failed", "input_not_found") in codes
    # The fixture takes it away once more.
    run_as_root("mount", "-t", "tmpfs", "-o", f"uid={os.getuid()}", "tmpfs", str(disk))


# --- half-written files -------------------------------------------------------------------------


def write_half(path: Path) -> subprocess.Popen[bytes]:
    """Start a process that has written half a file and holds it open."""
    code = (
        "import sys, signal; file = open(sys.argv[1], 'wb', 0);"
        "file.write(bytes.fromhex(sys.argv[2])); print(flush=True); signal.pause()"
    )
    content = array_bytes()
    half = content[: len(content) // 2].hex()
    writer = subprocess.Popen([sys.executable, "-c", code, path, half], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    return writer


def end(writer: subprocess.Popen[bytes]) -> None:
    assert writer.stdout is not None
    writer.kill()
    writer.wait(10)
    writer.stdout.close()


def test_file_that_is_held_open_is_taken_when_its_writer_is_gone(desk: Desk) -> None:
    [name] = desk.names(1)
    writer = write_half(desk.inbox / name)
    # Several looks of the inbox later it is still where it was.
    desk.check_alive()
    desk.check_alive()
    assert name in list_names(desk.inbox)
    with (desk.inbox / name).open("ab") as rest:
        content = array_bytes()
        rest.write(content[len(content) // 2 :])
    end(writer)
    desk.wait_delivered({name})


def test_file_whose_writer_died_half_way_fails_and_its_successor_is_done(desk: Desk) -> None:
    [name] = desk.names(1)
    end(write_half(desk.inbox / name))
    desk.wait_explained({name})
    put_file(desk.inbox, name, array_bytes())
    desk.wait_delivered({name})
    assert name in list_names(desk.inbox / "failed")


def test_part_whose_writer_died_half_way_is_left_alone_until_it_is_renamed(desk: Desk) -> None:
    [name] = desk.names(1)
    part = desk.inbox / f"{name}.part"
    end(write_half(part))
    desk.check_alive()
    assert part.exists()
    content = array_bytes()
    with part.open("ab") as rest:
        rest.write(content[len(content) // 2 :])
    part.rename(desk.inbox / name)
    desk.wait_delivered({name})


# --- disks that are full, or not ours to write --------------------------------------------------


def test_full_inbox_disk_keeps_what_it_has_and_goes_on_with_room(desk: Desk, disk: Path) -> None:
    names = desk.names(5)
    damaged = {f"damaged-{name}" for name in names}
    with desk.paused_worker():
        put_arrays(disk, sorted(names))
        for name in sorted(damaged):
            put_file(disk, name, DAMAGED)
        desk.wait_claimed(names | damaged)
        # Not among the files, or it would be one.
        (disk / "hold").mkdir()
        filler = fill_disk(disk / "hold")
    desk.wait_ended()
    desk.check_alive()
    assert damaged <= desk.list_work()
    assert 1 <= desk.count_told("No space left") <= 2
    filler.unlink()
    desk.wait_explained(damaged)
    desk.wait_delivered(names)


@pytest.mark.parametrize("dies", [False, True], ids=["agent lives", "agent dies"])
def test_full_results_disk_loses_and_doubles_no_line(desk: Desk, *, dies: bool) -> None:
    names = desk.names(8)
    with mount_small(desk.outbox) as disk:
        filler = fill_disk(disk)
        put_arrays(desk.inbox, sorted(names))
        wait_until(lambda: names <= desk.list_work(), WAIT_S, "claimed")
        desk.wait_ended()
        desk.check_alive()
        assert names <= desk.list_work()
        assert desk.count_lines(names) == Counter()
        if dies:
            desk.box.kill("agent")
            desk.box.start("agent")
            desk.check_alive()
        filler.unlink()
        desk.wait_delivered(names)


def test_read_only_inbox_is_told_once_and_served_when_it_may_be_written(
    desk: Desk, disk: Path
) -> None:
    names = desk.names(5)
    # Complete, but too young to be taken, when the disk becomes read-only.
    put_arrays(disk, sorted(names))
    remount(disk, "ro")
    told = desk.count_told("Read-only file system")
    wait_until(lambda: desk.count_told("Read-only file system") > told, WAIT_S, "told")
    desk.check_alive()
    desk.check_alive()
    assert desk.count_told("Read-only file system") == told + 1
    assert list_names(disk) >= names
    remount(disk, "rw")
    desk.wait_delivered(names)


def remount(disk: Path, option: str) -> None:
    run_as_root("mount", "-o", f"remount,{option}", str(disk))
