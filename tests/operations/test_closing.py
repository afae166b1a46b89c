"""What an ended session leaves: results and named checkpoints, and nothing else."""

import asyncio
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from tests.operations.parts import ANN, Parts, open_parts
from twinkle_dask.clock import utc_now
from twinkle_dask.cluster.commands import DropRun
from twinkle_dask.errors import SessionEnded, StorageFailed
from twinkle_dask.operations.lanes import Lane
from twinkle_dask.operations.requests import LaneRequest, SaveForSampler
from twinkle_dask.operations.sweeping import sweep
from twinkle_dask.operations.values import ServedModel, Ticket, TicketKind
from twinkle_dask.store.records import OperationRecord, RunPhase
from twinkle_dask.types import (
    AdamParams,
    OptimStep,
    RunId,
    SampleRequest,
    SamplerId,
    SamplingParams,
    SessionId,
    TicketId,
)


async def step(parts: Parts, run: RunId) -> Ticket:
    def make(_lane: Lane, _model: ServedModel) -> LaneRequest:
        return OptimStep(adam=AdamParams())

    return await parts.runs.submit(ANN, run, seq=None, make=make)


async def save(parts: Parts, run: RunId, session: SessionId, name: str | None) -> SamplerId:
    """Weights for samplers, under a name or for one sampler only."""
    sampler = SamplerId(f"{session}:sample:0")

    def make(_lane: Lane, _model: ServedModel) -> LaneRequest:
        return SaveForSampler(
            name=name,
            sampler=None if name else sampler,
            sampler_seq=None if name else 0,
            ttl_s=None,
            user_metadata={},
            checkpoint_id=name or "unnamed",
            folder=f"checkpoints/{name or 'unnamed'}",
        )

    await parts.done((await parts.runs.submit(ANN, run, seq=None, make=make)).id)
    return sampler


async def a_used_run(parts: Parts, session: SessionId) -> RunId:
    """One with a snapshot and something in the journal behind it."""
    run = await parts.a_run(session)
    for _ in range(4):
        await parts.done((await step(parts, run)).id)
    async with asyncio.timeout(5):
        while (await phase(parts, run))[1] is None:  # noqa: ASYNC110 - the lane has no event
            await asyncio.sleep(0.01)
    await parts.done((await step(parts, run)).id)
    return run


async def phase(parts: Parts, run: RunId) -> tuple[RunPhase, str | None]:
    record = await parts.store.runs.get(ANN.id, run)
    assert record is not None
    return record.state, record.snapshot_path


async def tidy_until_closed(parts: Parts, run: RunId) -> None:
    async with asyncio.timeout(5):
        while (await phase(parts, run))[0] is not RunPhase.CLOSED:
            await parts.upkeep.tidy()
            await asyncio.sleep(0.01)


async def test_a_run_is_closed_with_all_that_only_it_needed(parts: Parts) -> None:
    session = await parts.a_session()
    run = await a_used_run(parts, session)
    await save(parts, run, session, None)
    await save(parts, run, session, "kept")
    assert parts.files("journal")
    await parts.upkeep.tidy()
    assert (await phase(parts, run))[0] is RunPhase.READY
    lane = weakref.ref(await parts.runs.lane(ANN, run))
    await parts.end(session)
    await tidy_until_closed(parts, run)
    await parts.upkeep.tidy()
    assert parts.files("journal") == parts.files("results") == parts.files("snapshots") == []
    assert not list(parts.folder.glob("blobs/snapshots/*"))
    assert [path.parent.name for path in parts.files("checkpoints")] == ["kept"]
    assert isinstance(parts.host.commands[-1], DropRun)
    assert parts.host.load == 0
    assert not parts.runs.has_lane(run)
    gc.collect()
    assert lane() is None
    assert run not in {task.get_name().removeprefix("lane ") for task in asyncio.all_tasks()}
    with pytest.raises(SessionEnded):
        await step(parts, run)


