"""The SQLite connection: pragmas, transactions, migrations.

The one module that knows how SQLAlchemy must be talked into real SQLite
transactions. By default pysqlite opens a transaction late, so that two writers
that read first lose updates without an error (400 increments gave 114); with
`isolation_level=None` and BEGIN IMMEDIATE from an event they give 400.
Measured: design notes "pitfalls", and tests/integration/test_store.py.

Pragmas and their reasons are in docs/operate.md.
"""

import contextlib
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError
from sqlmodel import SQLModel

from agent.errors import StorageFullError, StoreDamagedError, StoreError
from agent.fileio import make_folders
from agent.store import tables  # noqa: F401 (its classes are the schema)

log = logging.getLogger(__name__)

HEAD_REVISION = "0003"
_BUSY_TIMEOUT_MS = 10_000
# 16 MiB: the WAL is cut back to this after a checkpoint, so a burst does not keep the disk.
_JOURNAL_LIMIT_BYTES = 16 << 20
# SQLite's default of 4 MB. On a full disk what is in the WAL can't get into the file, and nothing
# can be written any more: on a small disk the WAL has to stay small, so that the reserve is enough.
_CHECKPOINT_PAGES = 1000
_CHECKPOINT_PAGES_MIN = 32
_WAL_SHARE = 64
_PAGE_BYTES = 4096
_CUT_BUSY_MS = 500
_SHRINK_BYTES = 16 << 20
"""Less is not worth it: the file grows into its free pages again."""
_SHRINK_BYTES_MAX = 64 << 20
"""More takes too long on a slow card."""
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_UNREADABLE = (
    sqlite3.SQLITE_IOERR_READ,
    sqlite3.SQLITE_IOERR_SHORT_READ,
    sqlite3.SQLITE_IOERR_CORRUPTFS,
    sqlite3.SQLITE_IOERR_DATA,
)


# A flipped bit may leave text that is no UTF-8. Whoever reads it must see that it is damaged, not
# fail: a turn of the writer that fails is tried again, for ever. (A partial of a type: no Python
# frame for each value.)
_READ_TEXT = partial(str, encoding="utf-8", errors="replace")


def _pragmas(synchronous: str, disk_bytes: int) -> tuple[str, ...]:
    log_bytes = max(disk_bytes // _WAL_SHARE, _CHECKPOINT_PAGES_MIN * _PAGE_BYTES)
    return (
        "PRAGMA journal_mode=WAL",
        f"PRAGMA synchronous={synchronous}",
        f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}",
        "PRAGMA foreign_keys=ON",
        "PRAGMA temp_store=MEMORY",
        "PRAGMA cache_size=-512",
        f"PRAGMA journal_size_limit={min(_JOURNAL_LIMIT_BYTES, log_bytes)}",
        f"PRAGMA wal_autocheckpoint={min(_CHECKPOINT_PAGES, log_bytes // _PAGE_BYTES)}",
    )


