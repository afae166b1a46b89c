"""Tasks on a real CPU worker, which is killed, filled up and blocked."""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from tests.models import tiny_qwen3
from twinkle_dask import packing
from twinkle_dask.cluster import processing as module
from twinkle_dask.cluster.embedded import start_embedded, stop_embedded, use_settings
from twinkle_dask.cluster.processing import Processing
from twinkle_dask.config import ProcessingConfig
from twinkle_dask.errors import InvalidRequest, Saturated, ServiceFault
from twinkle_dask.processor.templates import TemplateSpec
from twinkle_dask.types import TenantId

pytestmark = pytest.mark.timeout(120)

ME = TenantId("me")
CONFIG = ProcessingConfig(threads=2, memory_bytes=2**30, timeout_s=60)


@asynccontextmanager
async def processing(
    config: ProcessingConfig = CONFIG, *, ours: bool = True
) -> AsyncGenerator[Processing]:
    use_settings()
    cluster = await start_embedded(0, 1, None)
    address: str = cluster.scheduler_address
    make: Any = Client
    client = await make(address, asynchronous=True, direct_to_workers=True)
    calls = Processing(
        config, lambda: client, scheduler=address if ours else None, log_level="info"
    )
    try:
        yield calls
    finally:
        await calls.close()
        await client.close()
        await stop_embedded(cluster)


def conversation(text: str, folder: Path) -> dict[str, object]:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
    return {
        "source": str(folder),
        "spec": TemplateSpec(),
        "trajectories": [{"messages": messages, "$t": "TemplateSpec"}],
        "add_generation_prompt": False,
    }


def worker_pid(calls: Processing) -> int:
    return calls._nanny.process.process.pid  # pyright: ignore[reportPrivateUsage]


async def test_tasks_are_done_again_when_their_worker_is_killed(tmp_path: Path) -> None:
    folder = tiny_qwen3(tmp_path / "tiny")
    async with processing() as calls:
        texts = [f"Is it {i}?" for i in range(12)]

        async def encode(text: str) -> Any:
            value = conversation(text, folder)
            (feature,) = await calls.call("templates.encode", value, tenant=ME)
            return feature

        first = await encode(texts[0])
        assert first["$t"] == "TemplateSpec"  # a tenant's key is no class of ours
        pid = worker_pid(calls)
        pending = [asyncio.create_task(encode(text)) for text in texts]
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        features = await asyncio.gather(*pending)
        assert worker_pid(calls) != pid
        assert [feature["messages"][0]["content"] for feature in features] == texts
        assert features[0] == first
        # What a function says of a value comes back as it was said.
        empty: list[object] = []
        broken = conversation("x", folder) | {"trajectories": [{"messages": empty}]}
        with pytest.raises(InvalidRequest, match=r"Trajectory 0: .* at least one message"):
            await calls.call("templates.encode", broken, tenant=ME)
        with pytest.raises(InvalidRequest, match="cannot be processed"):
            await calls.call("templates.encode", {"text": "\ud800"}, tenant=ME)
        with pytest.raises(ServiceFault, match="A CPU worker failed"):
            await calls.call("templates.encode", {}, tenant=ME)
        with pytest.raises(ServiceFault, match="know no function"):
            await calls.call("os.system", {}, tenant=ME)


def pretender() -> Callable[[str, bytes, str], bytes]:
    """In place of ``run``; nested, so that it travels by value."""

    def run(name: str, packed: bytes, log_level: str) -> bytes:
        import time

        from twinkle_dask import packing

        what = packing.unpack(packed)
        if what == "fill":
            held = bytearray(2**30)
            held[::4096] = b"x" * len(held[::4096])
            time.sleep(60)
        if what == "block":
            time.sleep(60)
        time.sleep(0.05)
        return packing.pack({"result": what})

    return run


async def test_who_takes_too_much_memory_or_time_is_refused_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "run", pretender())

    async def call(calls: Processing, what: str, timeout_s: float | None = None) -> Any:
        return await calls.call(
            "templates.decode", what, tenant=TenantId(what), timeout_s=timeout_s
        )

    async with processing() as calls:
        outcomes = await asyncio.gather(
            call(calls, "fill"), call(calls, "fine"), call(calls, "good"), return_exceptions=True
        )
        assert isinstance(outcomes[0], InvalidRequest)
        assert "lack of memory" in outcomes[0].message
        assert outcomes[1:] == ["fine", "good"]
        with pytest.raises(InvalidRequest, match="too long"):
            await call(calls, "block", timeout_s=2)
        # Both places are free again: the blocked thread went with its process.
        assert await asyncio.gather(call(calls, "fine"), call(calls, "good")) == ["fine", "good"]


async def test_without_a_cpu_worker_it_is_told_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Workers with GPU are never used, whatever else they carry."""
    monkeypatch.setattr(module, "_PATIENCE_WITH_OTHERS_S", 0.0)
    async with processing(ours=False) as calls:
        with pytest.raises(Saturated, match="--resources CPU=1"):
            await calls.call("templates.decode", packing.pack(None), tenant=ME)
