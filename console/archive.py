"""The durable console's own file: what it was asked for, and all that devices reported.

Owns one SQLite file: jobs with their commands and newest state, events, what is known of
each device, and the numbers of the records that are in here. Several processes may use it
at once: `edgeward console listen` writes what it hears, `console submit` what is asked.

Invariant: what a device said and the number it said it under are committed together, so
what is acknowledged is here, and what is here is acknowledged.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine

from agent.clock import SystemClock
from agent.commands import encode, new_id
from agent.jobs import JobState
from agent.store.database import open_engine, transaction
from console.errors import ConsoleStoreError, JobNotFoundError
from console.mirror import Change, DeviceMirror, DeviceView, JobView
from console.numbering import Numbering
from console.store_schema import claim_schema
from console.submission import Command

SCHEMA = 1
_TABLES = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE devices (
        device TEXT PRIMARY KEY, state TEXT, boot INTEGER NOT NULL, conn INTEGER NOT NULL,
        ledger TEXT, info TEXT, reported TEXT, heartbeat TEXT, heard_ms INTEGER NOT NULL
    ) WITHOUT ROWID""",
    """CREATE TABLE numbers (
        device TEXT NOT NULL, ledger TEXT NOT NULL, spans TEXT NOT NULL,
        PRIMARY KEY (device, ledger)
    ) WITHOUT ROWID""",
    """CREATE TABLE jobs (
        id INTEGER PRIMARY KEY, device TEXT NOT NULL, job_id TEXT NOT NULL, shown TEXT,
        command TEXT, cancel TEXT, asked_ms INTEGER, state TEXT, rev INTEGER NOT NULL DEFAULT 0,
        attempt INTEGER NOT NULL DEFAULT 0, reason TEXT, result TEXT, progress TEXT,
        reported_ms INTEGER, received_ms INTEGER, heard_ms INTEGER,
        is_stale INTEGER NOT NULL DEFAULT 0, has_doubtful_rev INTEGER NOT NULL DEFAULT 0,
        is_open INTEGER NOT NULL DEFAULT 1, UNIQUE (device, job_id)
    )""",
    "CREATE INDEX ix_jobs_open ON jobs (device) WHERE is_open = 1",
    """CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, kind TEXT NOT NULL,
        ledger TEXT, seq INTEGER, at TEXT, received_ms INTEGER NOT NULL, body TEXT NOT NULL
    )""",
    """CREATE TABLE requests (
        id INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, job_id TEXT NOT NULL
    )""",
)
_SAVE_JOB = """
    INSERT INTO jobs (device, job_id, state, rev, attempt, reason, result, progress, reported_ms,
                      received_ms, heard_ms, is_stale, has_doubtful_rev, is_open)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (device, job_id) DO UPDATE SET
        state = excluded.state, rev = excluded.rev, attempt = excluded.attempt,
        reason = excluded.reason, result = COALESCE(excluded.result, result),
        progress = excluded.progress, reported_ms = excluded.reported_ms,
        received_ms = excluded.received_ms, heard_ms = excluded.heard_ms,
        is_stale = excluded.is_stale, has_doubtful_rev = excluded.has_doubtful_rev,
        is_open = excluded.is_open"""
_FOUND = """job_id, state, rev, attempt, reason, result IS NOT NULL AS has_result, reported_ms,
            received_ms, is_stale, has_doubtful_rev, progress, command, cancel, shown"""
_EVENTS = ("event", "ledger", "lost", "unreadable")
_IS_THERE: dict[str, Any] = {"kept": True}
"""Stands for a result that is in the file: nobody needs it in memory."""

Row = dict[str, Any]


