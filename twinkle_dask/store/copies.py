"""Copies of checkpoints: a run that was never trained, with the files of another one."""

from enum import StrEnum

from sqlalchemy import Connection, or_, select

from twinkle_dask.clock import utc_now
from twinkle_dask.store.database import Database, insert_new
from twinkle_dask.store.records import CheckpointRecord, RunRecord, SessionRecord
from twinkle_dask.store.rows import to_row
from twinkle_dask.store.tables import checkpoints, runs, sessions


class Copied(StrEnum):
    """What became of a copy."""

    DONE = "done"
    TAKEN = "taken"  # the run's place in its session, or the session's idempotency key
    SOURCE_GONE = "source_gone"


class Copies:
    """Adds them, whole or not at all."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(
        self,
        copy: CheckpointRecord,
        run: RunRecord,
        session: SessionRecord | None,
        *,
        source: str,
    ) -> Copied:
        """Store a copy with the run that holds it, and with that run's session if it is new.

        Args:
            copy: Its ``path`` is the source's.
            run: Whose copy it will be.
            session: None if the run's session exists.
            source: Id of the checkpoint that is copied; its files stay as long as one of both is
                there.
        """

        def work(connection: Connection) -> Copied:
            # One write, since the last checkpoint of a folder may be on its way out.
            table = checkpoints.c
            alive = or_(table.expires_at.is_(None), table.expires_at > utc_now())
            there = select(table.id).where(table.id == source, alive)
            if connection.execute(there).first() is None:
                return Copied.SOURCE_GONE
            if session is not None and not insert_new(connection, sessions, to_row(session)):
                return Copied.TAKEN
            if not insert_new(connection, runs, to_row(run)):
                return Copied.TAKEN
            insert_new(connection, checkpoints, to_row(copy))
            return Copied.DONE

        return await self._database.write(work)
