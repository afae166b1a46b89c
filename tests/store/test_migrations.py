"""The migrated schema is the one the tables describe."""

from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import (  # pyright: ignore[reportMissingTypeStubs]
    compare_metadata,  # pyright: ignore[reportUnknownVariableType]
)
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable

from twinkle_dask.clock import utc_now
from twinkle_dask.errors import StartupError
from twinkle_dask.store.database import Database
from twinkle_dask.store.engines import open_connections
from twinkle_dask.store.records import CheckpointKind, KeyOrigin, UsageKind
from twinkle_dask.store.store import Store, sqlite_url
from twinkle_dask.store.tables import metadata
from twinkle_dask.types import RunId, SamplerId, SessionId, TenantId


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


_TIME = "2026-11-01 12:00:00+00"
_LORA = "rank, seed, alpha, train_attn, train_mlp, train_unembed"
_SHAPE = "8, 1, 32.0, true, true, false"
#: What a server of before stores: two keys, a session with a run, a sampler and a checkpoint, work.
_OLD_ROWS = (
    f"INSERT INTO tenant_keys VALUES ('{'a' * 64}', 'local', 'local', 'aaaa', '{_TIME}')",
    f"INSERT INTO tenant_keys VALUES ('{'b' * 64}', 'tenant-b', 'tenant-b', 'bbbb', '{_TIME}')",
    "INSERT INTO sessions (id, tenant_id, state, tags, user_metadata, created_at, last_seen_at)"
    f" VALUES ('s1', 'local', 'active', '[]', '{{}}', '{_TIME}', '{_TIME}')",
    f"INSERT INTO runs (id, session_id, tenant_id, run_seq, base_model, {_LORA}, user_metadata,"
    " state, created_at, last_request_at, snapshot_seq) VALUES ('s1:train:0', 's1', 'local', 0,"
    f" 'tiny', {_SHAPE}, '{{}}', 'ready', '{_TIME}', '{_TIME}', -1)",
    "INSERT INTO samplers (id, session_id, tenant_id, sampler_seq, base_model, created_at)"
    f" VALUES ('s1:sample:0', 's1', 'local', 0, 'tiny', '{_TIME}')",
    f"INSERT INTO checkpoints (id, tenant_id, run_id, kind, name, path, base_model, {_LORA},"
    " has_optimizer, size_bytes, public, user_metadata, created_at) VALUES ('c', 'local',"
    f" 's1:train:0', 'weights', 'ck', 'checkpoints/c', 'tiny', {_SHAPE}, true, 7, false, '{{}}',"
    f" '{_TIME}')",
    "INSERT INTO operations (ticket_id, tenant_id, kind, run_id, seq, changes_run, payload_bytes,"
    " state, sequence_ids, result_bytes, created_at, payload) VALUES ('t', 'local',"
    f" 'forward_backward', 's1:train:0', 1, true, 0, 'pending', '[]', 0, '{_TIME}', '')",
)


def _as_of_0002(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", "twinkle_dask.store:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "0002")
    for statement in _OLD_ROWS:
        connection.execute(text(statement))


async def test_what_an_older_server_stored_goes_on(database_url: str) -> None:
    connections = open_connections(database_url)
    await connections.write(_as_of_0002)
    await connections.close()
    store = await Store.open(database_url)
    tenant, run = TenantId("local"), RunId("s1:train:0")
    assert [key.origin for key in await store.keys.all()] == [KeyOrigin.START, None]
    assert [one.id for one in await store.sessions.active()] == ["s1"]
    checkpoint = await store.checkpoints.readable(tenant, run, CheckpointKind.TRAINING, "ck")
    assert checkpoint is not None
    assert checkpoint.last_used_at is None
    sampler = SamplerId("s1:sample:0")
    assert await store.samplers.get(tenant, sampler) is not None
    assert await store.samplers.join(sampler) == 1
    (pending,) = await store.journal.pending()
    used = (UsageKind.TRAINING, UsageKind.CHECKPOINT)
    assert await store.journal.finish(
        pending.ticket_id, result=b"", result_bytes=0, when=utc_now(), used=used
    )
    (counted,) = await store.usage.of_session(tenant, SessionId("s1"))  # its tokens are unknown
    assert (counted.kind, counted.key_id, counted.amount) == (UsageKind.CHECKPOINT, 0, 1)
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
