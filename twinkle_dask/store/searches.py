"""Looking for sessions, and what lies in storage by session and by project."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    String,
    Subquery,
    and_,
    cast,
    false,
    func,
    or_,
    select,
    true,
)

from twinkle_dask.clock import utc_now
from twinkle_dask.store.database import Database
from twinkle_dask.store.records import CheckpointRecord, SessionRecord, SessionState
from twinkle_dask.store.rows import from_row
from twinkle_dask.store.tables import checkpoints, runs
from twinkle_dask.store.tables import sessions as t
from twinkle_dask.types import SessionId, TenantId


@dataclass(frozen=True, slots=True, kw_only=True)
class StateQuery:
    """A state, and how sessions came into it; ``reasons`` None takes all."""

    state: SessionState
    reasons: tuple[str, ...] | None = None


class SessionPlace(NamedTuple):
    """Where a page of sessions ends."""

    created_at: datetime
    session: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionQuery:
    """Which sessions; what is None or empty asks for nothing.

    Attributes:
        session: This one; together with ``name_words``, either is enough.
        name_words: Each is part of the display name, whatever the case.
        projects: In one of them.
        metadata: Each key has this value.
        states: In one of them.
        after: Older than this place.
    """

    session: SessionId | None = None
    name_words: tuple[str, ...] = ()
    projects: tuple[str, ...] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    states: tuple[StateQuery, ...] | None = None
    after: SessionPlace | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Named checkpoints that are alive."""

    num_checkpoints: int
    num_bytes: int


class Searches:
    """Searches and sums over the sessions of one tenant at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def sessions(
        self, tenant: TenantId, query: SessionQuery, limit: int
    ) -> tuple[SessionRecord, ...]:
        """The newest sessions of a query, at most ``limit``."""
        which = and_(t.c.tenant_id == tenant, *_conditions(query))

        def work(connection: Connection) -> tuple[SessionRecord, ...]:
            # Where JSON is taken apart, the databases differ.
            apart = func.json_each if connection.dialect.name == "sqlite" else func.json_each_text
            wanted = which
            for key, value in query.metadata.items():
                pairs = apart(t.c.user_metadata).table_valued("key", "value")
                same = and_(pairs.c.key == key, cast(pairs.c.value, String) == value)
                wanted = and_(wanted, select(1).select_from(pairs).where(same).exists())
            found = select(t).where(wanted).order_by(t.c.created_at.desc(), t.c.id).limit(limit)
            rows = connection.execute(found).mappings()
            return tuple(from_row(SessionRecord, row) for row in rows)

        return await self._database.read(work)

    async def stored_by_session(self, sessions: Iterable[SessionId]) -> dict[SessionId, Stored]:
        """What the runs of these sessions have saved; sessions without anything are left out."""
        alive = _alive()
        sums = (
            select(runs.c.session_id, func.count(), func.sum(alive.c.size_bytes))
            .join_from(alive, runs, runs.c.id == alive.c.run_id)
            .where(runs.c.session_id.in_(tuple(sessions)))
            .group_by(runs.c.session_id)
        )

        def work(connection: Connection) -> dict[SessionId, Stored]:
            return {
                session: Stored(num_checkpoints=number, num_bytes=int(size))
                for session, number, size in connection.execute(sums)
            }

        return await self._database.read(work)

    async def checkpoints_of_session(self, session: SessionId) -> tuple[CheckpointRecord, ...]:
        """The named checkpoints of a session's runs that are alive, oldest first."""
        c = checkpoints.c
        query = (
            select(checkpoints)
            .join(runs, runs.c.id == c.run_id)
            .where(runs.c.session_id == session, _named_and_alive())
            .order_by(c.created_at, c.id)
        )
        return await self._database.all(CheckpointRecord, query)

    async def stored_by_project(
        self, tenant: TenantId, project: str | None
    ) -> dict[str | None, Stored]:
        """What a tenant has saved, by the label of the session; of one label, if it is given."""
        alive = _alive()
        sums = (
            select(t.c.project_id, func.count(), func.sum(alive.c.size_bytes))
            .join_from(alive, runs, runs.c.id == alive.c.run_id)
            .join(t, t.c.id == runs.c.session_id)
            .where(
                alive.c.tenant_id == tenant,
                true() if project is None else t.c.project_id == project,
            )
            .group_by(t.c.project_id)
            .order_by(t.c.project_id)
        )

        def work(connection: Connection) -> dict[str | None, Stored]:
            return {
                label: Stored(num_checkpoints=number, num_bytes=int(size))
                for label, number, size in connection.execute(sums)
            }

        return await self._database.read(work)


def _conditions(query: SessionQuery) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    names: list[ColumnElement[bool]] = []
    if query.session is not None:
        names.append(t.c.id == query.session)
    if query.name_words:
        words = (t.c.display_name.icontains(word, autoescape=True) for word in query.name_words)
        names.append(and_(*words))
    if names:
        found.append(or_(*names))
    if query.projects is not None:
        found.append(t.c.project_id.in_(query.projects))
    if query.states is not None:
        found.append(or_(false(), *(_in_state(one) for one in query.states)))
    if query.after is not None:
        when, session = query.after
        later = and_(t.c.created_at == when, t.c.id > session)
        found.append(or_(t.c.created_at < when, later))
    return found


def _in_state(query: StateQuery) -> ColumnElement[bool]:
    in_state = t.c.state == query.state
    if query.reasons is None:
        return in_state
    return and_(in_state, t.c.end_reason.in_(query.reasons))


def _alive() -> Subquery:
    c = checkpoints.c
    return select(c.run_id, c.tenant_id, c.size_bytes).where(_named_and_alive()).subquery()


def _named_and_alive() -> ColumnElement[bool]:
    c = checkpoints.c
    return and_(c.name.is_not(None), or_(c.expires_at.is_(None), c.expires_at > utc_now()))
