"""Saves rows of a damaged ledger into a new one.

Every page is read by itself (`agent.store.pages`) and its records are told apart
by their shape: the number and types of their columns. So no page is lost with
another: neither with the first page, nor with the schema, nor with the inner
pages of a tree. What a row meant before is checked before it counts.

Where several versions of a row are found (a freed page still shows its old
content), the newest counts: of a job the highest `rev`, and the history in
`transitions` has the last word. Rules afterwards:

- a job has the transition of its present `rev`;
- a transition has its job; a report may outlive it;
- reports have no number: the next publish gives them new ones;
- counters only go up, by a step that covers what was lost of them;
- the new ledger has no identity yet: `agent.store.facts` gives it a new one.

Raises only what the new file raises.
"""

import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sqlalchemy import Column, Float, Integer, Table
from sqlmodel import SQLModel
from ulid import ULID

from agent.jobs import ENDS, JobState, Lane, Source
from agent.store.facts import LEDGER
from agent.store.outbox import Rank
from agent.store.pages import TABLE_LEAF, Entry, Image, Value

_COUNTER_STEP = 1000
_ULID = re.compile("[0-7][0-9A-HJKMNP-TV-Z]{25}")
_AT_ONCE = 500
_BEAT = 10_000
_NAME_LENGTH = 64
_SCHEMA_COLUMNS = 5
_NEVER_BACK = ("seq", "boot", "conn")
_STATES, _LANES, _SOURCES = (frozenset(kind) for kind in (JobState, Lane, Source))
_RANKS = frozenset(Rank)

Row = dict[str, Value]


@dataclass
class Salvage:
    """What was found, and what was not."""

    kept: dict[str, int] = field(default_factory=dict)
    """Rows in the new ledger, by table."""
    lost_jobs: list[str] = field(default_factory=list)
    """Ids of jobs that history, reports or an index name, without their row."""
    seq: int = 0
    """The last number on the wire, and a step more for what was lost."""
    pages: int = 0
    damaged_pages: list[int] = field(default_factory=list)


def save_rows(
    image: Image,
    target: sqlite3.Connection,
    *,
    lean: bool = False,
    on_progress: Callable[[], None] = lambda: None,
) -> Salvage:
    """Write every row that can be read into `target`, and make them agree; commits.

    Args:
        image: the damaged ledger.
        target: the new ledger, its tables made and empty.
        lean: leave out the inputs and results of ended jobs, and telemetry, to save room.
        on_progress: called every 10,000 records or so: some seconds on a small box.

    Raises:
        sqlite3.Error: the new ledger could not be written.
    """
    found = Salvage(pages=image.page_count)
    free = image.find_free_pages()
    with target:
        target.execute("CREATE TEMP TABLE seen (job_id TEXT PRIMARY KEY) WITHOUT ROWID")
        rows = _Rows(target, _find_shapes(image, free), lean=lean)
        used: set[int] = set()
        for number, entry in enumerate(image.scan(free, used, found.damaged_pages)):
            rows.add(entry)
            if number % _BEAT == 0:
                on_progress()
        rows.flush()
        found.damaged_pages = [page for page in found.damaged_pages if page not in used]
        _follow_history(target)
        _complete_history(target)
        found.seq = _raise_counters(target, rows.last_seq, rows.newest_id)
        found.lost_jobs = _find_lost(target)
        found.kept = {
            name: int(target.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0])
            for name in _TABLES
        }
    return found


_TABLES: Mapping[str, Table] = SQLModel.metadata.tables


@dataclass(frozen=True)
class _Shape:
    """How the records of one table look on disk, column by column."""

    table: str
    columns: tuple[Column[Any] | None, ...]
    """In the order on disk; None for a column that is no more."""
    is_index: bool

    def fits(self, kind: int, types: tuple[type, ...]) -> bool:
        """Say whether a record with values of these types can be a row of this table."""
        if (kind != TABLE_LEAF) != self.is_index or len(types) > len(self.columns):
            return False
        # A column that was added by a migration is missing from records older than it. Not so
        # among indexes, where there are shorter records that look alike.
        if self.is_index and len(types) < len(self.columns):
            return False
        rest = [column for column in self.columns[len(types) :] if column is not None]
        return all(map(_is_of_type, self.columns, types)) and all(
            column.nullable or _find_default(column) is not None for column in rest
        )

    def build(self, entry: Entry) -> Row:
        """Return a record that fits as a row."""
        row = {**self._defaults, **dict(zip(self._names, entry.values, strict=False))}
        row.pop("", None)
        if self._rowid is not None:
            row[self._rowid] = entry.rowid
        return row

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple("" if column is None else column.name for column in self.columns)

    @cached_property
    def _defaults(self) -> Row:
        return {column.name: _find_default(column) for column in _TABLES[self.table].columns}

    @cached_property
    def _rowid(self) -> str | None:
        names = [column.name for column in _TABLES[self.table].columns if _is_rowid(column)]
        return names[0] if names else None


