"""Group commit: one task owns the writing connection; who waits together commits together.

While one transaction commits, later callers queue; all of them go into the next one. So a single
write costs one commit, and a thousand at once cost little more.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection

from twinkle_dask.errors import StorageFailed
from twinkle_dask.store.connections import Connections, Work
from twinkle_dask.store.engines import database_faults

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Unit:
    work: Work[Any]
    done: asyncio.Future[Any]


class GroupWriter:
    """Runs writes in the order of their ``run`` calls, many to a transaction.

    If anything in a transaction fails, it is rolled back and each write in it is tried again in a
    transaction of its own, so that only those who fail learn of it; a write may therefore run
    twice. That is rare: a duplicate is no failure (see ``database.insert_new``). Savepoints would
    not do: SQLite drops the whole transaction when the disk is full.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._queue: list[_Unit] = []
        self._wake = asyncio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Accept writes."""
        self._task = asyncio.create_task(self._write_all(), name="store-writer")

    async def run(self, work: Work[T]) -> T:
        """Run ``work`` in a transaction shared with others and wait until it is committed.

        A caller that is cancelled before its transaction began leaves no trace; later, its write
        is committed all the same.

        Returns:
            What ``work`` returned.

        Raises:
            StorageFailed: The transaction could not be committed, or the writer is closed.
            Exception: What ``work`` raised; its changes, and only its, are undone.
        """
        if self._closing or self._task is None:
            raise StorageFailed("The store is closed.")
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.append(_Unit(work, done))
        self._wake.set()
        return await done

    async def close(self) -> None:
        """Commit what is queued and end. Repeating it is harmless."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _write_all(self) -> None:
        batch: list[_Unit] = []
        try:
            while self._queue or not self._closing:
                await self._wake.wait()
                self._wake.clear()
                batch = [unit for unit in self._queue if not unit.done.done()]
                self._queue.clear()
                if batch:
                    await self._commit(batch)
        finally:
            self._closing = True
            for unit in (*batch, *self._queue):
                if not unit.done.done():
                    unit.done.set_exception(StorageFailed("The store was closed."))

    async def _commit(self, batch: list[_Unit]) -> None:
        def work(connection: Connection) -> list[Any]:
            return [unit.work(connection) for unit in batch]

        try:
            with database_faults("write records"):
                results = await self._connections.write(work)
        except Exception as error:  # noqa: BLE001  # whatever it is belongs to a caller
            if len(batch) == 1:
                _fail(batch[0], error)
            else:
                for unit in batch:
                    await self._commit([unit])
        else:
            for unit, result in zip(batch, results, strict=True):
                if not unit.done.done():
                    unit.done.set_result(result)


def _fail(unit: _Unit, error: Exception) -> None:
    if not unit.done.done():
        unit.done.set_exception(error)
