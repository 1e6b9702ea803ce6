"""A full disk stops new work, and costs nothing that was accepted.

Each test has a disk of three megabytes of its own. Where this user may not
mount one, the whole file runs once more in a namespace where he may.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from agent.daemon.storage import BALLAST, Storage
from agent.errors import StorageFullError
from agent.jobs import JobState, Lane, Reason
from agent.store import outbox
from agent.store.database import cut_log, free_room, migrate, open_engine, transaction
from agent.store.ledger import Outcome
from agent.store.recovery import FOLDER_PREFIX, prepare_ledger, verify_ledger
from tests.harness.disks import (
    NoMountError,
    fill_disk,
    has_namespaces,
    measure_free,
    mounted_disk,
)
from tests.harness.ledgers import BusyLedger, read_rows

DISK_BYTES = 3 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The data folder, on a disk of its own."""
    try:
        with mounted_disk(tmp_path / "disk", DISK_BYTES) as folder:
            yield folder
    except NoMountError:
        pytest.skip("may not mount: these run in test_all_of_this_holds_without_root")


def test_all_of_this_holds_without_root(tmp_path: Path) -> None:
    try:
        with mounted_disk(tmp_path / "disk", DISK_BYTES):
            # This user may mount: the other tests run as they are.
            return
    except NoMountError:
        pass
    if not has_namespaces():
        message = "neither mount, nor sudo, nor a user namespace: the full disk is not tested"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    own = ["-p", "no:cacheprovider", "--basetemp", str(tmp_path / "inside")]
    argv = ["unshare", "-rm", sys.executable, "-m", "pytest", "-q", *own]
    done = subprocess.run(
        [*argv, __file__, "-k", "not without_root"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout


def fill_with_jobs(busy: BusyLedger) -> None:
    """Take jobs until the disk is full."""
    with pytest.raises(StorageFullError, match="free space"):
        busy.work(10_000)


def list_ids(busy: BusyLedger) -> set[str]:
    with transaction(busy.engine) as tx:
        return set(tx.execute(text("SELECT job_id FROM jobs")).scalars())


def test_accepted_jobs_stay_and_the_one_too_many_leaves_no_trace(disk: Path) -> None:
    busy = BusyLedger(disk / "ledger.db")
    accepted: set[str] = set()

    def work() -> None:
        while True:
            busy.work(1)
            accepted.update(list_ids(busy))

    with pytest.raises(StorageFullError):
        work()
    after = list_ids(busy)
    assert accepted <= after
    busy.close()
    assert {row[0] for row in read_rows(busy.path, "SELECT job_id FROM jobs")} == after
    assert read_rows(busy.path, "PRAGMA integrity_check") == [("ok",)]
    bare = "SELECT job_id FROM jobs WHERE job_id NOT IN (SELECT job_id FROM transitions)"
    assert read_rows(busy.path, bare) == []


def test_log_stays_small_on_a_small_disk(disk: Path) -> None:
    busy = BusyLedger(disk / "ledger.db")
    fill_with_jobs(busy)
    # With SQLite's 4 MB the log alone would fill this disk, after a seventh of the jobs.
    assert busy.path.with_name("ledger.db-wal").stat().st_size < DISK_BYTES // 4
    assert busy.path.stat().st_size > DISK_BYTES // 2
    busy.close()


def test_acknowledged_records_leave_a_full_disk(disk: Path) -> None:
    storage = Storage(disk, 64 << 20, 8 << 20)
    storage.maintain()
    busy = BusyLedger(disk / "ledger.db")
    fill_with_jobs(busy)
    assert free_room(busy.engine, storage.release)
    for _ in range(20):
        with transaction(busy.engine) as tx:
            taken = outbox.take_unsent(tx, 16, 2**60)
            outbox.delete_acknowledged(tx, [record.seq for record in taken if record.seq])
    busy.close()
    assert read_rows(busy.path, "PRAGMA integrity_check") == [("ok",)]


def start_jobs(busy: BusyLedger) -> list[str]:
    """Leave sixteen jobs running."""
    busy.work(4)
    with transaction(busy.engine) as tx:
        ready = busy.ledger.schedule.find_ready(tx, Lane.INFERENCE, 8)
        busy.ledger.schedule.assign(tx, [("the-task", ready)])
        busy.ledger.record_started(tx, ["the-task"])
    return [job.job_id for job in ready]


def end_jobs(busy: BusyLedger, job_ids: list[str]) -> int:
    """Record a large outcome of each job."""
    result = {"scores": [0.125] * 300}
    with transaction(busy.engine) as tx:
        attempts = {row[0]: row[1] for row in tx.execute(text("SELECT job_id, attempt FROM jobs"))}
        outcomes = [
            Outcome(name, attempts[name], JobState.SUCCEEDED, Reason("ok"), 1, 2, result)
            for name in job_ids
        ]
        return len(busy.ledger.record_outcomes(tx, outcomes))


def test_reserve_makes_room_for_outcomes(disk: Path) -> None:
    storage = Storage(disk, 64 << 20, 8 << 20)
    storage.maintain()
    busy = BusyLedger(disk / "ledger.db")
    running = start_jobs(busy)
    assert running
    cut_log(busy.engine)
    fill_disk(disk)
    with pytest.raises(StorageFullError):
        end_jobs(busy, running)
    assert free_room(busy.engine, storage.release)
    assert end_jobs(busy, running) == len(running)
    busy.close()


def test_agent_starts_on_a_full_disk_with_its_reserve(disk: Path) -> None:
    storage = Storage(disk, 64 << 20, 8 << 20)
    storage.maintain()
    busy = BusyLedger(disk / "ledger.db")
    busy.work(4)
    before = list_ids(busy)
    busy.close()
    fill_disk(disk)
    with pytest.raises(StorageFullError):
        prepare_ledger(busy.path)
    engine = open_engine(busy.path)
    with pytest.raises(StorageFullError):
        migrate(engine)
    assert free_room(engine, storage.release)
    assert prepare_ledger(busy.path) is None
    migrate(engine)
    with transaction(engine) as tx:
        outbox.save_counter(tx, "boot", outbox.read_counter(tx, "boot") + 1)
        assert set(tx.execute(text("SELECT job_id FROM jobs")).scalars()) == before
    engine.dispose()


def test_without_a_reserve_the_start_waits_for_room(disk: Path) -> None:
    busy = BusyLedger(disk / "ledger.db")
    busy.work(4)
    before = list_ids(busy)
    busy.close()
    filler = fill_disk(disk)
    engine = open_engine(busy.path)
    assert not free_room(engine, lambda: False)
    with pytest.raises(StorageFullError):
        migrate(engine)
    filler.unlink()
    migrate(engine)
    engine.dispose()
    assert prepare_ledger(busy.path) is None
    assert {row[0] for row in read_rows(busy.path, "SELECT job_id FROM jobs")} == before


def test_agent_process_says_so_and_ends_for_systemd_to_try_again(disk: Path) -> None:
    fill_disk(disk)
    environment = {**os.environ, "EDGEWARD_MQTT__ENABLED": "false"}
    environment["EDGEWARD_RUN_DIR"] = str(disk.parent)
    argv = [sys.executable, "-m", "console.entry", "agent", "--data-dir", str(disk)]
    done = subprocess.run(
        argv, capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "storage_full" in done.stderr


# --- recovery -------------------------------------------------------------------------------


def make_damaged(disk: Path) -> Path:
    busy = BusyLedger(disk / "ledger.db")
    busy.work(6)
    with transaction(busy.engine) as tx:
        large = "UPDATE jobs SET body = hex(zeroblob(4000)) WHERE ended_ms IS NOT NULL"
        tx.execute(text(large))
        tx.execute(text("DELETE FROM outbox"))
    busy.close()
    with busy.path.open("r+b") as file:
        file.write(bytes(4096))
    return busy.path


def test_recovery_without_room_changes_nothing(disk: Path) -> None:
    path = make_damaged(disk)
    before = path.read_bytes()
    filler = fill_disk(disk, leave_bytes=200_000)
    with pytest.raises(StorageFullError):
        prepare_ledger(path)
    assert path.read_bytes() == before
    assert verify_ledger(path) is not None
    assert list(disk.glob(f"{FOLDER_PREFIX}*")) == []
    assert measure_free(disk) >= 150_000
    filler.unlink()
    recovery = prepare_ledger(path)
    assert recovery is not None
    assert not recovery.lean


def test_recovery_with_little_room_leaves_the_data_of_ended_jobs(disk: Path) -> None:
    path = make_damaged(disk)
    jobs = path.stat().st_size
    fill_disk(disk, leave_bytes=jobs // 2)
    recovery = prepare_ledger(path, is_low=True)
    assert recovery is not None
    assert recovery.lean
    assert recovery.lost_job_count == 0
    assert recovery.kept["jobs"] == 6 * 16
    open_bodies = "SELECT count(*) FROM jobs WHERE ended_ms IS NULL AND body = ''"
    assert read_rows(path, open_bodies) == [(0,)]


# --- watermark and reserve ------------------------------------------------------------------


class Watch:
    """A monotonic clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_watermark_and_reserve_shrink_with_the_disk(disk: Path) -> None:
    storage = Storage(disk, 64 << 20, 8 << 20)
    storage.maintain()
    found = storage.describe()
    assert found["watermark_bytes"] == DISK_BYTES // 10
    assert (disk / BALLAST).stat().st_size == DISK_BYTES // 20
    assert (disk / BALLAST).stat().st_blocks * 512 >= DISK_BYTES // 20
    assert found["ballast"]
    assert not found["low"]


def test_disk_stays_low_until_a_quarter_more_than_the_watermark_is_free(disk: Path) -> None:
    watch = Watch()
    storage = Storage(disk, 200_000, 0, watch)
    filler = fill_disk(disk, leave_bytes=204_000)
    states = []
    for free in (260_000, 196_000, 204_000, 245_000, 260_000, 204_000):
        os.truncate(filler, 0)
        fill_disk(disk, leave_bytes=free)
        watch.now += 2
        states.append(storage.is_low())
    assert states == [False, True, True, True, False, False]


def test_disk_is_asked_once_a_second(disk: Path) -> None:
    watch = Watch()
    storage = Storage(disk, 200_000, 0, watch)
    assert not storage.is_low()
    fill_disk(disk)
    watch.now += 0.9
    assert not storage.is_low()
    watch.now += 0.2
    assert storage.is_low()


def test_reserve_is_freed_once_and_made_again_when_there_is_room(disk: Path) -> None:
    watch = Watch()
    storage = Storage(disk, 200_000, 100_000, watch)
    storage.maintain()
    filler = fill_disk(disk)
    assert measure_free(disk) == 0
    assert storage.release()
    assert measure_free(disk) >= 100_000
    assert storage.is_low()
    assert not storage.release()
    # Not before there is room for it above the watermark: it would be freed again at once.
    os.truncate(filler, 0)
    fill_disk(disk, leave_bytes=340_000)
    watch.now += 2
    storage.maintain()
    assert not storage.describe()["ballast"]
    filler.unlink()
    watch.now += 2
    storage.maintain()
    assert storage.describe()["ballast"]


def test_torn_reserve_is_made_anew(disk: Path) -> None:
    storage = Storage(disk, 200_000, 100_000)
    with (disk / BALLAST).open("wb") as file:
        file.truncate(100_000)
    assert not storage.describe()["ballast"]
    storage.maintain()
    assert storage.describe()["ballast"]


def test_zero_turns_watermark_and_reserve_off(disk: Path) -> None:
    storage = Storage(disk, 0, 0)
    storage.maintain()
    fill_disk(disk)
    assert not storage.is_low()
    assert not storage.release()
    assert not (disk / BALLAST).exists()


def test_folder_that_is_not_there_is_not_low(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "none", 64 << 20, 8 << 20)
    storage.maintain()
    assert not storage.is_low()
    assert storage.describe()["free_bytes"] is None
