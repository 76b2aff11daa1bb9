"""Alembic's entry: runs migrations on the connection that fleet.database gives, in its transaction."""

from __future__ import annotations

from alembic import context

from fleet.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transaction_per_migration=False,
    render_as_batch=True,
)
context.run_migrations()
