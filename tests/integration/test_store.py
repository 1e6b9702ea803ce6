"""The SQLite connection: real transactions, migrations, damage."""

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy import inspect, text

from agent.errors import StorageFullError, StoreDamagedError, StoreError
from agent.store.database import (
    HEAD_REVISION,
    migrate,
    open_engine,
    open_reader,
    shrink,
    transaction,
)

INCREMENTS, THREADS = 100, 4


def read_schema(path: Path) -> dict[str, str]:
    """Return every table and index as SQLite describes its columns, whatever its SQL's spelling."""
    with sqlite3.connect(path) as connection:
        names = connection.execute(
            "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"
        ).fetchall()
        described = {}
        for kind, name, table, sql in names:
            pragma = "table_xinfo" if kind == "table" else "index_xinfo"
            rows = connection.execute(f"SELECT * FROM pragma_{pragma}(?)", (name,)).fetchall()
            where = (sql or "").partition(" WHERE ")[2].replace('"', "")
            flags = ("AUTOINCREMENT" in sql.upper(), "WITHOUT ROWID" in sql.upper())
            described[name] = f"{kind} {table} {rows} {where} {flags}"
    connection.close()
    return described


def test_fresh_schema_is_what_all_migrations_make(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "fresh.db")
    migrate(engine)
    engine.dispose()
    subprocess.run(
        [sys.executable, "-m", "agent.store.upgrade", str(tmp_path / "migrated.db")], check=True
    )
    fresh, migrated = read_schema(tmp_path / "fresh.db"), read_schema(tmp_path / "migrated.db")
    del fresh["alembic_version"], migrated["alembic_version"]
    assert fresh == migrated


def test_head_is_the_newest_migration(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "ledger.db")
    subprocess.run(
        [sys.executable, "-m", "agent.store.upgrade", str(tmp_path / "ledger.db")], check=True
    )
    with transaction(engine) as tx:
        assert tx.execute(text("SELECT version_num FROM alembic_version")).scalar() == HEAD_REVISION
    engine.dispose()


def test_migrating_twice_changes_nothing(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "ledger.db")
    migrate(engine)
    migrate(engine)
    assert "jobs" in inspect(engine).get_table_names()
    engine.dispose()


def test_ledger_of_a_newer_edgeward_is_refused(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "ledger.db")
    migrate(engine)
    with transaction(engine) as tx:
        tx.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreDamagedError, match="update it"):
        migrate(engine)
    engine.dispose()


def test_concurrent_increments_lose_no_update(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "ledger.db")
    migrate(engine)
    with transaction(engine) as tx:
        tx.execute(text("INSERT INTO counters VALUES ('n', 0)"))

    def increment() -> None:
        for _ in range(INCREMENTS):
            with transaction(engine) as tx:
                value = tx.execute(text("SELECT value FROM counters")).scalar_one()
                tx.execute(text("UPDATE counters SET value = :v"), {"v": value + 1})

    threads = [threading.Thread(target=increment) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with transaction(engine) as tx:
        assert tx.execute(text("SELECT value FROM counters")).scalar() == INCREMENTS * THREADS
    engine.dispose()


def test_writer_flushes_every_commit_and_waits_for_locks(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "ledger.db")
    with transaction(engine) as tx:
        found = {
            name: tx.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
        }
    assert found == {
        "journal_mode": "wal",
        "synchronous": 2,
        "busy_timeout": 10_000,
        "foreign_keys": 1,
    }
    engine.dispose()


def test_reader_cannot_write(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "ledger.db")
    migrate(engine)
    reader = open_reader(tmp_path / "ledger.db")
    with pytest.raises(StoreError, match="cannot be written"), transaction(reader) as tx:
        tx.execute(text("DELETE FROM jobs"))
    reader.dispose()
    engine.dispose()


def test_reader_names_a_missing_ledger(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no ledger"):
        open_reader(tmp_path / "none.db")


@pytest.mark.parametrize("name", ["a b", "a?b", "a#b", "a%20b", "ä"])
def test_folder_names_may_hold_any_character(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "ledger.db"
    engine = open_engine(path)
    migrate(engine)
    reader = open_reader(path)
    with reader.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM jobs")).scalar() == 0
    reader.dispose()
    engine.dispose()
    assert path.is_file()


def test_full_disk_is_told_from_other_errors(tmp_path: Path) -> None:
    engine = open_engine(tmp_path / "ledger.db")
    migrate(engine)
    with transaction(engine) as tx:
        pages = tx.execute(text("PRAGMA page_count")).scalar_one()
        tx.execute(text(f"PRAGMA max_page_count = {pages + 2}"))
    with pytest.raises(StorageFullError, match="free space"), transaction(engine) as tx:
        tx.execute(text("INSERT INTO counters VALUES (:v, 1)"), {"v": "x" * 100_000})
    with transaction(engine) as tx:
        assert tx.execute(text("SELECT count(*) FROM counters")).scalar() == 0
    engine.dispose()


def test_file_that_is_no_database_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"not a database, not at all" * 100)
    engine = open_engine(path)
    with pytest.raises(StoreDamagedError, match="damaged"):
        migrate(engine)
    engine.dispose()


def fill_and_empty(path: Path, size_bytes: int, *, kept_bytes: int = 0) -> None:
    """Make a ledger that once held much more than it does."""
    engine = open_engine(path)
    with transaction(engine) as tx:
        tx.execute(text("CREATE TABLE blobs (kind TEXT, data BLOB)"))
        insert = text("INSERT INTO blobs VALUES (:kind, zeroblob(:n))")
        if kept_bytes:
            tx.execute(insert, {"kind": "kept", "n": kept_bytes})
        tx.execute(insert, {"kind": "old", "n": size_bytes})
    with transaction(engine) as tx:
        tx.execute(text("DELETE FROM blobs WHERE kind = 'old'"))
    engine.dispose()


def test_ledger_that_is_mostly_empty_gives_the_disk_its_room_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    fill_and_empty(path, 40 << 20, kept_bytes=1 << 20)
    engine = open_engine(path)
    assert shrink(engine, free_bytes=1 << 30) >= 39 << 20
    with transaction(engine) as tx:
        assert tx.execute(text("SELECT length(data) FROM blobs")).scalars().all() == [1 << 20]
    engine.dispose()
    assert path.stat().st_size < 3 << 20


@pytest.mark.parametrize(
    ("old", "kept", "free"),
    [
        (8 << 20, 0, 1 << 30),  # not worth it
        (40 << 20, 60 << 20, 1 << 30),  # less than half of it is free
        (40 << 20, 1 << 20, 10 << 20),  # no room to write it once more
        (40 << 20, 1 << 20, None),
    ],
)
def test_ledger_is_left_as_it_is_where_shrinking_does_not_pay(
    tmp_path: Path, old: int, kept: int, free: int | None
) -> None:
    fill_and_empty(tmp_path / "ledger.db", old, kept_bytes=kept)
    engine = open_engine(tmp_path / "ledger.db")
    assert shrink(engine, free) == 0
    engine.dispose()
