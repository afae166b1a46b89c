"""What the repositories share: many short reads, one group-committing writer."""

from collections.abc import Callable, Iterable
from functools import cache
from itertools import islice
from typing import Any, TypeAlias, TypeVar

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Connection,
    Delete,
    Insert,
    Select,
    Table,
    Update,
    func,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite

from twinkle_dask.store.connections import Connections, Work
from twinkle_dask.store.engines import database_faults, open_connections
from twinkle_dask.store.migrate import migrate
from twinkle_dask.store.rows import R, RowValues, from_row, to_row
from twinkle_dask.store.writer import GroupWriter

T = TypeVar("T")
N = TypeVar("N", bound=str)

_MAX_NAMES = 10_000  # names in one IN list; drivers stop at 32,767 bound values

Page: TypeAlias = tuple[tuple[T, ...], int]
"""Some items, and how many there are in all."""


class Database:
    """An open database at the newest schema."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._writer = GroupWriter(connections)

    @classmethod
    async def open(cls, url: str) -> "Database":
        """Connect and migrate; see ``Store.open``."""
        connections = open_connections(url)
        try:
            with database_faults("set up its database"):
                await connections.write(migrate)
        except BaseException:
            await connections.close()
            raise
        database = cls(connections)
        database._writer.start()
        return database

    async def close(self) -> None:
        """Commit what is queued and close every connection."""
        await self._writer.close()
        await self._connections.close()

    async def write(self, work: Work[T]) -> T:
        """See ``GroupWriter.run``."""
        return await self._writer.run(work)

    async def all(self, kind: type[R], query: Select[Any]) -> tuple[R, ...]:
        """All records of a query that selects all columns of their table."""

        def work(connection: Connection) -> tuple[R, ...]:
            return tuple(from_row(kind, row) for row in connection.execute(query).mappings())

        return await self.read(work)

    async def one(self, kind: type[R], query: Select[Any]) -> R | None:
        """The record of a query that finds at most one."""

        def work(connection: Connection) -> R | None:
            row = connection.execute(query).mappings().one_or_none()
            return None if row is None else from_row(kind, row)

        return await self.read(work)

    async def scalar(self, query: Select[Any]) -> Any:
        """The single value of a query."""

        def work(connection: Connection) -> Any:
            return connection.scalar(query)

        return await self.read(work)

    async def values(self, query: Select[Any] | CompoundSelect[Any]) -> tuple[Any, ...]:
        """The first column of all rows of a query."""

        def work(connection: Connection) -> tuple[Any, ...]:
            return tuple(connection.scalars(query))

        return await self.read(work)

    async def read(self, work: Work[T]) -> T:
        """Run queries that belong together, beside others; see ``Connections.read``."""
        with database_faults("read records"):
            return await self._connections.read(work)

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

        def work(connection: Connection) -> R:
            if insert_new(connection, table, row):
                return record
            found = connection.execute(select(table).where(same()))
            return from_row(type(record), found.mappings().one())

        return await self.write(work)

    async def change(self, statement: Update | Delete, values: RowValues | None = None) -> int:
        """Run one UPDATE or DELETE and tell how many rows it touched.

        Args:
            statement: What to run. One that is run often is made once, with bound parameters:
                to make it takes longer than to run it.
            values: Of its bound parameters.
        """

        def work(connection: Connection) -> int:
            return connection.execute(statement, values).rowcount

        return await self.write(work)

    async def change_named(
        self, statement: Update, column: ColumnElement[str], names: Iterable[str]
    ) -> None:
        """Run one UPDATE on all rows whose ``column`` is among ``names``."""
        wanted = tuple(names)

        def work(connection: Connection) -> None:
            for some in portions(wanted):
                connection.execute(statement.where(column.in_(some)))

        if wanted:
            await self.write(work)


def insert_new(connection: Connection, table: Table, row: RowValues) -> bool:
    """Insert a row; False if a unique column holds its value already, without an error.

    An error would undo the transaction that other callers share.
    """
    statement = _insert_new(table, connection.dialect.name)
    return connection.execute(statement, row).rowcount == 1


@cache
def _insert_new(table: Table, dialect: str) -> Insert:
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return insert(table).on_conflict_do_nothing()


def portions(names: tuple[N, ...]) -> Iterable[tuple[N, ...]]:
    """Names, so many at a time as one statement may have."""
    rest = iter(names)
    while some := tuple(islice(rest, _MAX_NAMES)):
        yield some
