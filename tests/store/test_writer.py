"""Group commit: together where possible, apart where one fails."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.util import await_only

from tests.store.samples import ANN, at, fill, operation, run, session
from twinkle_dask.errors import StartupError, StorageFailed
from twinkle_dask.store.database import Database
from twinkle_dask.store.journal import DuplicateOperation
from twinkle_dask.store.store import Store, sqlite_url
from twinkle_dask.types import RunId

RUN = RunId("s1:train:0")


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncGenerator[Database]:
    opened = await Database.open(database_url)
    async with asyncio.timeout(10):
        await opened.write(_create)
        yield opened
        await opened.close()


def _create(connection: Connection) -> None:
    connection.execute(text("CREATE TABLE numbers (n INTEGER PRIMARY KEY, writer TEXT)"))


async def _insert(database: Database, number: int, writer: str = "") -> None:
    def work(connection: Connection) -> None:
        connection.execute(text("INSERT INTO numbers VALUES (:n, :w)"), {"n": number, "w": writer})

    await database.write(work)


async def _numbers(database: Database) -> list[int]:
    def work(connection: Connection) -> list[int]:
        return list(connection.scalars(text("SELECT n FROM numbers ORDER BY n")))

    return await database.write(work)


class _Gate:
    """Keeps a transaction open, wherever its work runs: on a thread, or in the loop."""

    def __init__(self) -> None:
        self.held, self.release = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def hold(self, connection: Connection) -> None:
        self._loop.call_soon_threadsafe(self.held.set)
        if connection.dialect.is_async:
            await_only(self.release.wait())
        else:
            asyncio.run_coroutine_threadsafe(self.release.wait(), self._loop).result()


async def test_a_failing_statement_fails_only_its_caller(database: Database) -> None:
    numbers = [1, 2, 2, 3, 4, 4, 5]
    writes = [_insert(database, number) for number in numbers]
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    failed = [number for number, error in zip(numbers, outcomes, strict=True) if error is not None]
    assert failed == [2, 4]
    assert all(error is None or isinstance(error, IntegrityError) for error in outcomes)
    assert await _numbers(database) == [1, 2, 3, 4, 5]


async def test_an_error_of_ours_undoes_only_its_callers_changes(database: Database) -> None:
    def half(connection: Connection) -> None:
        connection.execute(text("INSERT INTO numbers VALUES (7, '')"))
        raise ValueError("half-way")

    outcomes = await asyncio.gather(
        _insert(database, 1), database.write(half), _insert(database, 2), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), ValueError, type(None)]
    with pytest.raises(ValueError, match="half-way"):
        await database.write(half)
    assert await _numbers(database) == [1, 2]


async def test_writes_keep_the_order_of_their_calls(database: Database) -> None:
    seen: list[int] = []

    async def write(number: int) -> None:
        def work(_connection: Connection) -> None:
            seen.append(number)

        await database.write(work)

    await asyncio.gather(*(write(number) for number in range(50)))
    assert seen == list(range(50))


async def test_what_waits_together_commits_together(database: Database) -> None:
    gate = _Gate()

    def transaction(connection: Connection) -> int:
        return id(connection.get_transaction())

    holding = asyncio.create_task(database.write(gate.hold))
    await gate.held.wait()
    waiting = [asyncio.create_task(database.write(transaction)) for _ in range(20)]
    await asyncio.sleep(0)
    gate.release.set()
    assert len(set(await asyncio.gather(*waiting))) == 1
    await holding


async def test_a_cancelled_caller_in_the_queue_leaves_no_trace(database: Database) -> None:
    gate = _Gate()
    holding = asyncio.create_task(database.write(gate.hold))
    await gate.held.wait()
    cancelled = asyncio.create_task(_insert(database, 1))
    kept = asyncio.create_task(_insert(database, 2))
    await asyncio.sleep(0)
    cancelled.cancel()
    holding.cancel()  # its transaction runs on: only nobody waits for it
    gate.release.set()
    await kept
    assert await _numbers(database) == [2]


async def test_closing_finishes_what_is_queued_and_refuses_more(database: Database) -> None:
    writes = [asyncio.create_task(_insert(database, number)) for number in range(10)]
    await asyncio.sleep(0)
    await database.close()
    await asyncio.gather(*writes)
    with pytest.raises(StorageFailed, match="closed"):
        await _insert(database, 99)
    await database.close()


async def test_five_hundred_concurrent_operations_all_arrive(store: Store) -> None:
    await fill(store)
    await asyncio.gather(*(store.journal.add(operation(seq)) for seq in range(1, 501)))
    stored = await store.journal.for_run(RUN, after_seq=0)
    assert [one.seq for one in stored] == list(range(1, 501))


async def test_concurrent_duplicates_have_one_winner(store: Store) -> None:
    await fill(store)
    rivals = [operation(1) for _ in range(20)]
    outcomes = await asyncio.gather(
        *(store.journal.add(rival) for rival in rivals), return_exceptions=True
    )
    winners = [one for one, error in zip(rivals, outcomes, strict=True) if error is None]
    losers = [error for error in outcomes if isinstance(error, DuplicateOperation)]
    assert len(winners) == 1
    assert [loser.stored for loser in losers] == winners * 19


async def test_families_written_at_once_respect_their_references(store: Store) -> None:
    """The order of calls is the order of writes, so a run may follow its session unawaited."""
    await asyncio.gather(
        store.sessions.add(session()), store.runs.add(run()), store.journal.add(operation())
    )
    assert await store.runs.get(ANN, RUN) == run()


async def test_a_full_disk_is_named_and_passes(tmp_path: Path) -> None:
    database = await Database.open(sqlite_url(tmp_path / "records.sqlite3"))
    await database.write(_create)

    def limit(connection: Connection, pages: int) -> None:
        connection.execute(text(f"PRAGMA max_page_count={pages}"))

    await database.write(lambda connection: limit(connection, 1))  # it cannot grow any more
    writes = [_insert(database, number, "x" * 50_000) for number in range(3)]
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StorageFailed] * 3
    assert "disk full" in str(outcomes[0])
    await database.write(lambda connection: limit(connection, 100_000))
    await _insert(database, 5, "x" * 50_000)
    assert await _numbers(database) == [5]
    await database.close()


_KILLED = """
import asyncio, os, signal, sys
from tests.store.samples import fill, operation
from twinkle_dask.store.store import Store

