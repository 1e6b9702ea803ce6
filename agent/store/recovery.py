"""A ledger that is damaged: found, moved aside, and what is readable taken over.

Once at start, before the ledger is opened, `prepare_ledger` looks. What it does
is safe against a power cut at any point:

1. rows are saved into `ledger.recovering`; the damaged files are only read;
2. that file is flushed and renamed to `ledger.recovered`;
3. the damaged files go to `ledger.damaged-<UTC time>/`, the ledger first;
4. `ledger.recovered` becomes the ledger.

A start that finds no ledger but a `ledger.recovered` goes on at 3. Before that
everything begins anew. The last three damaged ledgers are kept.

A full disk, a lock, missing permissions and a schema of a newer Edgeward are
not damage: nothing is moved then. Owns the files named here, and nothing else.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent.errors import StorageFullError, StoreError
from agent.fileio import fsync_dir, write_atomic
from agent.store.database import is_damage, migrate, open_engine, translate
from agent.store.pages import Image, count_lost_commits
from agent.store.salvage import Salvage, save_rows

log = logging.getLogger(__name__)

FOLDER_PREFIX = "ledger.damaged-"
REPORT = "recovery.json"
_RECOVERING = "ledger.recovering"
_RECOVERED = "ledger.recovered"
_SUSPECT = "ledger.suspect"
_KEPT_FOLDERS = 3
_BUSY_S = 10.0
# 32 MiB: 0.05–0.1 s here (2 cores, page cache: 400–650 MB/s, 2026-11-22), 0.4 s from an SD card.
CHECK_WHOLE_BYTES = 32 << 20
_SAMPLES = 200
_LISTED = 200
_TWICE = 2
# Place of `mxFrame`, the number of frames in use, in the header of SQLite's index of the log.
_FRAMES_IN_USE_AT = 16
_SMALL_TABLES = ("counters", "facts", "quarantine", "crashes", "alembic_version")
_LARGE_TABLES = ("jobs", "transitions", "outbox")
_SAMPLED = {"jobs": "seq", "outbox": "id"}


@dataclass(frozen=True)
class Recovery:
    """What became of a damaged ledger."""

    at: str
    """UTC, RFC 3339."""
    why: str
    folder: str
    """Where the damaged files are."""
    kept: dict[str, int]
    """Rows in the new ledger, by table."""
    lost_job_count: int
    """Jobs that history, reports or an index name, and whose row is gone."""
    lost_jobs: tuple[str, ...]
    """Ids of the first 200 of them."""
    pages: int
    damaged_pages: tuple[tuple[int, int], ...]
    """First and last of each run of pages that could not be read whole; 200 runs at most."""
    seq: int
    """No number up to this one will come from the new ledger."""
    lean: bool
    """For want of room, inputs and results of ended jobs and heartbeats were left behind."""
    duration_ms: int

    def to_json(self) -> dict[str, Any]:
        """Return it as the event's body and `recovery.json` carry it."""
        return asdict(self)


def claim_ledger(path: Path) -> int:
    """Make this process the only one that may recover and write the ledger.

    Returns:
        A file descriptor; the claim ends when it is closed, or with the process.

    Raises:
        StoreError: another agent has it.
    """
    with _wrapped_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The folder itself: a file of its own could not be made on a full disk.
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(fd)
            msg = f"another agent has the ledger in {path.parent}: stop it, or use another data_dir"
            raise StoreError(msg) from exc
        return fd


def prepare_ledger(
    path: Path, *, is_low: bool = False, on_progress: Callable[[], None] = lambda: None
) -> Recovery | None:
    """Make the ledger fit to be opened; to be called before it is.

    Args:
        path: the ledger; need not exist.
        is_low: the disk is nearly full: of damaged ledgers only the newest is kept.
        on_progress: called now and then while a large ledger is recovered.

    Returns:
        What was done, or None where the ledger is sound or new.

    Raises:
        StorageFullError: there is no room for the new ledger; nothing was changed.
        StoreError: the ledger can't be read for another reason than damage.
    """
    with _wrapped_os_errors(path):
        if not path.exists() and path.with_name(_RECOVERED).exists():
            return _finish(path)
        why = _find_reason(path)
        if why is None:
            return None
        log.critical("the ledger is damaged (%s): saving what can be read", why)
        return recover_ledger(path, why, is_low=is_low, on_progress=on_progress)


