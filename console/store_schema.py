"""The schema of a console's own SQLite file: fresh, known, newer, or another program's."""

from pathlib import Path

from sqlalchemy import Connection

from console.errors import ConsoleStoreError


def claim_schema(tx: Connection, path: Path, schema: int, advice: str) -> bool:
    """Say whether the file is empty, so that its tables are to be made.

    Args:
        tx: a transaction on it.
        path: for the message.
        schema: the one that this version writes; the caller sets it as `user_version`.
        advice: what to do where it is another program's file.

    Raises:
        ConsoleStoreError: it is another program's, or a newer version's.
    """
    found = tx.exec_driver_sql("PRAGMA user_version").scalar_one()
    if found == schema:
        return False
    if found > schema:
        msg = f"{path} was written by a newer Edgeward (schema {found}): update it"
        raise ConsoleStoreError(msg)
    if tx.exec_driver_sql("SELECT 1 FROM sqlite_master LIMIT 1").first() is not None:
        msg = f"{path} is another program's file: {advice}"
        raise ConsoleStoreError(msg)
    return True
