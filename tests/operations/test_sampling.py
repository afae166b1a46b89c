"""Samplers and samples over a real store; only the hosts are make-believe."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.operations.parts import ANN, MODEL, Parts, open_parts
from twinkle_dask import packing
from twinkle_dask.cluster.commands import Cancel, Sample
from twinkle_dask.errors import (
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    SessionEnded,
    StorageFailed,
)
from twinkle_dask.operations import drawing
from twinkle_dask.operations.drawing import Draw
from twinkle_dask.operations.requests import SaveForSampler
from twinkle_dask.operations.values import Failed, Tenant, Ticket
from twinkle_dask.types import (
    AdamParams,
    OptimStep,
    RunId,
    SampleRequest,
    SamplerId,
    SamplingParams,
    SessionId,
    TenantId,
    TicketId,
)

BOB = Tenant(id=TenantId("bob"), name="Bob", key_hint="")


async def a_sampler(parts: Parts) -> SamplerId:
    session = await parts.a_session()
    made = await parts.samplers.create(ANN, session, seq=0, base_model=MODEL, address=None)
    return made.sampler


async def draw(parts: Parts, sampler: SamplerId, seq: int, *, recorded: bool = False) -> Ticket:
    request = SampleRequest(
        prompt=np.array([1, 2], np.int32), params=SamplingParams(max_tokens=1), recorded=recorded
    )
    return await parts.sampling.sample(ANN, sampler, seq=seq, request=request)


async def failure(parts: Parts, ticket: TicketId) -> str:
    outcome = await parts.tickets.wait(ANN.id, ticket, 5)
    assert isinstance(outcome, Failed)
    return outcome.error.message


async def save_inflight(parts: Parts, run: RunId, session: SessionId, seq: int) -> SamplerId:
    sampler = SamplerId(f"{session}:sample:{seq}")
    request = SaveForSampler(
        name=None,
        sampler=sampler,
        sampler_seq=seq,
        ttl_s=None,
        user_metadata={},
        checkpoint_id=f"c{seq}",
        folder=f"checkpoints/{run}/c{seq}",
        inflight=True,
    )
    ticket = await parts.runs.submit(ANN, run, seq=None, make=lambda _lane, _model: request)
    await parts.done(ticket.id)
    return sampler


def drawn_with(parts: Parts) -> list[str | None]:
    return [command.adapter for command in parts.host.commands if isinstance(command, Sample)]


async def settled() -> None:
    """Let everything happen that is about to."""
    for _ in range(20):
        await asyncio.sleep(0.001)


# ---- cancelling


async def test_a_cancelled_sample_leaves_nothing_behind(parts: Parts) -> None:
    sampler = await a_sampler(parts)
    parts.host.open.clear()
    ticket = await draw(parts, sampler, 0)
    await settled()
    assert parts.quotas.samples.held(ANN.id) == 1
    await parts.sampling.cancel(ANN, ticket.id)
    assert "cancelled" in await failure(parts, ticket.id)
    assert parts.quotas.samples.held(ANN.id) == parts.quotas.queued_bytes.held(ANN.id) == 0
    await settled()
    assert [type(command) for command in parts.host.commands] == [Sample, Cancel]
    await parts.sampling.cancel(ANN, ticket.id)  # once more changes nothing
    assert await draw(parts, sampler, 0) == ticket


async def test_a_sample_that_waits_for_a_host_can_be_cancelled(parts: Parts) -> None:
    sampler = await a_sampler(parts)
    parts.host.up.clear()
    ticket = await draw(parts, sampler, 0)
    await parts.sampling.cancel(ANN, ticket.id)
    assert "cancelled" in await failure(parts, ticket.id)
    parts.host.up.set()
    await settled()
    assert parts.host.commands == []
    assert parts.quotas.samples.held(ANN.id) == 0


async def test_a_finished_sample_keeps_its_result(parts: Parts) -> None:
    ticket = await draw(parts, await a_sampler(parts), 0)
    await parts.done(ticket.id)
    await parts.sampling.cancel(ANN, ticket.id)
    await parts.done(ticket.id)


async def test_only_its_tenant_cancels_a_sample_and_nobody_a_step(parts: Parts) -> None:
    sampler = await a_sampler(parts)
    session = await parts.a_session()
    run = await parts.a_run(session)
    parts.host.open.clear()
    ticket = await draw(parts, sampler, 0)
    for tenant, unknown in ((BOB, ticket.id), (ANN, TicketId("none"))):
        with pytest.raises(NotFound):
            await parts.sampling.cancel(tenant, unknown)
    step = OptimStep(adam=AdamParams())
    queued = await parts.runs.submit(ANN, run, seq=1, make=lambda _lane, _model: step)
    with pytest.raises(InvalidRequest, match="Only samples"):
        await parts.sampling.cancel(ANN, queued.id)
    parts.host.open.set()
    await parts.done(ticket.id)
    await parts.done(queued.id)


async def test_a_full_quota_has_room_again_once_something_is_cancelled(parts: Parts) -> None:
    sampler = await a_sampler(parts)
    parts.host.open.clear()
    limit = 20_000
    first = await draw(parts, sampler, 0)
    parts.quotas.samples.restore(ANN.id, limit - 1)
    with pytest.raises(QuotaExceeded):
        await draw(parts, sampler, 1)
    await parts.sampling.cancel(ANN, first.id)
    await draw(parts, sampler, 1)
    parts.quotas.samples.remove(ANN.id, limit - 1)


# ---- clones


async def test_numbers_of_clones_are_never_given_twice(tmp_path: Path) -> None:
    async with open_parts(tmp_path) as before:
        sampler = await a_sampler(before)
        given = await asyncio.gather(*(before.samplers.join(ANN, sampler) for _ in range(20)))
        assert sorted(given) == list(range(1, 21))
        with pytest.raises(NotFound):
            await before.samplers.join(BOB, sampler)
    async with open_parts(tmp_path) as after:
        assert await after.samplers.join(ANN, sampler) == 21
        await after.end(SessionId(sampler.partition(":")[0]))
        with pytest.raises(SessionEnded):
            await after.samplers.join(ANN, sampler)


# ---- inflight weights


async def test_all_inflight_samplers_follow_the_latest_save(parts: Parts) -> None:
    session = await parts.a_session()
    run = await parts.a_run(session)
    samplers = [await save_inflight(parts, run, session, seq) for seq in range(3)]
    for seq, sampler in enumerate(samplers):
        await parts.done((await draw(parts, sampler, seq)).id)
    assert drawn_with(parts) == [f"checkpoints/{run}/c2"] * 3
    await parts.closing.close_ended()
    assert [path.parent.name for path in parts.files("checkpoints")] == ["c2"]
    for sampler in samplers:
        assert (await parts.samplers.info(ANN, sampler)).address is None


async def test_weights_in_use_outlive_newer_ones(parts: Parts) -> None:
    session = await parts.a_session()
    run = await parts.a_run(session)
    first = await save_inflight(parts, run, session, 0)
    parts.host.drawing.clear()
    ticket = await draw(parts, first, 0)
    await settled()
    await save_inflight(parts, run, session, 1)
    await parts.closing.close_ended()
    assert {path.parent.name for path in parts.files("checkpoints")} == {"c0", "c1"}
    parts.host.drawing.set()
    await parts.done(ticket.id)
    await parts.closing.close_ended()
    assert [path.parent.name for path in parts.files("checkpoints")] == ["c1"]


async def test_a_restart_forgets_no_inflight_weights(tmp_path: Path) -> None:
    async with open_parts(tmp_path) as before:
        session = await before.a_session()
        run = await before.a_run(session)
        sampler = await save_inflight(before, run, session, 0)
        await save_inflight(before, run, session, 1)
    async with open_parts(tmp_path) as after:
        await after.closing.close_ended()
        await after.done((await draw(after, sampler, 7)).id)
        assert drawn_with(after) == [f"checkpoints/{run}/c1"]
        await after.end(session)
        await after.upkeep.tidy()
        await after.upkeep.tidy()
        assert after.files("checkpoints") == []


# ---- recorded samples


async def test_recorded_samples_last_as_long_as_their_session(parts: Parts) -> None:
    session = await parts.a_session()
    made = await parts.samplers.create(ANN, session, seq=0, base_model=MODEL, address=None)
    recorded = await draw(parts, made.sampler, 0, recorded=True)
    other = await draw(parts, made.sampler, 1)
    for ticket in (recorded, other):
        await parts.done(ticket.id)
    both = (recorded.id, other.id)
    found = await parts.recording.find(ANN.id, session, both)
    assert set(found) == {recorded.id}
    assert found[recorded.id].prompt.tolist() == [1, 2]
    assert await parts.recording.find(BOB.id, session, both) == {}
    assert await parts.recording.find(ANN.id, SessionId("other"), both) == {}
    await parts.end(session)
    await parts.upkeep.tidy()
    assert await parts.recording.find(ANN.id, session, both) == {}


# ---- outcomes that are hard to store


def lose_answers(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    """Let the first call of a function do its work and fail, as where a connection breaks."""
    work = getattr(owner, name)

    async def once(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, work)
        await work(*args, **kwargs)
        raise StorageFailed("The connection broke.")

    monkeypatch.setattr(owner, name, once)


@pytest.mark.parametrize("name", ["finish", "fail"])
async def test_an_outcome_whose_commit_was_not_answered_is_given(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(drawing, "_RETRY_S", 0.0)
    sampler = await a_sampler(parts)
    lose_answers(monkeypatch, parts.store.journal, name)
    if name == "fail":
        parts.host.open.clear()
    ticket = await draw(parts, sampler, 0)
    if name == "fail":
        await settled()
        await parts.sampling.cancel(ANN, ticket.id)
        assert "cancelled" in await failure(parts, ticket.id)
    else:
        await parts.done(ticket.id)
    assert parts.quotas.queued_bytes.held(ANN.id) == 0


async def test_a_result_that_cannot_be_taken_is_a_failure(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(*_: Any) -> None:
        raise packing.UnreadableBuffer("damaged")

    monkeypatch.setattr(parts.recording, "add", breaks)
    ticket = await draw(parts, await a_sampler(parts), 0, recorded=True)
    assert "log has the details" in await failure(parts, ticket.id)
    await settled()
    assert parts.quotas.samples.held(ANN.id) == 0


async def test_a_store_that_is_away_does_not_lose_a_failure(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "_RETRY_S", 0.0)
    sampler = await a_sampler(parts)

    async def unreadable(_draw: Draw) -> bytes:
        raise StorageFailed("The weights cannot be read.")

    monkeypatch.setattr(parts.sampling._drawing, "_attempt", unreadable)  # pyright: ignore[reportPrivateUsage]
    lose_answers(monkeypatch, parts.samplers, "is_deleted")
    ticket = await draw(parts, sampler, 0)
    assert "cannot be read" in await failure(parts, ticket.id)
