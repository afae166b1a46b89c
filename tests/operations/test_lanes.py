"""A lane against hosts that may go at any moment: order, exactly one effect, one outcome."""

import asyncio
import random
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle_dask import packing
from twinkle_dask.clock import utc_now
from twinkle_dask.cluster.commands import (
    Command,
    CreateRun,
    DropRun,
    FolderSaved,
    LoadFolder,
    SaveFolder,
)
from twinkle_dask.config import JournalConfig
from twinkle_dask.errors import HostLost, ServiceFault, StorageFailed, TwinkleDaskError
from twinkle_dask.operations.lanes import Lane, LaneOperation, LaneParts
from twinkle_dask.operations.requests import (
    LaneRequest,
    SaveForSampler,
    StartRun,
    changes_run,
    kind_of,
)
from twinkle_dask.store.records import OperationRecord, OperationState, RunRecord
from twinkle_dask.types import (
    AdamParams,
    GradientStep,
    GradientStepResult,
    LoraSpec,
    OptimizerSpec,
    OptimStep,
    RunId,
    SessionId,
    StepResult,
    TenantId,
    TicketId,
)

RUN = RunId("s:train:0")
SPEC = LoraSpec(rank=1, seed=1)


@dataclass
class World:
    """Folders that outlive hosts, and the journal."""

    folders: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    records: dict[int, OperationRecord] = field(default_factory=dict[int, OperationRecord])
    payloads: dict[str, bytes] = field(default_factory=dict[str, bytes])
    outcomes: dict[int, list[Any]] = field(default_factory=dict[int, list[Any]])
    storage_fails: int = 0


class Host:
    """Computes one run as the list of steps it has taken; answers late, or never."""

    def __init__(self, world: World, rng: random.Random, dies_after: int | None) -> None:
        self.name = "host"
        self.load = 0
        self.lost = asyncio.Event()
        self.steps: list[int] | None = None
        self._world = world
        self._rng = rng
        self._left = dies_after
        self._waiting: list[asyncio.Future[bytes]] = []

    def send(self, command: Command, on_part: object = None) -> "asyncio.Future[bytes]":
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self.lost.is_set():
            future.set_exception(HostLost("gone"))
            return future
        self._waiting.append(future)
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                asyncio.get_running_loop().call_soon(self.die)
                return future
        answer = self._apply(command)
        delay_s = self._rng.choice([0, 0, 0.001, 0.003])
        asyncio.get_running_loop().call_later(delay_s, self._answer, future, answer)
        return future

    def live_on(self) -> None:
        """Die no more."""
        self._left = None

    def die(self) -> None:
        self.lost.set()
        for future in self._waiting:
            if not future.done():
                future.set_exception(HostLost("gone"))

    def _answer(self, future: "asyncio.Future[bytes]", answer: object) -> None:
        if not future.done():
            future.set_result(b"" if answer is None else packing.pack(answer))

    def _apply(self, command: Command) -> object:
        match packing.unpack(command.body):
            case DropRun():
                self.steps = None
            case CreateRun():
                assert self.steps is None
                self.steps = []
            case LoadFolder(folder=folder):
                self.steps = list(self._world.folders[folder])
            case SaveFolder(folder=folder):
                assert self.steps is not None
                self._world.folders[folder] = list(self.steps)
                return FolderSaved(num_bytes=1)
            case OptimStep(adam=adam):
                assert self.steps is not None
                self.steps.append(int(adam.learning_rate))
                return StepResult(metrics={"grad_norm:mean": adam.learning_rate})
            case GradientStep(accumulation=seq):
                assert self.steps is not None
                self.steps.append(seq)
                return GradientStepResult(done=True, grad_norm=None, learning_rate=None, steps=seq)
            case other:
                raise AssertionError(other)
        return None


class Supervisor:
    """Gives out hosts one after the other."""

    def __init__(self, hosts: list[Host]) -> None:
        self._hosts = hosts

    async def trainer(self, _source: str) -> Host:
        await asyncio.sleep(0)
        return next(host for host in self._hosts if not host.lost.is_set())


