"""Looking for sessions."""

from dataclasses import dataclass, replace

from twinkle_dask.operations import validation
from twinkle_dask.operations.values import Tenant
from twinkle_dask.store.records import SessionRecord
from twinkle_dask.store.searches import SessionPlace, SessionQuery, Stored
from twinkle_dask.store.store import Store

_NOTHING = Stored(num_checkpoints=0, num_bytes=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSession:
    """A session and what its runs have saved."""

    record: SessionRecord
    stored: Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSessions:
    """A page of them, newest first; ``next`` is where the following one begins, if there is one."""

    items: tuple[FoundSession, ...]
    next: SessionPlace | None


class Searching:
    """Searches a tenant's own sessions; nobody has access to others'."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def sessions(self, tenant: Tenant, query: SessionQuery, limit: int) -> FoundSessions:
        """The newest sessions of a query, at most ``limit`` of them.

        Raises:
            InvalidRequest: A text in the query is longer than any session may have.
        """
        _check(query)
        records = await self._store.searches.sessions(tenant.id, query, limit + 1)
        following = None
        if len(records) > limit:
            records = records[:limit]
            following = SessionPlace(records[-1].created_at, records[-1].id)
        stored = await self._store.searches.stored_by_session(one.id for one in records)
        items = tuple(
            FoundSession(record=one, stored=stored.get(one.id, _NOTHING)) for one in records
        )
        return FoundSessions(items=items, next=following)


def words_of(name: str | None) -> tuple[str, ...]:
    """The words that must stand in a display name."""
    return tuple((name or "").split())


def nothing() -> SessionQuery:
    """A query that finds nothing, for an owner that is not the one who asks."""
    return replace(SessionQuery(), projects=())


def _check(query: SessionQuery) -> None:
    projects = query.projects or ()
    after = () if query.after is None else (query.after.session,)
    pairs = (text for pair in query.metadata.items() for text in pair)
    for text in (*query.name_words, *projects, *after, *pairs, *filter(None, [query.session])):
        validation.text(text, "A text to search for", validation.MAX_DETAIL_LENGTH)
