"""SQL compiled once, run many times.

The statements of the hot path are written with SQLAlchemy's tables, so that a
renamed column is an error at import, but run as text with tuples: building the
parameters of every row through SQLAlchemy took a third of the agent's time at
2,000 jobs a second (py-spy, 2 cores, 2026-11-22).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ClauseElement, Connection
from sqlalchemy.dialects import sqlite

_DIALECT = sqlite.dialect(paramstyle="qmark")


class Statement:
    """One statement with named parameters.

    Args:
        clause: an insert, update, delete or select. Constants in it stay as they are.
        columns: the columns an insert fills; other rows' keys are ignored.
    """

    def __init__(self, clause: ClauseElement, columns: Sequence[str] | None = None) -> None:
        keys = list(columns) if columns else None
        compiled: Any = clause.compile(dialect=_DIALECT, column_keys=keys)
        self._sql = str(compiled)
        self._names: tuple[str, ...] = tuple(compiled.positiontup)
        # An insert's values all come from the rows; a select has constants of its own.
        self._constants: dict[str, Any] = {} if keys else compiled.params

    def run_many(self, tx: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run once for each row of parameters; does nothing for none."""
        if rows:
            params = [self._tuple(row) for row in rows]
            tx.exec_driver_sql(self._sql, params)

    def fetch(self, tx: Connection, **params: Any) -> list[tuple[Any, ...]]:
        """Run a select and return its rows as plain tuples."""
        cursor: Any = tx.exec_driver_sql(self._sql, self._tuple(params)).cursor
        return list(cursor.fetchall())

    def _tuple(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        constants = self._constants
        if not constants:
            return tuple([row[name] for name in self._names])
        return tuple([row[name] if name in row else constants[name] for name in self._names])