def open_engine(path: Path, synchronous: str = "FULL") -> Engine:
    """Return an engine on the ledger at `path`, creating the file where it is missing.

    Every transaction is BEGIN IMMEDIATE: this is the writer's engine.
    """
    make_folders(path.parent)
    disk = os.statvfs(path.parent)
    pragmas = _pragmas(synchronous, disk.f_blocks * disk.f_frsize)
    engine = create_engine(
        URL.create("sqlite", database=str(path)), connect_args={"check_same_thread": False}
    )

    @event.listens_for(engine, "connect")
    def _on_connect(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None
        connection.text_factory = _READ_TEXT
        for pragma in pragmas:
            connection.execute(pragma)

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def open_reader(path: Path) -> Engine:
    """Return a read-only engine on an existing ledger, for the command line and checks.

    Raises:
        StoreError: there is no ledger at `path`.
    """
    if not path.is_file():
        msg = f"no ledger at {path}: has the agent run with this data_dir?"
        raise StoreError(msg)
    address = f"{path.absolute().as_uri()}?mode=ro"
    engine = create_engine(
        "sqlite://", creator=lambda: sqlite3.connect(address, uri=True, timeout=10.0)
    )

    @event.listens_for(engine, "connect")
    def _on_connect(connection: sqlite3.Connection, _record: Any) -> None:
        connection.text_factory = _READ_TEXT
        connection.execute("PRAGMA query_only=ON")

    return engine


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Run the block in one transaction; commit at its end, roll back on any error.

    Raises:
        StorageFullError: the disk has no room.
        StoreDamagedError: the file is no database, or a page of it is damaged.
        StoreError: SQLite failed otherwise; trying again may help.
    """
    try:
        with engine.begin() as connection:
            yield connection
    except DatabaseError as exc:
        raise translate(exc.orig, exc) from exc
    except sqlite3.DatabaseError as exc:
        # From a statement of the hot path, which talks to SQLite itself.
        raise translate(exc, exc) from exc


def cut_log(engine: Engine) -> bool:
    """Write the write-ahead log into the file and cut it to nothing; say whether that went.

    Frees room on a full disk: the log holds a page as often as it was changed.
    Waits half a second at most for readers. No transaction may be open.
    """
    try:
        with contextlib.closing(engine.raw_connection()) as connection:
            raw: Any = connection.driver_connection
            raw.execute(f"PRAGMA busy_timeout={_CUT_BUSY_MS}")
            try:
                busy, _, _ = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                raw.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
            return not busy
    except (DatabaseError, sqlite3.DatabaseError) as exc:
        # Among others: there is no room even for the memory that SQLite shares.
        log.warning("the ledger's log could not be cut: %s", exc)
        return False


def shrink(engine: Engine, free_bytes: int | None) -> int:
    """Give the disk back what the file has free inside, where that is much; return the bytes.

    `VACUUM` writes what is live once more, so it is left alone where that is large or where there
    is no room for it. No transaction may be open.

    Args:
        engine: the ledger.
        free_bytes: on its disk; None where that is not known.

    Raises:
        StorageFullError, StoreDamagedError, StoreError: as `transaction`.
    """
    try:
        with contextlib.closing(engine.raw_connection()) as connection:
            raw: Any = connection.driver_connection
            pages, free, size = (
                raw.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_count", "freelist_count", "page_size")
            )
            live_bytes = (pages - free) * size
            if free * size < _SHRINK_BYTES or free < pages // 2 or live_bytes > _SHRINK_BYTES_MAX:
                return 0
            # Once in the log, once in the file.
            if free_bytes is None or free_bytes < 2 * live_bytes + _SHRINK_BYTES:
                return 0
            raw.execute("VACUUM")
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.DatabaseError as exc:
        raise translate(exc, exc) from exc
    return int(free * size)


def free_room(engine: Engine, release: Callable[[], bool]) -> bool:
    """Make room on a full disk: free the reserve, and cut the log; say whether one of them went.

    Args:
        engine: the ledger.
        release: frees the reserve and says whether there was one.
    """
    was_released = release()
    return cut_log(engine) or was_released


def translate(cause: BaseException | None, error: Exception) -> Exception:
    """Return the store's error for one of SQLite's; a defect of ours stays what it is."""
    if isinstance(cause, sqlite3.IntegrityError | sqlite3.ProgrammingError):
        return error
    if is_damage(cause):
        return StoreDamagedError(f"the ledger is damaged: {cause}")
    if is_full(cause):
        return StorageFullError(
            "the disk that holds the ledger is full: free space, and work goes on"
        )
    return StoreError(f"the ledger cannot be written: {cause}")


def is_damage(cause: BaseException | None) -> bool:
    """Say whether SQLite found the file's content broken, or a sector that can't be read."""
    code = getattr(cause, "sqlite_errorcode", 0)
    return code & 0xFF in _DAMAGE or code in _UNREADABLE


def is_full(cause: BaseException | None) -> bool:
    """Say whether SQLite had no room, in the file or for the memory it shares."""
    code = getattr(cause, "sqlite_errorcode", 0)
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)


def migrate(engine: Engine) -> None:
    """Bring the schema to `HEAD_REVISION`; does nothing, quickly, where it is there.

    An empty file gets the tables as they are today, which is quick and needs no
    Alembic; a test proves it equal to all migrations. An older schema is
    upgraded by a child process, so that Alembic's 13 MB do not stay with the agent.

    Raises:
        StoreDamagedError: the file is damaged, or was written by a newer Edgeward.
        StoreError: the upgrade failed.
    """
    with transaction(engine) as connection:
        found = _find_revision(connection)
        if found is None:
            SQLModel.metadata.create_all(connection)
            connection.exec_driver_sql(
                "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"
            )
            connection.exec_driver_sql("INSERT INTO alembic_version VALUES (?)", (HEAD_REVISION,))
            return
    if found == HEAD_REVISION:
        return
    if found > HEAD_REVISION:
        msg = f"the ledger has schema {found}, this Edgeward knows up to {HEAD_REVISION}: update it"
        raise StoreDamagedError(msg)
    _upgrade_in_child(engine)


def _find_revision(connection: Connection) -> str | None:
    known = connection.exec_driver_sql(
        "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
    ).first()
    if known is None:
        return None
    revision = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return str(revision or "0000")


def _upgrade_in_child(engine: Engine) -> None:
    argv = [sys.executable, "-m", "agent.store.upgrade", str(engine.url.database)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        msg = f"the ledger's schema could not be upgraded: {done.stderr.strip()[-500:]}"
        raise StoreError(msg)
    log.info("ledger schema upgraded to %s", HEAD_REVISION)
