"""SQL compiled once, run many times.

The statements of the hot path are written with SQLAlchemy's tables, so that a
renamed column is an error at import, but run as text: building the parameters
of every row through SQLAlchemy took a third of the agent's time at 2,000 jobs
a second (py-spy, 2 cores, 2026-11-22).

Rows are written by the chunk, as one statement with a list of VALUES.
`executemany` gives up and takes back the interpreter's lock for every row, and
with busy threads beside it waits for that lock every time; a chunk does so once.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import ClauseElement, ColumnElement, Connection, TableClause, column, table
from sqlalchemy.dialects import sqlite

_DIALECT = sqlite.dialect(paramstyle="qmark")
_ROWS = "r"
# Few and small, so that SQLite keeps each text prepared: with 64 rows it was slower and
# the prepared programs took more memory.
_CHUNKS = (16, 4, 1)


def _raw(tx: Connection) -> sqlite3.Connection:
    """Return SQLite's own connection; the transaction on it is `tx`'s, and so is its end."""
    connection: sqlite3.Connection = tx.connection.driver_connection  # type: ignore[assignment]
    return connection


class Statement:
    """One statement with named parameters.

    Args:
        clause: a select, or another statement run with one set of parameters.
    """

    def __init__(self, clause: ClauseElement) -> None:
        compiled: Any = clause.compile(dialect=_DIALECT)
        self._sql = str(compiled)
        self._names: tuple[str, ...] = tuple(compiled.positiontup)
        self._constants: Mapping[str, Any] = compiled.params

    def fetch(self, tx: Connection, **params: Any) -> list[tuple[Any, ...]]:
        """Run a select and return its rows as plain tuples."""
        rows: list[tuple[Any, ...]] = _raw(tx).execute(self._sql, self._bind(params)).fetchall()
        return rows

    def run(self, tx: Connection, **params: Any) -> None:
        """Run a statement that changes rows."""
        _raw(tx).execute(self._sql, self._bind(params))

    def _bind(self, params: Mapping[str, Any]) -> tuple[Any, ...]:
        constants = self._constants
        return tuple([params[n] if n in params else constants[n] for n in self._names])


class Bulk:
    """One statement that writes any number of rows, a chunk at a time.

    Args:
        names: keys of the rows.
        build: makes the statement from the table of rows and its columns by name.
    """

    def __init__(
        self,
        names: Sequence[str],
        build: Callable[[TableClause, Mapping[str, ColumnElement[Any]]], ClauseElement],
    ) -> None:
        self._names = tuple(names)
        rows = table(_ROWS, *(column(name) for name in names))
        compiled: Any = build(rows, dict(rows.c.items())).compile(dialect=_DIALECT)
        # The rows' values come first in the text; there may be no others.
        assert not compiled.positiontup, "a bulk statement has no parameters but its rows"
        group = f"({', '.join('?' * len(self._names))})"
        self._texts = {
            size: f"WITH {_ROWS}({', '.join(self._names)}) AS "
            f"(VALUES {', '.join([group] * size)}) {compiled}"
            for size in _CHUNKS
        }

    def run(self, tx: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows; does nothing for none."""
        names, connection = self._names, _raw(tx)
        start = 0
        while start < len(rows):
            size = next(size for size in _CHUNKS if size <= len(rows) - start)
            chunk = rows[start : start + size]
            values = tuple([row[name] for row in chunk for name in names])
            connection.execute(self._texts[size], values)
            start += size
