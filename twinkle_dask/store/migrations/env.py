"""Alembic's entry: run revisions on the connection that ``migrate.migrate`` hands over."""

from alembic import context

from twinkle_dask.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