def _find_reason(path: Path) -> str | None:
    """Return why the ledger needs recovery, or None."""
    log_file = path.with_name(f"{path.name}-wal")
    logged = log_file.exists() and log_file.stat().st_size > 0
    if not path.exists():
        if logged:
            return "the ledger file is gone, its write-ahead log is left"
        # Without its ledger the index of a log means nothing, and a new one would read it.
        path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
        return None
    if path.with_name(f"{path.name}-journal").exists():
        why = _roll_back_journal(path)
        if why is not None:
            return why
    if path.stat().st_size == 0:
        # SQLite would take it for a new one and delete the log.
        return "the ledger file is empty, its write-ahead log is not" if logged else None
    suspicions = _count_suspicions(path)
    why = verify_ledger(path, whole=suspicions > 0)
    if why is None and suspicions >= _TWICE:
        return "SQLite found it damaged twice while running"
    return why


def _roll_back_journal(path: Path) -> str | None:
    """Let SQLite undo what a rollback journal is of; return why it cannot, or None.

    Only a ledger that a power cut met while it was being made has one: then it has no log yet.
    Read-only, as the ledger is looked at, it could not be opened at all.

    Raises:
        StoreError: it can't be undone for another reason than damage.
    """
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_BUSY_S)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError as exc:
        if is_damage(exc):
            return str(exc)
        raise translate(exc, exc) from exc
    return None


def verify_ledger(path: Path, *, whole: bool = False, timeout_s: float = _BUSY_S) -> str | None:
    """Return why a ledger is damaged, or None; changes nothing.

    A file of up to 32 MiB is read whole; of a larger one the structure, the small
    tables and a sample: `check_whole` is for later. A single flipped bit inside of
    a value is not found here: jobs carry a hash.

    Raises:
        StorageFullError: there is no room for the memory that SQLite shares.
        StoreError: it can't be read for another reason: locked, no permission.
    """
    whole = whole or path.stat().st_size <= CHECK_WHOLE_BYTES
    try:
        with contextlib.ExitStack() as afterwards, _reading(path, timeout_s) as connection:
            accepted = _read_frames_in_use(path, afterwards)
            lost = count_lost_commits(path, accepted)
            if lost >= _TWICE:
                return f"its write-ahead log is damaged: {lost} commits are behind a bad frame"
            if not accepted and _is_cut(path, connection):
                return "the file is shorter than it says"
            return _check(connection) if whole else _check_sample(connection)
    except sqlite3.DatabaseError as exc:
        if is_damage(exc):
            return str(exc)
        raise translate(exc, exc) from exc


def check_whole(path: Path) -> str | None:
    """Read a ledger in use whole, table by table; return why it is damaged, or None.

    For a thread of its own, some time after the start: 400–650 MB/s here, on an
    SD card as fast as that is. The log can't be cut back meanwhile, so it grows.

    Raises:
        StoreError: it can't be read for another reason than damage.
    """
    for table in (*_SMALL_TABLES, *_LARGE_TABLES):
        try:
            # A connection a table: so the log can be cut back in between.
            with _reading(path) as connection:
                why = _check(connection, table)
        except sqlite3.DatabaseError as exc:
            if not is_damage(exc):
                raise translate(exc, exc) from exc
            why = str(exc)
        if why is not None:
            return why
    path.with_name(_SUSPECT).unlink(missing_ok=True)
    return None


def suspect_ledger(path: Path) -> None:
    """Note that SQLite found the ledger damaged while running: the next start reads it whole.

    Found twice without anything to see at the start, it is recovered all the same.
    """
    with contextlib.suppress(OSError), path.with_name(_SUSPECT).open("a") as file:
        file.write(f"{_format_now()}\n")


