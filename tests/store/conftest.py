import os
import shutil
import subprocess
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from tempfile import mkdtemp

import pytest
import pytest_asyncio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from twinkle_dask.store.store import Store, sqlite_url


@pytest.fixture(scope="session")
def postgres_server() -> Generator[str]:
    """The URL of a fresh PostgreSQL server on a Unix socket, where its programs are installed."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(installed[-1]) if installed else None)
    if initdb is None:
        pytest.skip("no PostgreSQL server on this machine")
    programs = Path(initdb).resolve().parent
    folder = Path(mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path must be short
    user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    if user is not None:
        shutil.chown(folder, user)
    data = folder / "data"
    options = "-c listen_addresses='' -c fsync=off -c unix_socket_directories=" + str(folder)
    control = [programs / "pg_ctl", "-D", data, "-l", folder / "log", "-w"]

    def call(*command: object) -> None:
        subprocess.run(
            [str(part) for part in command],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            user=user,
        )

    try:
        call(programs / "initdb", "-D", data, "-U", "tester", "-A", "trust", "--no-sync")
        call(*control, "-o", options, "start")
        try:
            yield f"postgresql://tester@/postgres?host={folder}"
        finally:
            call(*control, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest_asyncio.fixture
async def empty_postgres(postgres_server: str) -> str:
    """The URL of a PostgreSQL database without tables."""
    engine = create_async_engine(postgres_server.replace("postgresql://", "postgresql+asyncpg://"))
    async with engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA public CASCADE"))
        await connection.execute(text("CREATE SCHEMA public"))
    await engine.dispose()
    return postgres_server


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "records.sqlite3")
    url: str = request.getfixturevalue("empty_postgres")
    return url


@pytest_asyncio.fixture
async def store(database_url: str) -> AsyncGenerator[Store]:
    """An open, empty store on each kind of database."""
    opened = await Store.open(database_url)
    yield opened
    await opened.close()
