"""Small facts in the store that outlive the process. Runs inside the caller's transaction."""

from sqlalchemy import Connection, select
from sqlalchemy.dialects.sqlite import insert as upsert

from agent.store.tables import Fact

_FACTS = Fact.__table__  # type: ignore[attr-defined]


def find_fact(tx: Connection, name: str) -> str | None:
    """Return a fact, or None where it was never saved."""
    value = tx.execute(select(_FACTS.c.value).where(_FACTS.c.name == name)).scalar()
    return None if value is None else str(value)


def save_fact(tx: Connection, name: str, value: str) -> None:
    """Save a fact."""
    statement = upsert(_FACTS).values(name=name, value=value)
    tx.execute(statement.on_conflict_do_update(index_elements=["name"], set_={"value": value}))
