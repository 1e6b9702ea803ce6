"""Facts about this ledger: who it is, and the boot it was last used in.

All functions run inside the caller's transaction.
"""

from sqlalchemy import Connection, select
from sqlalchemy.dialects.sqlite import insert as upsert
from ulid import ULID

from agent.store.tables import Fact

_FACTS = Fact.__table__  # type: ignore[attr-defined]

LEDGER = "ledger"
BOOT_ID = "boot_id"
CONSOLE_ACKS = "console_acks"
FLOORS = "floors"
"""Below which time and versions no release metadata is taken, JSON; for maintenance workers."""


def read_fact(tx: Connection, name: str) -> str | None:
    """Return a fact, or None where it was never saved."""
    value = tx.execute(select(_FACTS.c.value).where(_FACTS.c.name == name)).scalar()
    return None if value is None else str(value)


def save_fact(tx: Connection, name: str, value: str) -> None:
    """Save a fact."""
    statement = upsert(_FACTS).values(name=name, value=value)
    tx.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"value": value}))


def ensure_identity(tx: Connection) -> str:
    """Return the ledger's own id, making it for a new file.

    Consoles tell by it that a ledger was lost and another one has begun: numbers
    of records and revisions of jobs start anew.
    """
    known = read_fact(tx, LEDGER)
    if known is None:
        known = str(ULID())
        save_fact(tx, LEDGER, known)
    return known