def _count_suspicions(path: Path) -> int:
    try:
        return len(path.with_name(_SUSPECT).read_text().splitlines())
    except (OSError, UnicodeDecodeError):
        return 0


@contextlib.contextmanager
def _reading(path: Path, timeout_s: float = _BUSY_S) -> Iterator[sqlite3.Connection]:
    # Read-only: the last other connection to close would write the log into a damaged file.
    address = f"{path.absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(address, uri=True, timeout=timeout_s, isolation_level=None)
    try:
        connection.execute("PRAGMA query_only=ON")
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        yield connection
    finally:
        connection.close()


def _read_frames_in_use(path: Path, afterwards: contextlib.ExitStack) -> int:
    """Return how many frames of the log SQLite takes; its index shows it while one reads.

    To close any descriptor of a file ends all locks that this process has on it, SQLite's too:
    another process would then take the index for unused, and cut it under us (SIGBUS).

    Source: https://www.sqlite.org/walformat.html, section 2.1, and
    https://www.sqlite.org/howtocorrupt.html, section 2.2.

    Args:
        path: the ledger.
        afterwards: closed when this process has no connection to the ledger any more.
    """
    try:
        file = afterwards.enter_context(path.with_name(f"{path.name}-shm").open("rb"))
    except FileNotFoundError:
        return 0
    return int.from_bytes(os.pread(file.fileno(), 4, _FRAMES_IN_USE_AT), sys.byteorder)


def _is_cut(path: Path, connection: sqlite3.Connection) -> bool:
    pages, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size")
    )
    return bool(path.stat().st_size < pages * size)


def _check(connection: sqlite3.Connection, table: str = "") -> str | None:
    argument = f"('{table}')" if table else "(1)"
    row = connection.execute(f"PRAGMA quick_check{argument}").fetchone()
    return None if row is None or row[0] == "ok" else str(row[0]).replace("\n", " ")


def _check_sample(connection: sqlite3.Connection) -> str | None:
    for table in _SMALL_TABLES:
        why = _check(connection, table)
        if why is not None:
            return why
    for table, key in _SAMPLED.items():
        first, last = connection.execute(f"SELECT min({key}), max({key}) FROM {table}").fetchone()
        step = max(1, (last or 0) // _SAMPLES)
        query = f"SELECT * FROM {table} WHERE {key} >= ? LIMIT 1"
        for number in range(first or 0, (last or 0) + 1, step):
            connection.execute(query, (number,)).fetchone()
    return None


def recover_ledger(
    path: Path,
    why: str,
    *,
    is_low: bool = False,
    on_progress: Callable[[], None] = lambda: None,
) -> Recovery:
    """Build a new ledger of what can be read, and put it in the damaged one's place.

    Nobody may have the ledger open.

    Raises:
        StorageFullError: there is no room for the new ledger; the damaged one is untouched.
        StoreError: the new ledger can't be written for another reason.
    """
    with _wrapped_os_errors(path):
        started = time.monotonic()
        found, lean = _build(path, on_progress)
        folder = _make_folder(path.parent)
        recovery = Recovery(
            at=_format_now(),
            why=why,
            folder=str(folder),
            kept=found.kept,
            lost_job_count=len(found.lost_jobs),
            lost_jobs=tuple(found.lost_jobs[:_LISTED]),
            pages=found.pages,
            damaged_pages=tuple(_find_runs(found.damaged_pages))[:_LISTED],
            seq=found.seq,
            lean=lean,
            duration_ms=round((time.monotonic() - started) * 1000),
        )
        write_atomic(folder / REPORT, json.dumps(recovery.to_json(), indent=1))
        _switch(path, folder)
        _remove_old_folders(path.parent, 1 if is_low else _KEPT_FOLDERS)
        path.with_name(_SUSPECT).unlink(missing_ok=True)
        return recovery


def _build(path: Path, on_progress: Callable[[], None]) -> tuple[Salvage, bool]:
    """Write `ledger.recovered`; where there is no room for all of it, the lean one."""
    for lean in (False, True):
        try:
            return _write_new(path, on_progress, lean=lean), lean
        except StorageFullError:
            _remove(path.with_name(_RECOVERING))
            if lean:
                raise
            _remove_old_folders(path.parent, 1)
            log.warning("no room to recover the ledger whole: ended jobs go without their data")
    raise AssertionError


def _write_new(path: Path, on_progress: Callable[[], None], *, lean: bool) -> Salvage:
    part = path.with_name(_RECOVERING)
    _remove(part)
    path.with_name(_RECOVERED).unlink(missing_ok=True)
    engine = open_engine(part)
    try:
        migrate(engine)
    finally:
        engine.dispose()
    target = sqlite3.connect(part)
    try:
        # No log and no journal: until its rename the file counts for nothing.
        target.execute("PRAGMA journal_mode=OFF")
        target.execute("PRAGMA synchronous=OFF")
        # 16 MB, for these seconds only: rows come in the order of the old file's pages.
        target.execute("PRAGMA cache_size=-16384")
        with Image(path) as image:
            found = save_rows(image, target, lean=lean, on_progress=on_progress)
    except sqlite3.DatabaseError as exc:
        raise translate(exc, exc) from exc
    finally:
        target.close()
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path.with_name(_RECOVERED))
    fsync_dir(path.parent)
    return found