class Store:
    """The few methods of the store that a lane uses."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.journal = self.runs = self

    async def for_run(self, _run: RunId, *, after_seq: int) -> tuple[OperationRecord, ...]:
        await asyncio.sleep(0)
        return tuple(self._world.records[s] for s in sorted(self._world.records) if s > after_seq)

    async def set_snapshot(self, _run: RunId, path: str, _seq: int) -> str | None:
        await asyncio.sleep(0.001)
        return None

    async def prune_replayed(self, _run: RunId, *, up_to_seq: int) -> tuple[str, ...]:
        await asyncio.sleep(0.001)
        for seq, record in self._world.records.items():
            if seq <= up_to_seq:
                self._world.records[seq] = replace(record, payload_path=None)
        return ()


class Blobs:
    def __init__(self, world: World) -> None:
        self._world = world

    def get(self, path: str) -> bytes:
        return self._world.payloads[path]

    def remove(self, _path: str) -> None:
        pass


def a_run() -> RunRecord:
    now = utc_now()
    return RunRecord(
        id=RUN,
        session_id=SessionId("s"),
        tenant_id=TenantId("t"),
        run_seq=0,
        base_model="m",
        spec=SPEC,
        created_at=now,
        last_request_at=now,
    )


def a_lane(world: World, hosts: list[Host], every: int = 3) -> Lane:
    async def finish(
        _run: RunRecord, operation: LaneOperation, outcome: bytes | TwinkleDaskError
    ) -> None:
        await asyncio.sleep(0.001)
        if world.storage_fails > 0:
            world.storage_fails -= 1
            raise StorageFailed("the disk is full")
        world.outcomes.setdefault(operation.seq, []).append(outcome)
        failed = isinstance(outcome, TwinkleDaskError)
        state = OperationState.FAILED if failed else OperationState.DONE
        world.records[operation.seq] = replace(world.records[operation.seq], state=state)

    parts = LaneParts(
        store=cast(Any, Store(world)),
        blobs=cast(Any, Blobs(world)),
        supervisor=cast(Any, Supervisor(hosts)),
        config=JournalConfig(snapshot_operations=every),
        finish=finish,
        suspects=asyncio.Lock(),
        sending=lambda _run: False,
    )
    return Lane(parts, a_run(), "source", 0)


def submit(world: World, lane: Lane, seq: int) -> None:
    """As ``Runs`` does: into the journal first. Every fourth operation is a save.

    Of the others one in three is a ``GradientStep``.
    """
    request: LaneRequest
    if seq == 0:
        request = StartRun(spec=SPEC)
    elif seq % 4 == 0:
        request = SaveForSampler(
            name=f"at-{seq}",
            sampler=None,
            sampler_seq=None,
            ttl_s=None,
            user_metadata={},
            checkpoint_id=str(seq),
            folder=f"saved/{seq}",
        )
    elif seq % 4 == 2:
        request = GradientStep(step=OptimizerSpec(name="SGD"), accumulation=seq)
    else:
        request = OptimStep(adam=AdamParams(learning_rate=float(seq)))
    payload, ticket = packing.pack(request), TicketId(f"t{seq}")
    world.payloads[f"p{seq}"] = payload
    world.records[seq] = OperationRecord(
        ticket_id=ticket,
        tenant_id=TenantId("t"),
        kind=kind_of(request),
        run_id=RUN,
        seq=seq,
        payload_path=f"p{seq}",
        changes_run=changes_run(request),
        created_at=utc_now(),
    )
    lane.accept(LaneOperation(ticket=ticket, seq=seq, request=request, payload=payload))


def steps_up_to(seq: int) -> list[int]:
    return [at for at in range(1, seq + 1) if at % 4]


async def finished(world: World, num: int) -> None:
    async with asyncio.timeout(20):
        while len(world.outcomes) < num:  # noqa: ASYNC110 - the world has no event for it
            await asyncio.sleep(0.002)


@given(
    deaths=st.lists(st.integers(0, 14), max_size=3),
    seed=st.integers(0, 10_000),
    pauses=st.lists(st.sampled_from([0.0, 0.0, 0.002, 0.005]), min_size=17, max_size=17),
)
@settings(max_examples=60, deadline=None)
def test_whenever_hosts_go_the_run_is_as_if_they_had_not(
    deaths: list[int], seed: int, pauses: list[float]
) -> None:
    async def story() -> None:
        world, rng = World(), random.Random(seed)
        hosts = [Host(world, rng, after) for after in deaths] + [Host(world, rng, None)]
        lane = a_lane(world, hosts)
        for seq in range(17):
            submit(world, lane, seq)
            await asyncio.sleep(pauses[seq])
        await finished(world, 17)
        # A host may still go at a snapshot behind the last outcome; the next work finds another.
        for host in hosts:
            host.live_on()
        submit(world, lane, 17)
        await finished(world, 18)
        alive = next(host for host in hosts if host.steps is not None and not host.lost.is_set())
        assert alive.steps == steps_up_to(17)
        for seq in range(4, 17, 4):
            assert world.folders[f"saved/{seq}"] == steps_up_to(seq)
        assert all(len(told) == 1 for told in world.outcomes.values())
        assert not [o for told in world.outcomes.values() for o in told if not isinstance(o, bytes)]
        await lane.stop()

    asyncio.run(story())


async def test_an_outcome_is_recorded_however_long_the_store_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("twinkle_dask.operations.lanes._RETRY_S", 0.01)
    world = World(storage_fails=5)
    host = Host(world, random.Random(1), None)
    lane = a_lane(world, [host])
    for seq in range(3):
        submit(world, lane, seq)
    await finished(world, 3)
    assert host.steps == [1, 2]
    await lane.stop()


async def test_what_takes_hosts_down_is_given_up_alone() -> None:
    world = World()
    hosts = [Host(world, random.Random(1), 3) for _ in range(10)]
    lane = a_lane(world, hosts, every=100)
    submit(world, lane, 0)
    await finished(world, 1)
    for seq in (1, 2, 3, 5, 6):
        submit(world, lane, seq)
    lane.refuse(4)
    await finished(world, 6)
    given_up = [s for s, told in world.outcomes.items() if isinstance(told[0], ServiceFault)]
    assert given_up
    assert len([host for host in hosts if host.lost.is_set()]) < 10
    await lane.stop()
