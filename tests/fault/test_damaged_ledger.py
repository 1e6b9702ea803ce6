"""A damaged ledger costs the rows on its damaged pages, and nothing else.

What must be lost is counted by SQLite itself (`dbstat` on the sound file), not
by the code that recovers.
"""

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from agent.errors import StoreError
from agent.jobs import Source
from agent.store import recovery
from agent.store.database import migrate, open_engine, transaction
from agent.store.ledger import NewJob
from agent.store.recovery import (
    FOLDER_PREFIX,
    Recovery,
    check_whole,
    claim_ledger,
    prepare_ledger,
    recover_ledger,
    suspect_ledger,
    verify_ledger,
)
from tests.harness.ledgers import FILES, BusyLedger, read_rows

ROUNDS = 12
ENDS = "('succeeded','failed','timed_out','canceled','expired','rejected')"


class Page(NamedTuple):
    """What SQLite says of a page."""

    table: str
    kind: str
    rows: int


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of some hundred jobs, closed cleanly."""
    busy = BusyLedger(tmp_path_factory.mktemp("sound") / "ledger.db")
    busy.work(ROUNDS)
    busy.close()
    return busy.path


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a power cut leaves it: the newest commits are in the write-ahead log."""
    folder = tmp_path_factory.mktemp("torn")
    busy = BusyLedger(folder / "live" / "ledger.db")
    busy.work(ROUNDS // 2)
    busy.close()
    again = BusyLedger(busy.path, seed=2)
    again.work(ROUNDS // 2)
    path = again.copy(folder / "copy")
    again.close()
    assert path.with_name("ledger.db-wal").stat().st_size > 0
    return path


def copy(source: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source.parent, folder)
    return folder / source.name


def read_pages(path: Path) -> dict[int, Page]:
    query = "SELECT pageno, name, pagetype, ncell FROM dbstat"
    try:
        rows = read_rows(path, query)
    except sqlite3.OperationalError:
        pytest.skip("this SQLite has no dbstat to count with")
    return {row[0]: Page(*row[1:]) for row in rows}


def read_ids(path: Path) -> set[str]:
    return {row[0] for row in read_rows(path, "SELECT job_id FROM jobs")}


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def check_usable(path: Path) -> None:
    """Open it as the agent does and use it; compare with the rules of `agent.store.salvage`."""
    assert read_rows(path, "PRAGMA integrity_check") == [("ok",)]
    busy = BusyLedger(path, seed=3)
    busy.work(1, jobs=8)
    busy.close()
    orphans = "SELECT job_id FROM transitions WHERE job_id NOT IN (SELECT job_id FROM jobs)"
    assert read_rows(path, orphans) == []
    bare = (
        "SELECT job_id FROM jobs j WHERE NOT EXISTS (SELECT 1 FROM transitions t"
        " WHERE t.job_id = j.job_id AND t.rev = j.rev AND t.state = j.state)"
    )
    assert read_rows(path, bare) == []
    wrong = f"SELECT job_id FROM jobs WHERE (state IN {ENDS}) != (ended_ms IS NOT NULL)"
    assert read_rows(path, wrong) == []


def check_loss(sound: Path, path: Path, page: Page | None, recovery: Recovery) -> int:
    """Compare the jobs that are gone with what was on the page; return how many."""
    gone = read_ids(sound) - read_ids(path)
    expected = 0
    if page is not None and page.table == "jobs":
        expected = {"leaf": page.rows, "overflow": 1}.get(page.kind, 0)
    assert len(gone) == expected, page
    # What is gone is known by name, so that a person can look for it.
    assert set(recovery.lost_jobs) == gone
    return expected


def damage_each_page(
    sound: Path, folder: Path, make_bytes: Callable[[int], bytes], every: int = 1
) -> tuple[int, int]:
    """Damage one page after the other and recover; return how many jobs were lost, and there."""
    pages = read_pages(sound)
    count = sound.stat().st_size // 4096
    lost = 0
    for number in range(1, count + 1, every):
        path = copy(sound, folder)
        overwrite(path, (number - 1) * 4096, make_bytes(number))
        page = pages.get(number)
        if page is not None and page.kind != "overflow":
            assert verify_ledger(path) is not None, (number, page)
        recovery = recover_ledger(path, "test")
        lost += check_loss(sound, path, page, recovery)
        if number % 24 == 1:
            check_usable(path)
    return lost, len(read_ids(sound))


def test_zeroed_page_costs_its_own_rows_whichever_it_is(sound: Path, tmp_path: Path) -> None:
    lost, jobs = damage_each_page(sound, tmp_path / "box", lambda _: bytes(4096))
    # Each job lies on one page, and a large one on some more.
    large = read_rows(
        sound,
        "SELECT sum(max(0, (length(body) - 400) / 4092 + 1)) FROM jobs WHERE length(body) > 4000",
    )[0][0]
    assert jobs <= lost <= jobs + 2 * large


def test_page_of_garbage_costs_its_own_rows_whichever_it_is(sound: Path, tmp_path: Path) -> None:
    noise = random.Random(5)
    damage_each_page(sound, tmp_path / "box", lambda _: noise.randbytes(4096), every=3)


def test_sound_ledger_is_left_alone(sound: Path, torn: Path, tmp_path: Path) -> None:
    for source in (sound, torn):
        path = copy(source, tmp_path / "box")
        before = path.read_bytes()
        assert prepare_ledger(path) is None
        assert check_whole(path) is None
        assert path.read_bytes() == before


def test_recovering_a_sound_ledger_loses_nothing(sound: Path, torn: Path, tmp_path: Path) -> None:
    for source in (sound, torn):
        path = copy(source, tmp_path / "box")
        reference = copy(source, tmp_path / "reference")
        recovery = recover_ledger(path, "test")
        query = "SELECT * FROM {} ORDER BY 1, 2"
        for table in ("jobs", "transitions", "quarantine", "crashes"):
            expected = read_rows(reference, query.format(table))
            assert read_rows(path, query.format(table)) == expected
        assert recovery.damaged_pages == ()
        assert recovery.lost_job_count == 0
        check_usable(path)


def test_reports_survive_without_their_numbers(sound: Path, tmp_path: Path) -> None:
    path = copy(sound, tmp_path / "box")
    recover_ledger(path, "test")
    lasting = "SELECT id, kind, job_id, body FROM outbox WHERE kind != 'state' ORDER BY id"
    assert read_rows(path, lasting) == read_rows(sound, lasting)
    # Of two states of a job only the newer one is still worth sending.
    newest = "SELECT max(id), job_id FROM outbox WHERE kind = 'state' GROUP BY job_id ORDER BY 1"
    states = "SELECT id, job_id FROM outbox WHERE kind = 'state' ORDER BY id"
    assert read_rows(path, states) == read_rows(sound, newest)
    assert read_rows(path, "SELECT count(*) FROM outbox WHERE seq IS NOT NULL") == [(0,)]


def test_counters_never_go_back(sound: Path, tmp_path: Path) -> None:
    pages = read_pages(sound)
    before = dict(read_rows(sound, "SELECT name, value FROM counters"))
    [place] = [number for number, page in pages.items() if page.table == "counters"]
    for damaged in (place, 1):
        path = copy(sound, tmp_path / "box")
        overwrite(path, (damaged - 1) * 4096, bytes(4096))
        recovery = recover_ledger(path, "test")
        after = dict(read_rows(path, "SELECT name, value FROM counters"))
        assert all(after[name] >= before[name] + 1000 for name in ("seq", "boot", "conn"))
        assert after["seq"] == recovery.seq
        assert "acked" not in after


def test_recovered_ledger_is_another_one(sound: Path, tmp_path: Path) -> None:
    path = copy(sound, tmp_path / "box")
    recover_ledger(path, "test")
    facts = dict(read_rows(path, "SELECT name, value FROM facts"))
    assert "ledger" not in facts
    assert facts["boot_id"] == "boot-1"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_cut_file_keeps_what_is_before_the_cut(sound: Path, tmp_path: Path, share: float) -> None:
    pages = read_pages(sound)
    path = copy(sound, tmp_path / "box")
    size = int(sound.stat().st_size * share) // 512 * 512
    os.truncate(path, size)
    recovery = prepare_ledger(path)
    assert recovery is not None
    whole = size // 4096
    there = sum(
        page.rows
        for number, page in pages.items()
        if (page.table, page.kind) == ("jobs", "leaf") and number <= whole
    )
    # A large job is gone with any of its pages.
    large = read_rows(sound, "SELECT count(*) FROM jobs WHERE length(body) > 4000")[0][0]
    assert there - large <= len(read_ids(path)) <= there
    check_usable(path)


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, bytes(100)),
        (0, b"not a database"),
        (16, b"\xff" * 8),
        (32, b"\xff" * 8),
        (100, bytes(64)),
    ],
    ids=["zeros", "text", "page size", "free list", "schema"],
)
def test_damaged_header_costs_no_job(sound: Path, tmp_path: Path, offset: int, data: bytes) -> None:
    path = copy(sound, tmp_path / "box")
    overwrite(path, offset, data)
    recovery = prepare_ledger(path)
    assert recovery is not None
    assert read_ids(path) == read_ids(sound)
    check_usable(path)


