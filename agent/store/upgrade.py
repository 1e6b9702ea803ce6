"""Upgrades a ledger's schema with Alembic; run as `python -m agent.store.upgrade FILE`."""

import sys
from pathlib import Path

from alembic import command
from alembic.config import Config

from agent.store.database import open_engine, transaction

_MIGRATIONS = Path(__file__).parent / "migrations"


def upgrade(path: Path, revision: str = "head") -> None:
    """Bring the ledger at `path` to `revision`, in one transaction.

    Raises:
        StoreError: SQLite failed; the file is as it was.
    """
    engine = open_engine(path)
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    with transaction(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


if __name__ == "__main__":
    upgrade(Path(sys.argv[1]))
