"""The migrated schema is the one the tables describe."""

from pathlib import Path

import pytest
from alembic.autogenerate import (  # pyright: ignore[reportMissingTypeStubs]
    compare_metadata,  # pyright: ignore[reportUnknownVariableType]
)
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from twinkle_dask.errors import StartupError
from twinkle_dask.store.database import Database
from twinkle_dask.store.store import Store, sqlite_url
from twinkle_dask.store.tables import metadata


def _differences(connection: Connection) -> object:
    options = {"compare_type": True, "compare_server_default": True}
    context = MigrationContext.configure(connection, opts=options)
    return compare_metadata(context, metadata)


async def test_the_migrated_schema_is_the_one_of_the_tables(database_url: str) -> None:
    database = await Database.open(database_url)
    assert await database.write(_differences) == []
    await database.close()


async def test_opening_again_changes_nothing(database_url: str) -> None:
    for _ in range(2):
        store = await Store.open(database_url)
        assert await store.sessions.active() == ()
        await store.close()


async def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "records.sqlite3")

    def from_the_future(connection: Connection) -> None:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    database = await Database.open(url)
    await database.write(from_the_future)
    await database.close()
    with pytest.raises(StartupError, match="newer"):
        await Store.open(url)


def test_every_table_can_be_written_for_postgresql() -> None:
    dialect = postgresql.dialect()
    for table in metadata.sorted_tables:
        ddl = str(CreateTable(table).compile(dialect=dialect))
        assert "TIMESTAMP WITH TIME ZONE" in ddl
