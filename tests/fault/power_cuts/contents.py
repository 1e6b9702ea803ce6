"""What a ledger file holds, read by plain SQL and by nothing of the product's.

Used on the live ledger, inside each of its transactions, and on what a power cut
left: the two must agree on every table, whatever tables the schema has.
"""

import hashlib
import sqlite3
from dataclasses import dataclass


@dataclass(frozen=True)
class Contents:
    """What one ledger holds."""

    jobs: dict[str, tuple[str, int]]
    """State and rev by job id."""
    histories: dict[str, list[tuple[int, str]]]
    """Rev and state of each transition, in order, by job id."""
    sent: dict[int, str]
    """Body of each numbered outbox record."""
    seq: int
    """The counter: the highest number given so far."""
    tables: dict[str, str]
    """A digest of each table's rows."""


def digest_tables(connection: sqlite3.Connection) -> dict[str, str]:
    """Return a digest of all rows of each table, SQLite's own included."""
    names = [
        str(name)
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    ]
    return {name: _digest(connection, name) for name in names}


def _digest(connection: sqlite3.Connection, name: str) -> str:
    rows = sorted(repr(row) for row in connection.execute(f'SELECT * FROM "{name}"'))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def read_contents(connection: sqlite3.Connection) -> Contents:
    """Return what the ledger holds.

    Raises:
        sqlite3.Error: it cannot be read.
    """
    histories: dict[str, list[tuple[int, str]]] = {}
    query = "SELECT job_id, rev, state FROM transitions ORDER BY job_id, rev"
    for job_id, rev, state in connection.execute(query):
        histories.setdefault(job_id, []).append((rev, state))
    jobs = connection.execute("SELECT job_id, state, rev FROM jobs")
    sent = connection.execute("SELECT seq, body FROM outbox WHERE seq IS NOT NULL")
    counter = connection.execute("SELECT value FROM counters WHERE name = 'seq'").fetchone()
    return Contents(
        jobs={job_id: (state, rev) for job_id, state, rev in jobs},
        histories=histories,
        sent=dict(sent.fetchall()),
        seq=counter[0] if counter else 0,
        tables=digest_tables(connection),
    )