def test_first_pages_may_all_be_lost(sound: Path, tmp_path: Path) -> None:
    pages = read_pages(sound)
    path = copy(sound, tmp_path / "box")
    overwrite(path, 0, bytes(16 * 4096))
    assert prepare_ledger(path) is not None
    on_them = sum(
        page.rows
        for number, page in pages.items()
        if number <= 16 and page.table == "jobs" and page.kind == "leaf"
    )
    assert len(read_ids(sound)) - len(read_ids(path)) == on_them
    check_usable(path)


@pytest.mark.parametrize("seed", range(8))
def test_several_damaged_pages_cost_their_rows(sound: Path, tmp_path: Path, seed: int) -> None:
    pages = read_pages(sound)
    path = copy(sound, tmp_path / "box")
    dice = random.Random(seed)
    count = sound.stat().st_size // 4096
    chosen = dice.sample(range(1, count + 1), count // 5)
    for number in chosen:
        overwrite(path, (number - 1) * 4096, dice.randbytes(4096))
    recovery = prepare_ledger(path)
    assert recovery is not None
    on_them = sum(
        pages[number].rows if pages[number].kind == "leaf" else 1
        for number in chosen
        if number in pages and pages[number].table == "jobs" and pages[number].kind != "internal"
    )
    assert len(read_ids(sound)) - len(read_ids(path)) <= on_them
    check_usable(path)


def test_log_with_a_damaged_frame_costs_that_frame(torn: Path, tmp_path: Path) -> None:
    reference = copy(torn, tmp_path / "reference")
    jobs = read_ids(reference)
    log_size = torn.with_name("ledger.db-wal").stat().st_size
    frames = (log_size - 32) // 4120
    for frame in range(0, frames - 40, max(1, frames // 6)):
        path = copy(torn, tmp_path / "box")
        overwrite(path.with_name("ledger.db-wal"), 32 + frame * 4120 + 24, os.urandom(4096))
        assert "behind a bad frame" in str(verify_ledger(path))
        assert prepare_ledger(path) is not None
        # An older copy of that page is in the log or in the file: at most a page of new rows goes.
        assert len(jobs - read_ids(path)) <= 16
        check_usable(path)


def test_log_with_a_damaged_header_costs_nothing(torn: Path, tmp_path: Path) -> None:
    jobs = read_ids(copy(torn, tmp_path / "reference"))
    path = copy(torn, tmp_path / "box")
    overwrite(path.with_name("ledger.db-wal"), 0, bytes(32))
    assert prepare_ledger(path) is not None
    assert read_ids(path) == jobs
    check_usable(path)


def test_transaction_torn_by_a_power_cut_is_no_damage(torn: Path, tmp_path: Path) -> None:
    path = copy(torn, tmp_path / "box")
    log_file = path.with_name("ledger.db-wal")
    size = log_file.stat().st_size
    overwrite(log_file, size - 4096, bytes(4096))
    assert verify_ledger(path) is None


def test_file_that_is_no_database_makes_room_for_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_text("somebody wrote this here" * 1000)
    recovery = prepare_ledger(path)
    assert recovery is not None
    assert (Path(recovery.folder) / "ledger.db").read_text().startswith("somebody")
    assert read_ids(path) == set()
    # Nothing is left of the counters: the time is more than any of them has reached.
    counters = dict(read_rows(path, "SELECT name, value FROM counters"))
    assert all(counters[name] > 1_700_000_000 for name in ("seq", "boot", "conn"))
    check_usable(path)


@pytest.mark.parametrize("is_there", [True, False], ids=["empty", "deleted"])
def test_log_alone_gives_what_it_holds(torn: Path, tmp_path: Path, is_there: bool) -> None:
    path = copy(torn, tmp_path / "box")
    path.unlink()
    if is_there:
        path.touch()
    assert prepare_ledger(path) is not None
    newest = read_rows(
        copy(torn, tmp_path / "reference"), "SELECT job_id FROM jobs ORDER BY seq DESC LIMIT 50"
    )
    assert {row[0] for row in newest} <= read_ids(path)
    check_usable(path)


def test_deleted_ledger_begins_anew(sound: Path, tmp_path: Path) -> None:
    path = copy(sound, tmp_path / "box")
    path.unlink()
    path.with_name("ledger.db-shm").write_bytes(b"\1" * 32768)
    assert prepare_ledger(path) is None
    check_usable(path)


def damage(sound: Path, folder: Path) -> Path:
    path = copy(sound, folder)
    overwrite(path, 0, bytes(4096))
    return path


def list_folders(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{FOLDER_PREFIX}*"))


def test_damaged_file_is_kept_with_a_report(sound: Path, tmp_path: Path) -> None:
    path = damage(sound, tmp_path / "box")
    before = path.read_bytes()
    recovery = prepare_ledger(path)
    assert recovery is not None
    [folder] = list_folders(path)
    assert (folder / "ledger.db").read_bytes() == before
    assert (folder / "recovery.json").is_file()
    assert recovery.kept["jobs"] == len(read_ids(sound))
    rest = {item.name for item in path.parent.iterdir()} - {folder.name}
    assert rest <= {"ledger.db", "ledger.db-wal", "ledger.db-shm"}


@pytest.mark.parametrize("moved", range(4))
def test_power_cut_while_files_are_moved_is_made_good(
    sound: Path, tmp_path: Path, moved: int
) -> None:
    path = damage(sound, tmp_path / "box")
    for suffix in FILES[1:]:
        path.with_name(f"ledger.db{suffix}").write_bytes(b"stale" * 1000)
    recovery = recover_ledger(path, "test")
    folder = Path(recovery.folder)
    # Back to the moment after `moved` of the three files were moved.
    path.rename(path.with_name("ledger.recovered"))
    for suffix in FILES[moved:]:
        (folder / f"ledger.db{suffix}").rename(path.with_name(f"ledger.db{suffix}"))
    again = prepare_ledger(path)
    assert again is not None
    assert read_ids(path) == read_ids(sound)
    assert not path.with_name("ledger.db-wal").exists()
    assert not path.with_name("ledger.recovered").exists()
    if moved:
        assert again == recovery


def test_rest_of_a_recovery_that_was_cut_off_is_no_ledger(sound: Path, tmp_path: Path) -> None:
    path = damage(sound, tmp_path / "box")
    for name in ("ledger.recovering", "ledger.recovering-wal", "ledger.recovered"):
        path.with_name(name).write_bytes(b"half" * 1000)
    assert prepare_ledger(path) is not None
    assert read_ids(path) == read_ids(sound)


def test_three_damaged_ledgers_are_kept_and_one_where_room_is_short(
    sound: Path, tmp_path: Path
) -> None:
    path = copy(sound, tmp_path / "box")
    for expected in (1, 2, 3, 3):
        overwrite(path, 0, bytes(4096))
        assert prepare_ledger(path) is not None
        assert len(list_folders(path)) == expected
    overwrite(path, 0, bytes(4096))
    assert prepare_ledger(path, is_low=True) is not None
    assert len(list_folders(path)) == 1
    assert read_ids(path) == read_ids(sound)


def test_clock_that_went_back_costs_no_damaged_ledger_its_place(
    sound: Path, tmp_path: Path
) -> None:
    path = damage(sound, tmp_path / "box")
    for name in ("20990101T000000Z", "20990101T000000Z-001", "20990101T000001Z"):
        (path.parent / f"{FOLDER_PREFIX}{name}").mkdir()
    recovery = prepare_ledger(path)
    assert recovery is not None
    assert Path(recovery.folder) == list_folders(path)[-1]
    assert (Path(recovery.folder) / "ledger.db").is_file()
    assert len(list_folders(path)) == 3


def test_older_page_never_brings_an_ended_job_back(sound: Path, tmp_path: Path) -> None:
    path = copy(sound, tmp_path / "box")
    [(job_id, rev)] = read_rows(
        path, "SELECT job_id, rev FROM jobs WHERE state = 'succeeded' ORDER BY seq LIMIT 1"
    )
    connection = sqlite3.connect(path)
    with connection:
        # As a page from before the job's end shows it.
        connection.execute(
            "UPDATE jobs SET state = 'queued', rev = 1, ended_ms = NULL WHERE job_id = ?", (job_id,)
        )
    connection.close()
    recover_ledger(path, "test")
    query = f"SELECT state, rev, ended_ms IS NULL FROM jobs WHERE job_id = '{job_id}'"
    assert read_rows(path, query) == [("succeeded", rev, 0)]


def test_ledger_of_the_first_schema_is_recovered_by_its_own_columns(
    sound: Path, tmp_path: Path
) -> None:
    path = copy(sound, tmp_path / "box")
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("DROP INDEX ix_jobs_dedupe")
        for column in ("progress", "options", "dedupe_key"):
            connection.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
        connection.execute("ALTER TABLE jobs ADD COLUMN forgotten TEXT")
        connection.execute("UPDATE jobs SET forgotten = 'x'")
    connection.close()
    recover_ledger(path, "test")
    query = "SELECT job_id, state, body, result FROM jobs ORDER BY seq"
    assert read_rows(path, query) == read_rows(sound, query)


def test_newer_schema_lock_and_permissions_are_no_damage(sound: Path, tmp_path: Path) -> None:
    path = copy(sound, tmp_path / "box")
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.execute("PRAGMA journal_mode=DELETE")
    assert prepare_ledger(path) is None
    connection.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="locked"):
        verify_ledger(path, timeout_s=0.05)
    connection.rollback()
    connection.close()
    assert list_folders(path) == []


def test_ledger_suspected_twice_is_recovered(sound: Path, tmp_path: Path) -> None:
    path = copy(sound, tmp_path / "box")
    suspect_ledger(path)
    assert prepare_ledger(path) is None
    suspect_ledger(path)
    recovery = prepare_ledger(path)
    assert recovery is not None
    assert read_ids(path) == read_ids(sound)
    assert prepare_ledger(path) is None


def test_whole_check_clears_a_suspicion_and_finds_damage(sound: Path, tmp_path: Path) -> None:
    pages = read_pages(sound)
    path = copy(sound, tmp_path / "box")
    suspect_ledger(path)
    assert check_whole(path) is None
    suspect_ledger(path)
    assert prepare_ledger(path) is None
    place = max(n for n, page in pages.items() if (page.table, page.kind) == ("jobs", "leaf"))
    overwrite(path, (place - 1) * 4096, bytes(4096))
    assert check_whole(path) is not None


def test_job_with_a_flipped_bit_is_kept_for_its_hash_to_tell(sound: Path, tmp_path: Path) -> None:
    path = copy(sound, tmp_path / "box")
    at = path.read_bytes().index(b'"input":"xxx') + 10
    overwrite(path, at, b"\xf8")
    recover_ledger(path, "test")
    assert read_ids(path) == read_ids(sound)
    assert read_rows(path, "SELECT count(*) FROM jobs WHERE body LIKE '%\ufffd%'") == [(1,)]


def test_check_of_the_ledger_at_start_keeps_its_locks_against_other_readers(
    torn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A start once read SQLite's index of the log and closed it, and with that gave up every lock:
    # a command line that looked at the same time then cut the index under the check, which found
    # damage where there was none, or ended with SIGBUS.
    path = copy(torn, tmp_path)
    check = recovery._check
    codes = []

    def try_lock(connection: sqlite3.Connection, table: str = "") -> str | None:
        # The byte of the index that every connection locks, and that one must have alone to cut it.
        take = (
            "import fcntl, sys; file = open(sys.argv[1], 'r+b');"
            "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 128)"
        )
        index = path.with_name(f"{path.name}-shm")
        done = subprocess.run([sys.executable, "-c", take, str(index)], capture_output=True)
        codes.append((done.returncode, b"BlockingIOError" in done.stderr))
        return check(connection, table)

    monkeypatch.setattr(recovery, "_check", try_lock)

    assert recovery.verify_ledger(path) is None
    assert codes == [(1, True)]


def test_second_agent_on_a_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "box" / "ledger.db"
    claim = claim_ledger(path)
    with pytest.raises(StoreError, match="another agent"):
        claim_ledger(path)
    os.close(claim)
    os.close(claim_ledger(path))


def test_new_jobs_meet_the_saved_ones(sound: Path, tmp_path: Path) -> None:
    path = damage(sound, tmp_path / "box")
    assert prepare_ledger(path) is not None
    busy = BusyLedger(path, seed=9)
    [(job_id, body, hashed)] = read_rows(sound, "SELECT job_id, body, body_hash FROM jobs LIMIT 1")
    with transaction(busy.engine) as tx:
        accepted = busy.ledger.accept(tx, [NewJob(job_id, Source.MQTT, body, hashed, "infer")])
    assert accepted.verdicts == ["duplicate"]
    busy.close()


def test_migrating_a_recovered_ledger_does_nothing(sound: Path, tmp_path: Path) -> None:
    path = damage(sound, tmp_path / "box")
    prepare_ledger(path)
    engine = open_engine(path)
    migrate(engine)
    engine.dispose()
    assert read_ids(path) == read_ids(sound)
