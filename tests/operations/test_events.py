"""Whoever polls for many results learns of each of them, whatever is forgotten in between."""

import asyncio
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.operations.parts import ANN, MODEL, Parts
from twinkle_dask.clock import utc_now
from twinkle_dask.operations.events import SEQS_PER_CLONE, Clone, Completion, Events
from twinkle_dask.store.records import OperationRecord, OperationState
from twinkle_dask.types import SampleRequest, SamplerId, SamplingParams, TenantId, TicketId

SAMPLER = SamplerId("s:sample:0")
CLONE = Clone(SAMPLER, 0)


@dataclass
class FakeJournal:
    """What has ended and was not delivered."""

    unread_records: dict[TicketId, OperationRecord] = field(
        default_factory=dict[TicketId, OperationRecord]
    )

    async def unread(
        self, sampler: SamplerId, *, first_seq: int, end_seq: int
    ) -> tuple[OperationRecord, ...]:
        await asyncio.sleep(0)
        return tuple(
            record
            for record in self.unread_records.values()
            if record.sampler_id == sampler and first_seq <= (record.seq or 0) < end_seq
        )


@dataclass
class World:
    """A gateway that may restart, and the journal beside it."""

    journal: FakeJournal = field(default_factory=FakeJournal)
    number: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.events = Events(self)  # pyright: ignore[reportArgumentType]

    def end(self, *, failed: bool = False, clone: int = 0) -> TicketId:
        ticket = TicketId(f"t{self.number}")
        seq = clone * SEQS_PER_CLONE + self.number
        self.number += 1
        self.journal.unread_records[ticket] = OperationRecord(
            ticket_id=ticket,
            tenant_id=TenantId("t"),
            kind="sample",
            sampler_id=SAMPLER,
            seq=seq,
            state=OperationState.FAILED if failed else OperationState.DONE,
            result_bytes=0 if failed else 7,
            created_at=utc_now(),
        )
        event = Completion(ticket=ticket, num_bytes=None if failed else 7)
        self.events.add(SAMPLER, seq, event)
        return ticket


@given(st.lists(st.sampled_from(["end", "fail", "poll", "lost poll", "forget", "restart"])))
def test_every_result_is_told_and_in_order(story: list[str]) -> None:
    async def run() -> None:
        world = World()
        ended: list[TicketId] = []
        told: list[TicketId] = []
        cursor = 0
        for what in [*story, "poll", "poll"]:
            match what:
                case "end" | "fail":
                    ended.append(world.end(failed=what == "fail"))
                case "restart":
                    world.restart()
                case "forget":
                    world.events.forget_idle(-1)
                case _:
                    answer = await world.events.wait(CLONE, after=cursor, timeout_s=0)
                    if what == "poll":
                        assert answer.cursor >= cursor
                        cursor = answer.cursor
                        for event in answer.items:
                            # The client fetches what it did not know before.
                            if event.ticket not in told:
                                told.append(event.ticket)
                                del world.journal.unread_records[event.ticket]
        assert told == ended

    asyncio.run(run())


async def test_an_event_is_told_until_it_is_acknowledged() -> None:
    world = World()
    first = await world.events.wait(CLONE, after=0, timeout_s=0)
    ticket = world.end()
    answer = await world.events.wait(CLONE, after=first.cursor, timeout_s=0)
    assert [event.ticket for event in answer.items] == [ticket]
    assert await world.events.wait(CLONE, after=first.cursor, timeout_s=0) == answer
    world.journal.unread_records.clear()
    assert (await world.events.wait(CLONE, after=answer.cursor, timeout_s=0)).items == ()
    assert (await world.events.wait(CLONE, after=first.cursor, timeout_s=0)).items == ()


async def test_a_poll_ends_with_the_first_event() -> None:
    world = World()
    polls = [asyncio.create_task(world.events.wait(CLONE, after=0, timeout_s=60)) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert not any(poll.done() for poll in polls)
    ticket = world.end(failed=True)
    for answer in await asyncio.gather(*polls):
        assert answer.items == (Completion(ticket=ticket, num_bytes=None),)


async def test_a_poll_without_events_ends_with_its_time() -> None:
    world = World()
    answer = await world.events.wait(CLONE, after=5, timeout_s=0.01)
    assert answer.items == ()
    assert answer.cursor >= 5


async def test_each_clone_learns_of_its_own_alone() -> None:
    world = World()
    other = Clone(SAMPLER, 10**8)
    for clone in (CLONE, other):
        await world.events.wait(clone, after=0, timeout_s=0)
    tickets = {clone: world.end(clone=clone.number) for clone in (CLONE, other)}
    for clone, ticket in tickets.items():
        answer = await world.events.wait(clone, after=0, timeout_s=0)
        assert [event.ticket for event in answer.items] == [ticket]


async def test_an_answer_is_bounded_and_what_nobody_reads_is_forgotten() -> None:
    world = World()
    cursor = (await world.events.wait(CLONE, after=0, timeout_s=0)).cursor
    tickets = [world.end() for _ in range(2_500)]
    told: list[TicketId] = []
    for size in (1_000, 1_000, 500):
        answer = await world.events.wait(CLONE, after=cursor, timeout_s=0)
        assert len(answer.items) == size
        cursor = answer.cursor
        told += [event.ticket for event in answer.items]
    assert told == tickets
    for ticket in tickets:
        del world.journal.unread_records[ticket]
    later = [world.end() for _ in range(20_001)]  # the log is given up on its way
    told = []
    while len(told) < len(later):
        answer = await world.events.wait(CLONE, after=cursor, timeout_s=0)
        cursor = answer.cursor
        told += [event.ticket for event in answer.items]
    assert told == later


async def test_what_ended_before_the_first_poll_is_in_the_journal(parts: Parts) -> None:
    session = await parts.a_session()
    made = await parts.samplers.create(ANN, session, seq=0, base_model=MODEL, address=None)
    params = SamplingParams(max_tokens=1)
    request = SampleRequest(prompt=np.array([1], np.int32), params=params)
    tickets = [
        await parts.sampling.sample(ANN, made.sampler, seq=seq, request=request)
        for seq in (0, 1, 10**18 + 3)
    ]
    for ticket in tickets:
        await parts.done(ticket.id)
    for number, expected in ((0, 2), (10**9, 1), (1, 0)):
        answer = await parts.sampling.completions(
            ANN, Clone(made.sampler, number), after=0, retrieved=(), timeout_s=0
        )
        assert len(answer.items) == expected
        assert all(event.num_bytes for event in answer.items)
    await parts.upkeep.flush()  # now they count as delivered
    parts.events.forget_idle(-1)
    again = await parts.sampling.completions(
        ANN, Clone(made.sampler, 0), after=0, retrieved=(), timeout_s=0
    )
    assert again.items == ()
