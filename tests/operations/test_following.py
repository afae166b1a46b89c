"""Samples that are followed: hosts go, nothing is told twice and nothing is left out."""

import asyncio
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.operations.parts import ANN, Parts
from tests.operations.test_sampling import a_sampler, settled
from twinkle_dask.cluster.commands import Cancel, Command, Sample
from twinkle_dask.errors import HostLost
from twinkle_dask.operations.following import Following
from twinkle_dask.types import SamplePart, SampleRequest, SamplingParams


def part(index: int, tokens: list[int]) -> SamplePart:
    return SamplePart(
        index=index,
        tokens=np.array(tokens, np.int32),
        logprobs=np.array(tokens, np.float32),
        texts=tuple(map(str, tokens)),
    )


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 1), st.integers(1, 4)), max_size=8),
        min_size=1,
        max_size=5,
    )
)
def test_each_token_is_told_once_however_often_it_is_drawn(
    attempts: list[list[tuple[int, int]]],
) -> None:
    """Each host draws 0, 1, 2, ... for both samples, as far as it comes."""

    async def told() -> dict[int, list[int]]:
        following, found = Following(), defaultdict[int, list[int]](list)
        for attempt in attempts:
            following.start_over()
            at = [0, 0]
            for index, number in attempt:
                following.add(part(index, list(range(at[index], at[index] + number))))
                at[index] += number
        following.end()
        async for one in following.parts():
            assert len(one.tokens) == len(one.logprobs) > 0
            assert one.texts == tuple(map(str, one.tokens))
            found[one.index] += one.tokens.tolist()
        return found

    found = asyncio.run(told())
    for index in (0, 1):
        furthest = max(sum(n for i, n in attempt if i == index) for attempt in attempts)
        assert found[index] == list(range(furthest))


async def test_parts_end_with_the_outcome(parts: Parts) -> None:
    sampler = await a_sampler(parts)
    parts.host.drawing.clear()
    request = SampleRequest(prompt=np.array([1], np.int32), params=SamplingParams(max_tokens=3))
    ticket, following = await parts.sampling.follow(ANN, sampler, request)
    await settled()
    (watch,) = parts.host.watching
    watch(part(0, [7]))
    stream = following.parts()
    assert (await anext(stream)).tokens.tolist() == [7]
    watch(part(0, [8, 9]))
    parts.host.drawing.set()
    assert [one.tokens.tolist() async for one in stream] == [[8, 9]]
    assert (await parts.tickets.wait(ANN.id, ticket.id, 0)) is not None
    await parts.done(ticket.id)
    assert [c.watched for c in parts.host.commands if isinstance(c, Sample)] == [True]


async def test_a_host_that_is_lost_leaves_no_gap_and_no_repetition(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = await a_sampler(parts)
    first: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    lost_watch = list[Callable[[SamplePart], None]]()

    def send(command: Command, on_part: Callable[[SamplePart], None]) -> "asyncio.Future[bytes]":
        lost_watch.append(on_part)
        monkeypatch.undo()
        return first

    monkeypatch.setattr(parts.host, "send", send)
    request = SampleRequest(prompt=np.array([1], np.int32), params=SamplingParams(max_tokens=4))
    parts.host.drawing.clear()
    ticket, following = await parts.sampling.follow(ANN, sampler, request)
    await settled()
    lost_watch[0](part(0, [5, 6]))
    first.set_exception(HostLost("gone"))
    await settled()
    (watch,) = parts.host.watching
    for tokens in ([5], [6, 7], [8]):
        watch(part(0, tokens))
    parts.host.drawing.set()
    told = [one.tokens.tolist() async for one in following.parts()]
    assert told == [[5, 6], [7], [8]]
    await parts.done(ticket.id)


async def test_who_stops_following_cancels(parts: Parts) -> None:
    sampler = await a_sampler(parts)
    parts.host.drawing.clear()
    request = SampleRequest(prompt=np.array([1], np.int32), params=SamplingParams(max_tokens=3))
    ticket, following = await parts.sampling.follow(ANN, sampler, request)
    await settled()
    await parts.sampling.cancel(ANN, ticket.id)
    assert [one async for one in following.parts()] == []
    assert any(isinstance(command, Cancel) for command in parts.host.commands)
