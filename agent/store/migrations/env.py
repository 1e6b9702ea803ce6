"""Alembic's environment: runs on the connection that `agent.store.database` hands over."""

from alembic import context
from sqlmodel import SQLModel

from agent.store import tables

assert tables  # the import fills SQLModel.metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
context.run_migrations()