def _remove(database: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        database.with_name(f"{database.name}{suffix}").unlink(missing_ok=True)


def _make_folder(parent: Path) -> Path:
    """Make this recovery's folder; its name comes after all others, whatever the clock says."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    names = [folder.name for folder in _list_folders(parent)]
    name = f"{FOLDER_PREFIX}{stamp}"
    if names and name <= names[-1]:
        base, _, number = names[-1].removeprefix(FOLDER_PREFIX).partition("-")
        name = f"{FOLDER_PREFIX}{base}-{int(number) + 1 if number.isdigit() else 1:03d}"
    folder = parent / name
    folder.mkdir(mode=0o750)
    return folder


def _switch(path: Path, folder: Path) -> None:
    """Move the damaged files away, the ledger first, and the new ledger into their place."""
    for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
        source = path.with_name(name)
        if source.exists():
            source.replace(folder / name)
            fsync_dir(path.parent)
    fsync_dir(folder)
    path.with_name(_RECOVERED).replace(path)
    fsync_dir(path.parent)


def _finish(path: Path) -> Recovery | None:
    """Complete a recovery that a power cut broke off between its steps 3 and 4."""
    folders = _list_folders(path.parent)
    folder = folders[-1] if folders else _make_folder(path.parent)
    _switch(path, folder)
    try:
        found = json.loads((folder / REPORT).read_text())
        found["lost_jobs"] = tuple(found["lost_jobs"])
        found["damaged_pages"] = tuple((first, last) for first, last in found["damaged_pages"])
        return Recovery(**found)
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("the report of the last recovery, %s, is gone", folder / REPORT)
        return None


def _list_folders(parent: Path) -> list[Path]:
    """Return the damaged ledgers' folders, oldest first."""
    return sorted(path for path in parent.glob(f"{FOLDER_PREFIX}*") if path.is_dir())


def _remove_old_folders(parent: Path, keep: int) -> None:
    for folder in _list_folders(parent)[:-keep]:
        log.warning("removing the damaged ledger in %s: newer ones are kept", folder)
        shutil.rmtree(folder, ignore_errors=True)


def _find_runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _format_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@contextlib.contextmanager
def _wrapped_os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            msg = f"no room to recover the ledger {path}: free space, and it goes on"
            raise StorageFullError(msg) from exc
        msg = f"the ledger {path} cannot be recovered: {exc.strerror or exc}"
        raise StoreError(msg) from exc
