"""A batch that waits for its backward pass is a blob, which goes when nobody needs it."""

import asyncio

from tests.operations.parts import ANN, Parts
from twinkle_dask.clock import utc_now
from twinkle_dask.operations.sweeping import sweep
from twinkle_dask.store.records import RunPhase, RunSettingsRecord
from twinkle_dask.types import RunId


async def a_waiting_batch(parts: Parts, run: RunId, path: str) -> None:
    parts.blobs.put(path, b"batch")
    await parts.store.run_settings.add(
        RunSettingsRecord(
            run_id=run, tenant_id=ANN.id, settings={}, progress={}, created_at=utc_now()
        )
    )
    await parts.store.run_settings.set_pending(run, path, {})


async def test_it_survives_a_sweep_and_others_do_not(parts: Parts) -> None:
    run = await parts.a_run(await parts.a_session())
    await a_waiting_batch(parts, run, "pending/named")
    parts.blobs.put("pending/orphan", b"batch")
    await sweep(parts.store, parts.blobs)
    assert parts.blobs.names("pending") == ("named",)


async def test_it_goes_with_its_run(parts: Parts) -> None:
    session = await parts.a_session()
    run = await parts.a_run(session)
    await a_waiting_batch(parts, run, "pending/named")
    await parts.end(session)
    async with asyncio.timeout(5):
        while True:
            record = await parts.store.runs.get(ANN.id, run)
            if record is not None and record.state is RunPhase.CLOSED:
                break
            await parts.upkeep.tidy()
            await asyncio.sleep(0.01)
    assert parts.blobs.names("pending") == ()
    assert await parts.store.run_settings.get(ANN.id, run) is None
