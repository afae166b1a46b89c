"""Databases by URL, and their failures in plain words."""

import os
from collections.abc import Generator
from contextlib import contextmanager

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from twinkle_dask.errors import StartupError, StorageFailed
from twinkle_dask.store.connections import Connections, connect
from twinkle_dask.store.faults import storage_failed

_DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "sqlite+pysqlite": "sqlite+pysqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}


def open_connections(url: str) -> Connections:
    """Make the connections to a database; they connect when they are first used.

    Raises:
        StartupError: The URL is none, or of a database we do not support.
        StorageFailed: The folder of a SQLite file does not exist.
    """
    where = _database_url(url)
    if where.get_backend_name() == "sqlite":
        # The driver only says that it cannot open the file; here the usual reason has a name.
        with database_faults("open its database"):
            os.scandir(os.path.dirname(where.database or "") or ".").close()
    return connect(where)


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
