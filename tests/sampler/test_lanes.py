"""Rows of a lane: dense, grouped by adapter, each with its own keys and values, nothing else."""

from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sampler.driver import request
from twinkle_dask.model.lora import LoraTensors
from twinkle_dask.sampler.drawing import Uniforms
from twinkle_dask.sampler.fairness import Account
from twinkle_dask.sampler.interface import SampleWork
from twinkle_dask.sampler.kv_cache import KvLayout, SlotCache
from twinkle_dask.sampler.lanes import KvMemory
from twinkle_dask.sampler.sequences import Job, Request, Sequence
from twinkle_dask.sampler.stopping import StopRule
from twinkle_dask.types import LoraSpec, SampleRequest, Stop, TenantId

LAYOUT = KvLayout(
    keys=((2, 3), (1, 4)), values=((2, 5), (1, 4)), dtype=torch.float32, device=torch.device("cpu")
)
ADAPTERS = [None, *(LoraTensors(LoraSpec(rank=1, seed=i), {}, dtype=torch.float32) for i in (1, 2))]


def sequence(adapter: LoraTensors | None, length: int, age: int) -> Sequence:
    asked: SampleRequest = request(list(range(length)), 99)
    owner = Request(
        work=SampleWork(str(age), TenantId("t"), asked, None),
        age=age,
        account=Account[Job](TenantId("t"), 0),
        adapter=adapter,
        prompt=list(range(length)),
        scores=None,
    )
    stop = StopRule(Stop(), max_tokens=99, end_of_sequence_ids=(), prompt=[], tokenizer=None)
    made = Sequence(owner, 0, Uniforms(0, 0), stop)
    made.tokens.append(0)
    return made


def prefilled(length: int, mark: float) -> SlotCache:
    """A cache whose second row is full of a number."""
    cache = SlotCache(LAYOUT, slots=2, capacity=length)
    write(cache, 1, 0, length, mark)
    return cache


def write(cache: SlotCache, row: int, start: int, stop: int, mark: float) -> None:
    for layer in range(2):
        (heads, keys), (_, values) = LAYOUT.keys[layer], LAYOUT.values[layer]
        for position in range(start, stop):
            places = torch.tensor([position])
            cache.begin_decode(slice(row, row + 1), places, longest=position + 1)
            new = (torch.full((1, heads, 1, size), float(mark)) for size in (keys, values))
            update(cache, new, layer)


def update(cache: SlotCache, new: Iterable[torch.Tensor], layer: int) -> list[torch.Tensor]:
    """As an attention layer of transformers does, whose types are incomplete."""
    keys, values = new
    return list(cast("Any", cache).update(keys, values, layer))


def contents(cache: SlotCache, rows: int) -> list[list[float]]:
    """What each row holds, position by position; all heads and layers must agree."""
    seen: list[torch.Tensor] = []
    places = torch.full((rows,), cache.capacity - 1)
    for layer in range(2):
        (heads, keys), (_, values) = LAYOUT.keys[layer], LAYOUT.values[layer]
        cache.begin_decode(slice(0, rows), places, longest=cache.capacity)
        new = (torch.zeros(rows, heads, 1, size) for size in (keys, values))
        for tensor in update(cache, new, layer):
            assert (tensor == tensor[:, :1, :, :1]).all()
            seen.append(tensor[:, 0, :, 0])
    for other in seen[1:]:
        assert torch.equal(other, seen[0])
    return cast("Any", seen[0]).tolist()


