"""Processors as durable records: over restarts, within quotas, and gone with their session."""

import asyncio
import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.operations.parts import ANN, Parts, open_parts
from twinkle_dask.config import LimitConfig
from twinkle_dask.errors import InvalidRequest, NotFound, QuotaExceeded, SessionEnded
from twinkle_dask.operations.sweeping import sweep
from twinkle_dask.types import SessionId


def meta(count: int) -> str:
    rows = [{"n": i} for i in range(count)]
    return json.dumps({"_TWINKLE_TYPE_": "DatasetMeta", "data": rows})


async def a_dataset(parts: Parts, session: SessionId, count: int = 4) -> str:
    arguments = {"dataset_meta": meta(count), "device_mesh": None}
    return await parts.processors.create(ANN, session, "dataset", "Dataset", arguments)


async def a_loader(parts: Parts, session: SessionId, dataset: str) -> str:
    arguments = {"dataset": dataset, "batch_size": 2}
    return await parts.processors.create(ANN, session, "dataloader", "DataLoader", arguments)


async def call(parts: Parts, pid: str, function: str, **arguments: Any) -> Any:
    called = await parts.processors.call(ANN, pid, function, arguments)
    return StopIteration if called.over else orjson.loads(called.result)


async def test_a_loader_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with open_parts(tmp_path) as parts:
        session = await parts.a_session()
        dataset = await a_dataset(parts, session)
        loader = await a_loader(parts, session, dataset)
        await call(parts, loader, "__iter__")
        assert await call(parts, loader, "__next__") == [{"n": 0}, {"n": 1}]
    async with open_parts(tmp_path) as parts:
        await sweep(parts.store, parts.blobs)
        assert await call(parts, loader, "__next__") == [{"n": 2}, {"n": 3}]
        assert await call(parts, loader, "__next__") is StopIteration
        assert await call(parts, dataset, "__len__") == 4


async def test_what_ended_sessions_had_is_removed(parts: Parts) -> None:
    session = await parts.a_session()
    dataset = await a_dataset(parts, session)
    await call(parts, dataset, "save_as", output_path="kept.jsonl")
    assert len(parts.files("processors")) == 1
    await parts.end(session)
    await parts.closing.close_ended()
    assert parts.files("processors") == []
    with pytest.raises(NotFound):
        await call(parts, dataset, "__len__")
    with pytest.raises(SessionEnded):
        await a_dataset(parts, session)
    # Saved data are the tenant's, not the session's.
    assert len(parts.files("saved-data")) == 1


async def test_rows_that_were_replaced_are_removed(parts: Parts) -> None:
    dataset = await a_dataset(parts, await parts.a_session())
    keep = {"column": "n", "values": [1]}
    await call(parts, dataset, "filter", filter_func="EqualsFilter", init_args=keep)
    assert len(parts.files("processors")) == 1
    for _ in range(2):
        await call(parts, dataset, "save_as", output_path="same.csv")
    assert len(parts.files("saved-data")) == 1


async def test_files_without_a_record_are_swept(parts: Parts) -> None:
    dataset = await a_dataset(parts, await parts.a_session())
    parts.blobs.put("processors/nobody/x.arrow", b"x")
    parts.blobs.put("saved-data/ann/x.jsonl", b"x")
    await sweep(parts.store, parts.blobs)
    assert len(parts.files("processors")) == 1
    assert parts.files("saved-data") == []
    assert await call(parts, dataset, "__len__") == 4


async def test_bytes_and_numbers_are_limited(tmp_path: Path) -> None:
    limits = LimitConfig(processor_bytes=20_000, max_processors=3, max_inline_bytes=100_000)
    async with open_parts(tmp_path, limits) as parts:
        session = await parts.a_session()
        first = await a_dataset(parts, session, 1000)
        with pytest.raises(QuotaExceeded, match="quota") as caught:
            await a_dataset(parts, session, 2000)
        assert caught.value.retry_after_s == 30.0  # as the CPU worker said
        with pytest.raises(InvalidRequest, match="100000"):
            await a_dataset(parts, session, 20_000)
        # It may be replaced by as much as it is.
        every = {"columns": ["n"]}
        await call(parts, first, "filter", filter_func="NotEmptyFilter", init_args=every)
        made = await asyncio.gather(
            *(a_dataset(parts, session, 1) for _ in range(4)), return_exceptions=True
        )
        assert sum(isinstance(one, QuotaExceeded) for one in made) == 2
        assert len(parts.files("processors")) == 3


async def test_a_call_that_fails_changes_nothing(parts: Parts) -> None:
    dataset = await a_dataset(parts, await parts.a_session())
    with pytest.raises(InvalidRequest, match="question"):
        await call(parts, dataset, "map", preprocess_func="GSM8KProcessor")
    assert len(parts.files("processors")) == 1
    assert await call(parts, dataset, "__getitem__", idx=3) == {"n": 3}


async def test_calls_of_one_loader_take_turns(parts: Parts) -> None:
    session = await parts.a_session()
    loader = await a_loader(parts, session, await a_dataset(parts, session, 20))
    await call(parts, loader, "__iter__")
    batches = await asyncio.gather(*(call(parts, loader, "__next__") for _ in range(10)))
    assert sorted(row["n"] for batch in batches for row in batch) == list(range(20))
