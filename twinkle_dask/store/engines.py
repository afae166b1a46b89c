"""Database engines by URL, and their failures in plain words.

SQLite runs in WAL mode with ``synchronous=NORMAL``: a commit survives the death of any process
and costs no fsync; a power cut may take the last moments, but never the consistency.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from twinkle_dask.errors import StartupError, StorageFailed
from twinkle_dask.store.faults import storage_failed

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}
_PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=NORMAL",
    "PRAGMA foreign_keys=ON",
    "PRAGMA busy_timeout=5000",  # milliseconds; only tools beside the server can make us wait
)
_READERS = 4


def open_engines(url: str) -> tuple[AsyncEngine, AsyncEngine]:
    """Make an engine with one writing connection and one with a few reading ones.

    Raises:
        StartupError: The URL is none, or of a database we do not support.
        StorageFailed: The folder of a SQLite file does not exist.
    """
    where = _database_url(url)
    sqlite = where.get_backend_name() == "sqlite"
    writing = create_async_engine(where, pool_size=1, max_overflow=0)
    reading = create_async_engine(
        where,
        pool_size=_READERS,
        max_overflow=0,
        isolation_level="AUTOCOMMIT",  # a read is one statement; saves BEGIN and ROLLBACK
        pool_pre_ping=not sqlite,
    )
    if sqlite:
        # aiosqlite leaves a thread behind for a moment when it cannot open a file, and that
        # thread fails noisily if the loop is closed meanwhile; so the usual reason is met here.
        with database_faults("open its database"):
            os.scandir(os.path.dirname(where.database or "") or ".").close()
        event.listen(writing.sync_engine, "connect", _set_up_sqlite)
        event.listen(reading.sync_engine, "connect", _set_up_sqlite)
        event.listen(writing.sync_engine, "begin", _begin_sqlite)
    return writing, reading


@contextmanager
def database_faults(action: str) -> Generator[None]:
    """Turn failures of the database into ``StorageFailed``; ``action`` follows "could not".

    A broken constraint rises as it is: that is a bug of ours, not a failing disk.
    """
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        raise StorageFailed(f"The store could not {action}: {_why(str(error.orig))}.") from error
    except PoolTimeoutError as error:
        raise StorageFailed(f"The store could not {action}: the database is busy.") from error
    except OSError as error:  # a PostgreSQL server that cannot be reached
        raise storage_failed(action, error) from error


def _why(said: str) -> str:
    if any(words in said for words in ("disk is full", "No space left", "could not extend")):
        return "disk full"
    if "locked" in said:
        return "the database is busy"
    return "the database failed"


def _database_url(url: str) -> URL:
    try:
        where = make_url(url)
    except ArgumentError as error:
        raise StartupError(f"{url!r} is no database URL.") from error
    driver = _DRIVERS.get(where.drivername)
    if driver is None:
        raise StartupError(
            f"A {where.drivername!r} database is not supported; use sqlite or postgresql."
        )
    if driver.startswith("sqlite") and where.database in (None, "", ":memory:"):
        raise StartupError("The SQLite database must be a file: it has to survive the server.")
    return where.set(drivername=driver)


def _set_up_sqlite(connection: DBAPIConnection, _record: Any) -> None:
    # Without this the driver opens transactions by its own rules, which break savepoints.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(pragma)
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    # IMMEDIATE takes the write lock at once, so a transaction never fails half-way for want of it.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