@given(
    moves=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 12), st.integers(1, 3)) | st.integers(0, 99),
        max_size=25,
    )
)
@settings(max_examples=40, deadline=None)
def test_rows_stay_grouped_and_keep_their_own(
    moves: list[tuple[int, int, int] | int],
) -> None:
    kv = KvMemory(LAYOUT, max_bytes=2**22, ceilings=())
    (lane,) = kv.lanes
    for age, move in enumerate(moves):
        if isinstance(move, tuple):
            adapter, length, copies = move
            new = [sequence(ADAPTERS[adapter], length, age + 1) for _ in range(copies)]
            rows = len(lane.rows) + copies
            assert kv.make_room(lane, rows=rows, length=max(lane.longest, length) + 1)
            lane.insert(new, prefilled(length, age + 1), 1)
        elif lane.rows:
            leaving = lane.rows[move % len(lane.rows)]
            lane.remove(leaving)
            assert leaving not in lane.rows
        worn = [ADAPTERS.index(row.adapter) for row in lane.rows]
        assert len([a for a, b in zip([-1, *worn], worn, strict=False) if a != b]) == len(set(worn))
        for row, held in zip(lane.rows, contents(lane.cache, lane.cache.slots), strict=False):
            length = row.num_cached
            assert held == [float(row.request.age)] * length + [0.0] * (len(held) - length)
        for held in contents(lane.cache, lane.cache.slots)[len(lane.rows) :]:
            assert not any(held)


def test_plan_has_one_slice_for_each_adapter() -> None:
    kv = KvMemory(LAYOUT, max_bytes=2**22, ceilings=())
    (lane,) = kv.lanes
    for age, adapter in enumerate([1, 0, 2, 1, 0, 1]):
        assert kv.make_room(lane, rows=age + 1, length=5)
        lane.insert([sequence(ADAPTERS[adapter], 4, age)], prefilled(4, 1.0), 1)
    found = {
        (s.rows.start, s.rows.stop)
        for s in lane.plan(slice(0, 6)).segments
        if isinstance(s.rows, slice)
    }
    assert found == {(0, 3), (5, 6)}
    assert len(lane.plan(slice(0, 6)).segments) == 2


def test_a_lane_grows_to_powers_of_two_or_as_far_as_it_may() -> None:
    tokens = 400
    kv = KvMemory(LAYOUT, max_bytes=tokens * LAYOUT.token_bytes, ceilings=(64,))
    short, long = kv.lanes
    assert (short.ceiling, long.ceiling) == (64, kv.max_length) == (64, 192)
    assert (kv.lane_for(63), kv.lane_for(64)) == (short, long)
    assert kv.make_room(short, rows=3, length=20)
    assert (short.cache.slots, short.cache.capacity) == (4, 64)
    assert kv.make_room(long, rows=1, length=130)  # takes back what the empty lane has
    assert (long.cache.slots, long.cache.capacity) == (1, 192)
    assert short.cache.num_tokens == 0
    assert kv.make_room(short, rows=1, length=64)
    assert not kv.make_room(long, rows=3, length=130)
    assert kv.make_room(long, rows=2, length=140)  # 2 x 192 and more would be too much
    assert kv.num_bytes <= tokens * LAYOUT.token_bytes


def test_prefills_count_until_their_last_row_is_given_back() -> None:
    kv = KvMemory(LAYOUT, max_bytes=400 * LAYOUT.token_bytes, ceilings=())
    lane = kv.lanes[-1]
    cache = kv.start_prefill(rows=2, length=100)
    assert kv.fits(prefill=100, lane=lane, rows=1, length=96)
    assert not kv.fits(prefill=100, lane=lane, rows=1, length=97)
    with pytest.raises(ValueError, match="fit"):
        kv.start_prefill(rows=2, length=101)
    kv.end_prefill(cache)
    assert kv.num_bytes == 200 * LAYOUT.token_bytes
    kv.end_prefill(cache)
    assert kv.num_bytes == 0


def test_nothing_is_left_of_a_row_not_even_of_a_failed_pass() -> None:
    kv = KvMemory(LAYOUT, max_bytes=2**22, ceilings=())
    (lane,) = kv.lanes
    assert kv.make_room(lane, rows=1, length=5)
    lane.insert([sequence(None, 4, 0)], prefilled(4, float("nan")), 1)
    write(lane.cache, 0, 4, 5, float("inf"))  # left by a pass that failed
    lane.remove(lane.rows[0])
    assert not any(map(any, contents(lane.cache, lane.cache.slots)))
    assert kv.make_room(lane, rows=20, length=300)
    assert not any(map(any, contents(lane.cache, lane.cache.slots)))