async def test_work_acknowledged_before_the_end_is_done_first(parts: Parts) -> None:
    session = await parts.a_session()
    run = await parts.a_run(session)
    parts.host.open.clear()
    ticket = await step(parts, run)
    await parts.end(session)
    for _ in range(3):
        await parts.upkeep.tidy()
        await asyncio.sleep(0.01)
    assert (await phase(parts, run))[0] is RunPhase.READY
    parts.host.open.set()
    await asyncio.sleep(0.1)
    await parts.closing.close_ended()
    await asyncio.sleep(0.1)
    await parts.closing.close_ended()
    assert (await phase(parts, run))[0] is RunPhase.CLOSED
    assert parts.files("journal") == []
    await parts.done(ticket.id)  # the result is there until it was delivered


async def test_weights_stay_until_the_last_sample_is_drawn(parts: Parts) -> None:
    session = await parts.a_session()
    run = await parts.a_run(session)
    sampler = await save(parts, run, session, None)
    parts.host.open.clear()
    request = SampleRequest(prompt=np.array([1, 2], np.int32), params=SamplingParams(max_tokens=1))
    ticket = await parts.sampling.sample(ANN, sampler, seq=1, request=request)
    await parts.end(session)
    await tidy_until_closed(parts, run)
    await parts.upkeep.tidy()
    assert parts.files("checkpoints")
    parts.host.open.set()
    await parts.done(ticket.id)
    await parts.upkeep.tidy()
    assert parts.files("checkpoints") == []


async def test_runs_without_a_lane_are_closed_after_a_restart(tmp_path: Path) -> None:
    async with open_parts(tmp_path) as before:
        session = await before.a_session()
        run = await a_used_run(before, session)
        await before.end(session)
    async with open_parts(tmp_path) as after:
        await sweep(after.store, after.blobs)  # a snapshot may have been under way
        await after.closing.close_ended()
        assert await phase(after, run) == (RunPhase.CLOSED, None)
        assert after.files("journal") == after.files("snapshots") == []


async def test_a_run_of_an_expired_session_counts_no_more(parts: Parts) -> None:
    run = await parts.a_run(await parts.a_session())
    assert parts.quotas.runs.held(ANN.id) == 1
    await parts.sessions.expire(0)
    await tidy_until_closed(parts, run)
    assert parts.quotas.runs.held(ANN.id) == 0


async def test_a_run_of_a_session_that_is_alive_is_left_alone(parts: Parts) -> None:
    session = await parts.a_session()
    run = await a_used_run(parts, session)
    for _ in range(3):
        await parts.upkeep.tidy()
    assert (await phase(parts, run))[0] is RunPhase.READY
    assert parts.files("snapshots")
    assert DropRun() not in parts.host.commands[1:]  # the first one is before the restore
    await parts.done((await step(parts, run)).id)


async def test_two_first_requests_of_a_run_share_one_lane(tmp_path: Path) -> None:
    async with open_parts(tmp_path) as before:
        run = await before.a_run(await before.a_session())
    async with open_parts(tmp_path) as after:
        lanes = await asyncio.gather(*(after.runs.lane(ANN, run) for _ in range(5)))
        assert len(set(lanes)) == 1


async def test_a_place_that_is_taken_already_leaves_no_payload(parts: Parts) -> None:
    run = await parts.a_run(await parts.a_session())
    taken = OperationRecord(
        ticket_id=TicketId("first"),
        tenant_id=ANN.id,
        kind=TicketKind.OPTIM_STEP,
        run_id=run,
        seq=1,
        created_at=utc_now(),
    )
    await parts.store.journal.add(taken)
    await parts.store.journal.fail(taken.ticket_id, kind="X", message="", when=utc_now())
    held = parts.files("journal")
    assert (await step(parts, run)).id == taken.ticket_id
    assert parts.files("journal") == held


async def test_the_payload_of_a_submit_that_could_not_be_journaled_is_swept_up(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await parts.a_run(await parts.a_session())
    held = parts.files("journal")

    async def full(_operation: object) -> None:
        raise StorageFailed("disk full")

    monkeypatch.setattr(parts.store.journal, "add", full)
    with pytest.raises(StorageFailed):
        await step(parts, run)
    await sweep(parts.store, parts.blobs)
    assert parts.files("journal") == held
