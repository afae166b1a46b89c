"""How statements reach the database: one writing connection, a few reading ones.

Everything above hands over plain functions of a SQLAlchemy ``Connection``. For SQLite they run on
threads of ours, a whole transaction to a visit: a driver that visits a thread for every statement
took 1.6 ms more of a core for two operations. For PostgreSQL they run on asyncpg in the event loop.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

T = TypeVar("T")

#: Statements to run on a connection, and what they gave. They change nothing but the database.
Work: TypeAlias = Callable[[Connection], T]

_PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=NORMAL",
    "PRAGMA foreign_keys=ON",
    "PRAGMA busy_timeout=5000",  # milliseconds; only tools beside the server can make us wait
)
_READERS = 4


class Connections(Protocol):
    """The connections to one database. What fails rises as SQLAlchemy raises it."""

    async def write(self, work: Work[T]) -> T:
        """Run ``work`` in a transaction. One call at a time."""
        ...

    async def read(self, work: Work[T]) -> T:
        """Run ``work`` without a transaction, beside others."""
        ...

    async def close(self) -> None:
        """Close all of them. Repeating it is harmless."""
        ...


def connect(where: URL) -> Connections:
    """Choose by the kind of the database; connects at the first use."""
    if where.get_backend_name() == "sqlite":
        return SqliteConnections(where)
    return AsyncConnections(where)


class SqliteConnections:
    """A SQLite file, on one thread for writing and a few for reading.

    WAL mode with ``synchronous=NORMAL``: a commit survives the death of any process and costs no
    fsync; a power cut may take the last moments, but never the consistency.
    """

    def __init__(self, where: URL) -> None:
        self._writing = create_engine(where, pool_size=1, max_overflow=0)
        self._reading = create_engine(
            where,
            pool_size=_READERS,
            max_overflow=0,
            isolation_level="AUTOCOMMIT",  # a read is one statement; saves BEGIN and ROLLBACK
        )
        event.listen(self._writing, "connect", _set_up)
        event.listen(self._reading, "connect", _set_up)
        event.listen(self._writing, "begin", _begin)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-write")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")

    async def write(self, work: Work[T]) -> T:
        """See ``Connections``."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writer, _transaction, self._writing, work)

    async def read(self, work: Work[T]) -> T:
        """See ``Connections``."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, _reading, self._reading, work)

    async def close(self) -> None:
        """See ``Connections``."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writer.shutdown()
        self._readers.shutdown()
        self._writing.dispose()
        self._reading.dispose()


class AsyncConnections:
    """A database with an asynchronous driver (PostgreSQL)."""

    def __init__(self, where: URL) -> None:
        self._writing = create_async_engine(where, pool_size=1, max_overflow=0)
        self._reading = create_async_engine(
            where,
            pool_size=_READERS,
            max_overflow=0,
            isolation_level="AUTOCOMMIT",
            pool_pre_ping=True,
        )
        self._writer: AsyncConnection | None = None

    async def write(self, work: Work[T]) -> T:
        """See ``Connections``."""
        if self._writer is None:
            self._writer = await self._writing.connect()
        async with self._writer.begin():
            return await self._writer.run_sync(work)

    async def read(self, work: Work[T]) -> T:
        """See ``Connections``."""
        async with self._reading.connect() as connection:
            return await connection.run_sync(work)

    async def close(self) -> None:
        """See ``Connections``."""
        if self._writer is not None:
            await self._writer.close()
            self._writer = None
        await self._reading.dispose()
        await self._writing.dispose()


def _transaction(engine: Engine, work: Work[T]) -> T:
    with engine.begin() as connection:
        return work(connection)


def _reading(engine: Engine, work: Work[T]) -> T:
    with engine.connect() as connection:
        return work(connection)


def _set_up(connection: DBAPIConnection, _record: Any) -> None:
    # Without this the driver opens transactions by its own rules, which break savepoints.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(pragma)
    cursor.close()


def _begin(connection: Connection) -> None:
    # IMMEDIATE takes the write lock at once, so a transaction never fails half-way for want of it.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