def _is_rowid(column: Column[Any]) -> bool:
    key = column.table.primary_key.columns
    return column.primary_key and len(key) == 1 and isinstance(column.type, Integer)


def _find_default(column: Column[Any]) -> Value:
    default = column.default
    return default.arg if default is not None and default.is_scalar else None  # type: ignore[attr-defined]


def _is_of_type(column: Column[Any] | None, kind: type) -> bool:
    if column is None:
        return True
    if kind is type(None):
        return bool(column.nullable) or _is_rowid(column)
    if isinstance(column.type, Float):
        return kind in (int, float)
    return kind is (int if column.type.python_type in (int, bool) else str)


def _find_shapes(image: Image, free: set[int]) -> list[_Shape]:
    """Return the shape of each table: as its own schema says where that is left, else ours."""
    texts = dict(_find_schema(image, free))
    shapes = []
    for name, table in _TABLES.items():
        columns: Sequence[Column[Any] | None] = list(table.columns)
        if name in texts:
            columns = [table.columns.get(column) for column in _list_columns(name, texts[name])]
        is_index = not table.dialect_options["sqlite"]["with_rowid"]
        shapes.append(_Shape(name, tuple(columns or table.columns), is_index))
    # The more columns, the surer the match.
    return sorted(shapes, key=lambda shape: -len(shape.columns))


def _find_schema(image: Image, free: set[int]) -> Iterator[tuple[str, str]]:
    for entry in image.scan(free, set(), [], b"CREATE TABLE"):
        values = entry.values
        if len(values) == _SCHEMA_COLUMNS and values[0] == "table" and values[1] in _TABLES:
            yield str(values[1]), str(values[4])


def _list_columns(name: str, text: str) -> list[str]:
    """Return a table's columns by its CREATE statement; none where that is damaged."""
    scratch = sqlite3.connect(":memory:")
    try:
        scratch.execute(text)
        return [str(row[1]) for row in scratch.execute(f'PRAGMA table_info("{name}")')]
    except sqlite3.Error:
        return []
    finally:
        scratch.close()


class _Rows:
    """Puts records where they belong in the new ledger."""

    def __init__(self, target: sqlite3.Connection, shapes: list[_Shape], *, lean: bool) -> None:
        self._target = target
        self._shapes = shapes
        self._lean = lean
        self._inserts = {name: _build_insert(table) for name, table in _TABLES.items()}
        self._known: dict[tuple[bool, tuple[type, ...]], list[_Shape]] = {}
        self._waiting: dict[str, list[tuple[Value, ...]]] = {}
        self.last_seq = 0
        """Highest number on the wire that a record shows."""
        self.newest_id = ""
        """Newest id of a console's job."""

    def add(self, entry: Entry) -> None:
        """Write one record, if it is of a table that we know and makes sense."""
        values = entry.values
        types = tuple(map(type, values))
        key = entry.kind == TABLE_LEAF, types
        shapes = self._known.get(key)
        if shapes is None:
            shapes = [shape for shape in self._shapes if shape.fits(entry.kind, types)]
            self._known[key] = shapes
        for shape in shapes:
            if shape.table == "counters" and values[0] in _TABLES:
                self._keep_sequence(str(values[0]), _int(values[1]))
                return
            row = shape.build(entry)
            if _CHECKS.get(shape.table, _is_named)(row):
                self._insert(shape.table, row)
                return
        if not key[0] and types[:1] == (str,):
            self._note_id(values[0])

    def _keep_sequence(self, table: str, value: int) -> None:
        """Take over SQLite's own count of a table's row ids."""
        changed = self._target.execute(
            "UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = ?", (value, table)
        )
        if not changed.rowcount:
            self._target.execute("INSERT INTO sqlite_sequence VALUES (?, ?)", (table, value))

    def _note_id(self, value: Value) -> None:
        if _is_id(value):
            self._write_later("INSERT OR IGNORE INTO seen VALUES (?)", (value,))

    def _insert(self, table: str, row: Row) -> None:
        if "job_id" in row:
            self._note_id(row["job_id"])
        if table == "jobs":
            self._insert_job(row)
            return
        if table == "outbox":
            self.last_seq = max(self.last_seq, _int(row["seq"]))
            row["seq"] = None
            if self._lean and row["rank"] == Rank.TELEMETRY:
                return
        elif table == "facts" and row["name"] == LEDGER:
            return
        self._write_later(self._inserts[table], tuple(row.values()))

    def _insert_job(self, row: Row) -> None:
        if row["source"] == Source.MQTT:
            self.newest_id = max(self.newest_id, str(row["job_id"]))
        if self._lean and row["ended_ms"] is not None:
            row.update(body="", result=None, progress=None)
        try:
            self._target.execute(self._inserts["jobs"], tuple(row.values()))
        except sqlite3.IntegrityError:
            # Its place in the order is taken: two jobs claim it, and both are kept.
            row["seq"] = None
            self._target.execute(self._inserts["jobs"], tuple(row.values()))

    def _write_later(self, text: str, values: tuple[Value, ...]) -> None:
        waiting = self._waiting.setdefault(text, [])
        waiting.append(values)
        if len(waiting) >= _AT_ONCE:
            self._target.executemany(text, waiting)
            waiting.clear()

    def flush(self) -> None:
        """Write what waits for company."""
        for text, waiting in self._waiting.items():
            self._target.executemany(text, waiting)
            waiting.clear()