class Archive:
    """One file. Every method is one transaction; close it when done.

    Args:
        path: the file; made where it is missing.

    Raises:
        ConsoleStoreError: it is another program's file, or a newer version's.
        StoreError: SQLite cannot do what was asked.
    """

    def __init__(self, path: Path) -> None:
        self._engine: Engine = open_engine(path)
        with transaction(self._engine) as tx:
            _prepare(tx, path)
            self.client_id: str = tx.exec_driver_sql(
                "SELECT value FROM facts WHERE name = 'client_id'"
            ).scalar_one()

    def close(self) -> None:
        """Let go of the file."""
        self._engine.dispose()

    # --- what people ask for --------------------------------------------------------------

    def add_commands(self, device: str, commands: Sequence[Command]) -> None:
        """Keep jobs that are to be submitted."""
        now_ms = SystemClock().wall_ms()
        with transaction(self._engine) as tx:
            for item in commands:
                tx.exec_driver_sql(
                    "INSERT INTO jobs (device, job_id, shown, command, asked_ms) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (device, item.job_id, item.shown, item.payload, now_ms),
                )
                _request(tx, device, item.job_id)

    def add_cancel(self, command: Command) -> str:
        """Keep a cancel that is to be sent, and return the job's device.

        Raises:
            JobNotFoundError: no such job is in here.
        """
        device = self.get_job(command.job_id)["device"]
        with transaction(self._engine) as tx:
            tx.exec_driver_sql(
                "UPDATE jobs SET cancel = ? WHERE device = ? AND job_id = ?",
                (command.payload, device, command.job_id),
            )
            _request(tx, device, command.job_id)
        return str(device)

    def clear_requests(self) -> None:
        """Forget what was asked for: whoever listens begins with all open jobs."""
        with transaction(self._engine) as tx:
            tx.exec_driver_sql("DELETE FROM requests")

    def read_requests(self, after: int) -> list[Row]:
        """Return jobs that were asked for since request number `after`: `request` is its number."""
        return self._read(
            """SELECT requests.id AS request, device, job_id, command, cancel, shown
               FROM requests JOIN jobs USING (device, job_id)
               WHERE requests.id > ? AND is_open = 1 ORDER BY requests.id LIMIT 1000""",
            (after,),
        )

    # --- what devices say -----------------------------------------------------------------

    def save(self, changes: Sequence[Change], mirrors: Iterable[DeviceMirror]) -> None:
        """Keep what was heard, with the numbers it came under, in one transaction.

        Raises:
            StoreError: it could not be written; nothing of it is kept.
        """
        known = {mirror.topics.device: mirror for mirror in mirrors}
        changed = [mirror for mirror in known.values() if mirror.is_changed]
        if not (changes or changed):
            return
        now_ms = SystemClock().wall_ms()
        with transaction(self._engine) as tx:
            for change in changes:
                if change.kind == "ledger":
                    _begin_anew(tx, change.device)
            _save_many(tx, _SAVE_JOB, _list_jobs(changes, known, now_ms))
            _save_many(
                tx,
                "INSERT INTO events (device, kind, ledger, seq, at, received_ms, body) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                [_event_row(change, now_ms) for change in changes if change.kind in _EVENTS],
            )
            for mirror in changed:
                _save_device(tx, mirror, now_ms)

    def restore(self, mirror: DeviceMirror, now_s: float) -> None:
        """Give a mirror what is kept of its device: numbers, open jobs and their commands."""
        device = mirror.topics.device
        with transaction(self._engine) as tx:
            view = _read_device(tx, device)
            numbers = tx.exec_driver_sql(
                "SELECT ledger, spans FROM numbers WHERE device = ?", (device,)
            ).all()
            query = f"SELECT {_FOUND} FROM jobs WHERE device = ? AND is_open = 1 ORDER BY id"
            rows = tx.exec_driver_sql(query, (device,)).mappings().all()
        numberings = {ledger or None: Numbering.from_text(spans) for ledger, spans in numbers}
        jobs = [_to_view(row, now_s) for row in rows]
        mirror.restore(view, numberings if view is not None else None, jobs)
        for row in rows:
            put_command(mirror, row, now_s)

    def find_jobs(self, wanted: Mapping[str, set[str]]) -> dict[str, list[JobView]]:
        """Return what is kept of these jobs, given and returned by device; results are left out."""
        query = f"""SELECT {_FOUND} FROM jobs WHERE device = ?
            AND job_id IN (SELECT value FROM json_each(?))"""
        with transaction(self._engine) as tx:
            return {
                device: [
                    _to_view(row, 0.0)
                    for row in tx.exec_driver_sql(query, (device, encode(sorted(ids)))).mappings()
                ]
                for device, ids in wanted.items()
            }

    def list_known_devices(self) -> list[str]:
        """Return the ids of all devices that are named in here."""
        query = "SELECT device FROM devices UNION SELECT device FROM jobs WHERE is_open = 1"
        return [row["device"] for row in self._read(query)]

    # --- what people look at --------------------------------------------------------------

    def list_devices(self) -> list[Row]:
        """Return the devices with their status, and how many of their jobs are open."""
        return self._read(
            """SELECT devices.*, (SELECT count(*) FROM jobs
                   WHERE jobs.device = devices.device AND is_open = 1) AS open_jobs,
               numbers.spans FROM devices
               LEFT JOIN numbers ON numbers.device = devices.device
                   AND numbers.ledger = COALESCE(devices.ledger, '')
               ORDER BY devices.device"""
        )

    def list_jobs(
        self, device: str | None = None, state: str | None = None, limit: int = 20
    ) -> list[Row]:
        """Return jobs, newest first; `state` `unseen` is those that no device has answered."""
        return self._read(
            """SELECT * FROM jobs WHERE (:device IS NULL OR device = :device)
               AND (:state IS NULL OR COALESCE(state, 'unseen') = :state)
               ORDER BY id DESC LIMIT :limit""",
            {"device": device, "state": state, "limit": limit},
        )

    def get_job(self, job_id: str) -> Row:
        """Return everything about one job.

        Raises:
            JobNotFoundError: no such job is in here.
        """
        rows = self._read("SELECT * FROM jobs WHERE job_id = ?", (job_id,))
        if not rows:
            msg = f"no job {job_id!r} in this console's store; `edgeward console jobs` lists them"
            raise JobNotFoundError(msg)
        return rows[0]

    def list_events(
        self, device: str | None = None, name: str | None = None, limit: int = 20
    ) -> list[Row]:
        """Return events, newest first."""
        return self._read(
            """SELECT * FROM events WHERE (:device IS NULL OR device = :device)
               AND (:name IS NULL OR kind = :name) ORDER BY id DESC LIMIT :limit""",
            {"device": device, "name": name, "limit": limit},
        )

    def _read(self, query: str, params: Any = ()) -> list[Row]:
        with transaction(self._engine) as tx:
            return [dict(row) for row in tx.exec_driver_sql(query, params).mappings()]


