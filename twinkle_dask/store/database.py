"""What the repositories share: many short reads, one group-committing writer."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import ColumnElement, CompoundSelect, Delete, Select, Table, Update, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from twinkle_dask.store.engines import database_faults, open_engines
from twinkle_dask.store.migrate import migrate
from twinkle_dask.store.rows import R, RowValues, from_row, to_row
from twinkle_dask.store.writer import GroupWriter, Work

T = TypeVar("T")

_MAX_NAMES = 10_000  # names in one IN list; drivers stop at 32,767 bound values

Page: TypeAlias = tuple[tuple[T, ...], int]
"""Some items, and how many there are in all."""


class Database:
    """An open database at the newest schema."""

    def __init__(self, writing: AsyncEngine, reading: AsyncEngine) -> None:
        self._writing = writing
        self._reading = reading
        self._writer = GroupWriter(writing)

    @classmethod
    async def open(cls, url: str) -> "Database":
        """Connect and migrate; see ``Store.open``."""
        writing, reading = open_engines(url)
        database = cls(writing, reading)
        try:
            await migrate(writing)
            await database._writer.start()
        except BaseException:
            await database.close()
            raise
        return database

    async def close(self) -> None:
        """Commit what is queued and close every connection."""
        await self._writer.close()
        await self._reading.dispose()
        await self._writing.dispose()

    async def write(self, work: Work[T]) -> T:
        """See ``GroupWriter.run``."""
        return await self._writer.run(work)

    async def all(self, kind: type[R], query: Select[Any]) -> tuple[R, ...]:
        """All records of a query that selects all columns of their table."""
        with database_faults("read records"):
            async with self._reading.connect() as connection:
                rows = (await connection.execute(query)).mappings().all()
        return tuple(from_row(kind, row) for row in rows)

    async def one(self, kind: type[R], query: Select[Any]) -> R | None:
        """The record of a query that finds at most one."""
        with database_faults("read records"):
            async with self._reading.connect() as connection:
                row = (await connection.execute(query)).mappings().one_or_none()
        return None if row is None else from_row(kind, row)

    async def scalar(self, query: Select[Any]) -> Any:
        """The single value of a query."""
        with database_faults("read records"):
            async with self._reading.connect() as connection:
                return await connection.scalar(query)

    async def values(self, query: Select[Any] | CompoundSelect[Any]) -> tuple[Any, ...]:
        """The first column of all rows of a query."""
        with database_faults("read records"):
            async with self._reading.connect() as connection:
                return tuple((await connection.scalars(query)).all())

    async def page(
        self, kind: type[R], table: Table, which: ColumnElement[bool], limit: int, offset: int
    ) -> Page[R]:
        """The newest of certain records of ``table``, and their total number."""
        newest = (table.c.created_at.desc(), table.c.id)
        items = select(table).where(which).order_by(*newest).limit(limit).offset(offset)
        total = await self.scalar(select(func.count()).select_from(table).where(which))
        return await self.all(kind, items), total

    async def insert(self, table: Table, record: R, same: Callable[[], ColumnElement[bool]]) -> R:
        """Store a record unless a unique column holds its value already.

        Returns:
            ``record`` itself, or else the one already there, which the condition ``same`` finds
            (built only then: it would be a third of the work of an insert).
        """
        row = to_row(record)

        async def work(connection: AsyncConnection) -> R:
            if await insert_new(connection, table, row):
                return record
            found = await connection.execute(select(table).where(same()))
            return from_row(type(record), found.mappings().one())

        return await self.write(work)

    async def change(self, statement: Update | Delete) -> int:
        """Run one UPDATE or DELETE and tell how many rows it touched."""

        async def work(connection: AsyncConnection) -> int:
            return (await connection.execute(statement)).rowcount

        return await self.write(work)

    async def change_named(
        self, statement: Update, column: ColumnElement[str], names: Iterable[str]
    ) -> None:
        """Run one UPDATE on all rows whose ``column`` is among ``names``."""
        wanted = tuple(names)

        async def work(connection: AsyncConnection) -> None:
            for some in _portions(wanted):
                await connection.execute(statement.where(column.in_(some)))

        if wanted:
            await self.write(work)


async def insert_new(connection: AsyncConnection, table: Table, row: RowValues) -> bool:
    """Insert a row; False if a unique column holds its value already, without an error.

    An error would undo the transaction that other callers share.
    """
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).on_conflict_do_nothing()
    return (await connection.execute(statement, row)).rowcount == 1


def _portions(names: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    rest = iter(names)
    while some := tuple(islice(rest, _MAX_NAMES)):
        yield some