async def main():
    store = await Store.open(sys.argv[1])
    await fill(store)
    await store.journal.add(operation(1))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


async def test_an_acknowledged_write_survives_a_kill(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    url = sqlite_url(tmp_path / "records.sqlite3")
    command = [sys.executable, "-c", _KILLED, url]
    killed = await asyncio.to_thread(subprocess.run, command, timeout=30, cwd=pytestconfig.rootpath)
    assert killed.returncode == -signal.SIGKILL
    store = await Store.open(url)
    (survivor,) = await store.journal.pending()
    assert (survivor.seq, survivor.created_at) == (1, at(1))
    await store.close()


async def test_a_lost_connection_fails_one_write_and_is_made_anew(empty_postgres: str) -> None:
    database, other = await Database.open(empty_postgres), await Database.open(empty_postgres)
    await database.write(_create)

    def hang_up(connection: Connection) -> None:
        others = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        )
        connection.execute(text(others))

    await other.write(hang_up)
    with pytest.raises(StorageFailed, match="write records"):
        await _insert(database, 1)
    await _insert(database, 2)
    assert await _numbers(database) == [2]
    await database.close()
    await other.close()


@pytest.mark.parametrize(
    "url", ["", "mysql://x/y", "sqlite://", "sqlite:///:memory:", "postgresql+psycopg://x/y"]
)
async def test_an_unusable_url_is_refused_at_start(url: str) -> None:
    with pytest.raises(StartupError):
        await Store.open(url)


async def test_a_database_out_of_reach_is_a_plain_failure(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="open its database: it does not exist"):
        await Store.open(sqlite_url(tmp_path / "no" / "folder" / "records.sqlite3"))
    with pytest.raises(StorageFailed, match="set up its database"):
        await Store.open(f"postgresql://nobody@/none?host={tmp_path}")
