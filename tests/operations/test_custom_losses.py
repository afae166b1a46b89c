"""Custom losses as records: made once, their session's alone, and gone with it."""

from pathlib import Path

import pytest

from tests.operations.parts import ANN, Parts, open_parts
from twinkle_dask import packing
from twinkle_dask.custom_losses import Node, program_of
from twinkle_dask.errors import InvalidRequest, NotFound, NotSupported
from twinkle_dask.operations import custom_losses
from twinkle_dask.operations.custom_losses import CustomLosses
from twinkle_dask.operations.values import CustomLossCreated, Done, Tenant, Ticket
from twinkle_dask.types import CustomLoss, SessionId, TenantId

BOB = Tenant(id=TenantId("bob"), name="Bob", key_hint="5678")
RANKS = [("logprobs", 1), ("weights", 1)]
OUT = [{"tuple": [{"ref": "total"}, {"dict": {"custom/total:sum": {"ref": "total"}}}]}]
NODES = [
    Node(op="placeholder", name="logprobs", target="logprobs", args=[], kwargs={}),
    Node(op="placeholder", name="weights", target="weights", args=[], kwargs={}),
    Node(
        op="call_function",
        name="mul",
        target="operator.mul",
        args=[{"ref": "logprobs"}, {"ref": "weights"}],
        kwargs={},
    ),
    Node(op="call_method", name="total", target="sum", args=[{"ref": "mul"}], kwargs={}),
    Node(op="output", name="output", target="output", args=OUT, kwargs={}),
]


def losses_of(parts: Parts, *, enabled: bool = True) -> CustomLosses:
    return CustomLosses(parts.store, parts.sessions, parts.runs, enabled=enabled)


async def create(
    losses: CustomLosses, session: SessionId, seq: int = 0, *, tenant: Tenant = ANN
) -> Ticket:
    return await losses.create(tenant, session, seq=seq, name="mine", ranks=RANKS, nodes=NODES)


async def made(parts: Parts, ticket: Ticket) -> str:
    outcome = await parts.tickets.wait(ANN.id, ticket.id, 5)
    assert isinstance(outcome, Done)
    assert isinstance(outcome.result, CustomLossCreated)
    return outcome.result.loss


async def test_a_loss_is_made_once_and_survives_a_restart(tmp_path: Path) -> None:
    async with open_parts(tmp_path) as parts:
        session = await parts.a_session()
        run = await parts.a_run(session)
        tickets = [await create(losses_of(parts), session) for _ in range(2)]
        first, again = [await made(parts, ticket) for ticket in tickets]
        assert first == again
        assert await made(parts, await create(losses_of(parts), session, 1)) != first
    async with open_parts(tmp_path) as parts:
        assert await made(parts, tickets[0]) == first  # whoever asks late
        loss = await losses_of(parts).get(ANN, run, first)
        assert loss.name == "mine"
        assert dict(loss.ranks) == dict(RANKS)
        assert [step.operator for step in program_of(loss.graph).steps] == ["operator.mul", "sum"]
        assert packing.unpack(packing.pack(loss)) == loss  # as a batch carries it


async def test_a_loss_is_its_sessions(tmp_path: Path) -> None:
    async with open_parts(tmp_path) as parts:
        losses = losses_of(parts)
        session, other = await parts.a_session(), await parts.a_session()
        run, elsewhere = await parts.a_run(session), await parts.a_run(other)
        loss = await made(parts, await create(losses, session))
        assert isinstance(await losses.get(ANN, run, loss), CustomLoss)
        with pytest.raises(InvalidRequest, match=f"belongs to session '{session}'"):
            await losses.get(ANN, elsewhere, loss)
        with pytest.raises(NotFound):
            await losses.get(BOB, run, loss)
        with pytest.raises(NotFound):
            await create(losses, session, tenant=BOB)
        with pytest.raises(NotFound, match="no custom loss 'loss-1'"):
            await losses.get(ANN, run, "loss-1")


async def test_losses_go_with_their_session(tmp_path: Path) -> None:
    async with open_parts(tmp_path) as parts:
        session, other = await parts.a_session(), await parts.a_session()
        losses = losses_of(parts)
        await create(losses, session)
        kept = await made(parts, await create(losses, other))
        await parts.end(session)
        await parts.closing.close_ended()
        assert await parts.store.custom_losses.count(session) == 0
        assert await parts.store.custom_losses.get(ANN.id, kept) is not None


async def test_a_session_has_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_losses, "MAX_PER_SESSION", 2)
    async with open_parts(tmp_path) as parts:
        session = await parts.a_session()
        losses = losses_of(parts)
        for seq in (0, 1, 1):
            await create(losses, session, seq)
        with pytest.raises(InvalidRequest, match="may have 2 custom losses"):
            await create(losses, session, 2)
        await create(losses, session, 0)  # a repeat is no other one


async def test_an_operator_may_switch_them_off(tmp_path: Path) -> None:
    async with open_parts(tmp_path) as parts:
        with pytest.raises(NotSupported, match="your client evaluates"):
            await create(losses_of(parts, enabled=False), await parts.a_session())