@contextmanager
def open_archive(path: Path, *, create: bool = False) -> Iterator[Archive]:
    """Open a console's file and close it again.

    Raises:
        ConsoleStoreError: it is missing (without `create`), another program's, or a newer
            version's.
        StoreError: SQLite cannot do what was asked.
    """
    if not (create or path.is_file()):
        msg = f"no console store at {path}: name it with --store, or begin with `console listen`"
        raise ConsoleStoreError(msg)
    archive = Archive(path)
    try:
        yield archive
    finally:
        archive.close()


def put_command(mirror: DeviceMirror, row: Mapping[Any, Any], now_s: float) -> None:
    """Let a mirror send what was asked for one job."""
    if row["command"] is not None:
        mirror.submit(Command(row["job_id"], row["command"], row["shown"] or ""), now_s)
    if row["cancel"] is not None:
        mirror.cancel(Command(row["job_id"], row["cancel"]), now_s)


def _prepare(tx: Connection, path: Path) -> None:
    if not claim_schema(tx, path, SCHEMA, "name another one with --store"):
        return
    for statement in _TABLES:
        tx.exec_driver_sql(statement)
    tx.exec_driver_sql(
        "INSERT INTO facts VALUES ('client_id', ?)", (f"edgeward-console-{new_id()}",)
    )
    tx.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")