def _int(value: Value) -> int:
    return value if isinstance(value, int) else 0


def _is_named(row: Row) -> bool:
    """Say whether the row's first column can be a name, as ours are."""
    first = next(iter(row.values()))
    return not isinstance(first, str) or (
        0 < len(first) <= _NAME_LENGTH and first.isascii() and first.isprintable()
    )


def _is_id(value: Value) -> bool:
    return isinstance(value, str) and _ULID.fullmatch(value) is not None


_CHECKS = {
    "jobs": lambda row: (
        _is_id(row["job_id"])
        and row["state"] in _STATES
        and row["lane"] in _LANES
        and row["source"] in _SOURCES
        and _int(row["rev"]) > 0
        and (row["state"] in ENDS) == (row["ended_ms"] is not None)
    ),
    "transitions": lambda row: _is_id(row["job_id"]) and row["state"] in _STATES,
    "outbox": lambda row: row["rank"] in _RANKS and "/" in str(row["topic"]),
}


def _build_insert(table: Table) -> str:
    """Return the statement that keeps the newer of two versions of a row."""
    names = [column.name for column in table.columns]
    marks = ", ".join("?" * len(names))
    changed = ", ".join(f"{name} = excluded.{name}" for name in names)
    target = f'INTO "{table.name}" ({", ".join(names)}) VALUES ({marks})'
    if table.name == "jobs":
        return (
            f"INSERT {target} ON CONFLICT (job_id) DO UPDATE SET {changed}"
            " WHERE excluded.rev > jobs.rev"
        )
    if table.name == "outbox":
        pending = " ".join(
            f"ON CONFLICT (job_id) WHERE kind = '{kind}' AND seq IS NULL"
            f" DO UPDATE SET {changed} WHERE excluded.id > outbox.id"
            for kind in ("state", "progress")
        )
        return f"INSERT {target} {pending} ON CONFLICT DO NOTHING"
    if table.name == "counters":
        return (
            f"INSERT {target} ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)"
        )
    return f"INSERT OR IGNORE {target}"


def _follow_history(target: sqlite3.Connection) -> None:
    """Bring jobs of which only an older version was left to what their history says."""
    behind = target.execute(
        "SELECT j.job_id, t.rev, t.state, t.at_ms, t.attempt, t.reason_code FROM jobs j"
        " JOIN transitions t USING (job_id) WHERE t.rev > j.rev"
        " AND t.rev = (SELECT max(rev) FROM transitions n WHERE n.job_id = j.job_id)"
    ).fetchall()
    for job_id, rev, state, at_ms, attempt, code in behind:
        target.execute(
            "UPDATE jobs SET rev = ?, state = ?, ended_ms = ?, attempt = max(attempt, ?),"
            " reason_code = ?, reason = NULL, task_id = ? WHERE job_id = ?",
            (
                rev,
                state,
                at_ms if state in ENDS else None,
                attempt,
                code,
                # A task that nobody has: it is found lost, and the job is tried again.
                str(ULID()) if state == JobState.RUNNING else None,
                job_id,
            ),
        )


def _complete_history(target: sqlite3.Connection) -> None:
    target.execute(
        "INSERT OR IGNORE INTO transitions (job_id, rev, state, at_ms, attempt, reason_code)"
        " SELECT job_id, rev, state, coalesce(ended_ms, started_ms, created_ms), attempt,"
        " reason_code FROM jobs"
    )
    target.execute("DELETE FROM transitions WHERE job_id NOT IN (SELECT job_id FROM jobs)")


def _raise_counters(target: sqlite3.Connection, last_seq: int, newest_id: str) -> int:
    known = dict(target.execute("SELECT name, value FROM counters").fetchall())
    made_ms = ULID.from_str(newest_id).milliseconds if newest_id else 0
    wanted = {"newest_id_ms": max(known.get("newest_id_ms", 0), made_ms)}
    now_s = int(time.time())
    for name in _NEVER_BACK:
        last = max(known.get(name, 0), last_seq if name == "seq" else 0)
        # With nothing left of it, seconds since 1970 are more than any counter has reached.
        wanted[name] = last + _COUNTER_STEP if last else now_s
    # What was acknowledged was acknowledged to the ledger that is no more.
    target.execute("DELETE FROM counters WHERE name = 'acked'")
    target.executemany("INSERT OR REPLACE INTO counters VALUES (?, ?)", wanted.items())
    return int(wanted["seq"])


def _find_lost(target: sqlite3.Connection) -> list[str]:
    query = "SELECT job_id FROM seen WHERE job_id NOT IN (SELECT job_id FROM jobs) ORDER BY job_id"
    return [str(row[0]) for row in target.execute(query)]
