"""Alembic runs this file. `cook.service.index` passes the connection; there is no command line for it."""

from __future__ import annotations

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection)
with context.begin_transaction():
    context.run_migrations()