def _request(tx: Connection, device: str, job_id: str) -> None:
    tx.exec_driver_sql("INSERT INTO requests (device, job_id) VALUES (?, ?)", (device, job_id))


def _save_many(tx: Connection, statement: str, rows: list[tuple[Any, ...]]) -> None:
    if rows:
        tx.exec_driver_sql(statement, rows)


def _begin_anew(tx: Connection, device: str) -> None:
    """Let the states of a device's new ledger count, also after a restart of this console."""
    tx.exec_driver_sql(
        "UPDATE jobs SET rev = 0, has_doubtful_rev = 1 WHERE device = ? AND is_open = 1 "
        "AND reported_ms IS NULL",
        (device,),
    )


def _list_jobs(
    changes: Sequence[Change], mirrors: Mapping[str, DeviceMirror], now_ms: int
) -> list[tuple[Any, ...]]:
    """Return the rows of all jobs that changed, as they are now."""
    results = {
        (change.device, change.job.job_id): encode(change.body)
        for change in changes
        if change.kind == "result" and change.job is not None
    }
    touched = {(change.device, change.job.job_id): change.job for change in changes if change.job}
    rows = []
    for (device, job_id), told in touched.items():
        job = mirrors[device].jobs.get(job_id, told) if device in mirrors else told
        rows.append(
            (
                device,
                job_id,
                job.state and job.state.value,
                job.rev,
                job.attempt,
                _encode(job.reason),
                results.get((device, job_id)),
                _encode(job.progress),
                job.reported_ms,
                job.received_ms,
                now_ms,
                job.is_stale,
                job.has_doubtful_rev,
                not job.is_complete,
            )
        )
    return rows


def _event_row(change: Change, now_ms: int) -> tuple[Any, ...]:
    kind = change.name if change.kind == "event" else change.kind
    body = encode(change.body)
    return (change.device, kind, change.ledger, change.seq, change.at, now_ms, body)


def _save_device(tx: Connection, mirror: DeviceMirror, now_ms: int) -> None:
    device, view = mirror.topics.device, mirror.device
    documents = [_encode(item) for item in (view.info, view.reported, view.heartbeat)]
    tx.exec_driver_sql(
        "INSERT OR REPLACE INTO devices VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (device, view.state, view.boot, view.conn, view.ledger, *documents, now_ms),
    )
    _save_many(
        tx,
        "INSERT OR REPLACE INTO numbers VALUES (?, ?, ?)",
        [(device, key or "", item.to_text()) for key, item in mirror.numberings.items()],
    )
    if None not in mirror.numberings:
        tx.exec_driver_sql("DELETE FROM numbers WHERE device = ? AND ledger = ''", (device,))


def _read_device(tx: Connection, device: str) -> DeviceView | None:
    row = tx.exec_driver_sql("SELECT * FROM devices WHERE device = ?", (device,)).mappings().first()
    if row is None:
        return None
    return DeviceView(
        row["state"],
        row["boot"],
        row["conn"],
        row["ledger"],
        _decode(row["info"]),
        _decode(row["reported"]),
        _decode(row["heartbeat"]),
    )


def _to_view(row: Mapping[Any, Any], now_s: float) -> JobView:
    return JobView(
        row["job_id"],
        JobState(row["state"]) if row["state"] else None,
        row["rev"],
        row["attempt"],
        _decode(row["reason"]),
        _IS_THERE if row["has_result"] else None,
        _decode(row["progress"]),
        row["reported_ms"],
        row["received_ms"],
        now_s,
        bool(row["is_stale"]),
        bool(row["has_doubtful_rev"]),
    )


def _encode(value: Row | None) -> str | None:
    return None if value is None else encode(value)


def _decode(text: str | None) -> Row | None:
    return None if text is None else dict(json.loads(text))
