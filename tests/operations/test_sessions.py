"""Sessions end one by one, and nothing that goes wrong with one keeps another alive."""

import asyncio

import pytest

from tests.operations.parts import ANN, Parts
from twinkle_dask.errors import StorageFailed
from twinkle_dask.store.records import SessionState
from twinkle_dask.types import SessionId


@pytest.fixture
def ending(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> dict[SessionId, Exception]:
    """Sessions whose record cannot be ended, and why."""
    failures: dict[SessionId, Exception] = {}
    end = parts.store.sessions.end

    async def failing(
        session: SessionId, state: SessionState, *, reason: str, detail: str | None, when: object
    ) -> bool:
        if session in failures:
            raise failures[session]
        return await end(session, state, reason=reason, detail=detail, when=when)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(parts.store.sessions, "end", failing)
    return failures


async def test_a_session_that_cannot_be_ended_keeps_no_other_from_ending(
    parts: Parts, ending: dict[SessionId, Exception]
) -> None:
    first, second, third = [await parts.a_session() for _ in range(3)]
    ending[second] = StorageFailed("disk full")
    await parts.sessions.expire(0)
    assert [parts.sessions.is_active(one) for one in (first, second, third)] == [False, True, False]
    del ending[second]
    await parts.sessions.expire(0)
    assert not parts.sessions.is_active(second)


async def test_a_session_heard_of_while_another_was_ended_goes_on(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = [await parts.a_session() for _ in range(2)]
    await asyncio.sleep(0.1)
    end = parts.store.sessions.end

    async def slow(*args: object, **named: object) -> bool:
        parts.sessions.touch(second)
        return await end(*args, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(parts.store.sessions, "end", slow)
    await parts.sessions.expire(0.1)
    assert not parts.sessions.is_active(first)
    assert parts.sessions.is_active(second)


async def test_of_two_endings_at_the_same_time_the_first_wins(parts: Parts) -> None:
    session = await parts.a_session()
    ended = await asyncio.gather(
        *(parts.sessions.finish(ANN, session, reason=why, detail=None) for why in "ab"),
        parts.sessions.expire(0),
    )
    assert ended == [True, False, None]
    record = await parts.store.sessions.get(ANN.id, session)
    assert record is not None
    assert record.end_reason == "a"
