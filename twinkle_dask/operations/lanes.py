"""One run's way to its host: order, hand-over, and recovery, in one task per run.

The lane is the only writer of its run. Operations start in ``seq`` order and are sent to the host
without waiting for one another; the host keeps their order and runs what it can together.

Recovery is one story for every failure. The journal holds every acknowledged operation, and from
time to time the host writes a snapshot. When the host is lost, or after a restart of this process,
the run is set up on some host from its newest snapshot, the operations that came after it are done
again (their results were stored, so nobody waits for them), those that were in flight are sent
again, and the lane goes on.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import structlog

from twinkle_dask import packing
from twinkle_dask.cluster.commands import (
    Command,
    CreateRun,
    DropRun,
    LoadFolder,
    SaveFolder,
)
from twinkle_dask.cluster.link import HostLink
from twinkle_dask.cluster.supervisor import Supervisor
from twinkle_dask.config import JournalConfig
from twinkle_dask.errors import HostLost, ServiceFault, TwinkleDaskError
from twinkle_dask.lifecycle import LANE, LaneEvent, LaneState, move
from twinkle_dask.operations.requests import (
    LaneRequest,
    LoadState,
    SaveForSampler,
    SaveState,
    StartRun,
    changes_run,
)
from twinkle_dask.scheduling import RunOrder
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import OperationState, RunRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import ForwardBackward, OptimStep, TicketId

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneOperation:
    """An acknowledged operation.

    Attributes:
        payload: The packed request, as it stands in the journal.
    """

    ticket: TicketId
    seq: int
    request: LaneRequest
    payload: bytes = field(repr=False)


Finish = Callable[[RunRecord, LaneOperation, bytes | TwinkleDaskError], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneParts:
    """What every lane works with.

    Attributes:
        finish: Told the outcome of each operation, exactly once; makes it durable.
        sending: Whether a tenant is in the middle of sending a request.
    """

    store: Store
    blobs: BlobStore
    supervisor: Supervisor
    config: JournalConfig
    finish: Finish
    sending: Callable[[RunRecord], bool]


class Lane:
    """One run on its way.

    Args:
        run: Its record.
        source: Of its base model.
        next_seq: The first number that has not finished.
    """

    def __init__(self, parts: LaneParts, run: RunRecord, source: str, next_seq: int) -> None:
        self.run = run
        self.source = source
        self.order: RunOrder[LaneOperation] = RunOrder(next_seq, parts.config.gap_grace_s)
        self.state = LaneState.DETACHED
        self._parts = parts
        self._link: HostLink | None = None
        self._attempt = 0
        self._in_flight: dict[int, LaneOperation] = {}
        self._since_snapshot = 0
        self._bytes_since_snapshot = 0
        self._snapshot_wanted = False
        self._snapshotting = False
        self._release_wanted = False
        self._last_sent = next_seq - 1
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._main: asyncio.Task[None] | None = None

    @property
    def num_queued(self) -> int:
        """Operations that have no outcome yet."""
        return len(self.order) + len(self._in_flight)

    @property
    def waits_for_host(self) -> bool:
        """Whether there is work but no host to do it."""
        return self.num_queued > 0 and self.state is not LaneState.ATTACHED

    def accept(self, operation: LaneOperation) -> None:
        """Let an acknowledged operation wait for its turn."""
        self.order.add(operation.seq, operation, time.monotonic())
        if self._main is None:
            self._main = asyncio.create_task(self._run_forever(), name=f"lane {self.run.id}")
        self._wake.set()

    def refuse(self, seq: int) -> None:
        """A request with this number was refused; those behind it need not wait."""
        self.order.refuse(seq, time.monotonic())
        self._wake.set()

    def release(self) -> None:
        """Free the host's memory once nothing is in flight; work brings the run back."""
        self._release_wanted = True
        self._wake.set()

    async def stop(self) -> None:
        """End the lane's tasks; what has no outcome stays in the journal."""
        self._do(LaneEvent.CLOSE)
        tasks = [*self._tasks, *([self._main] if self._main else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _do(self, event: LaneEvent) -> None:
        self.state = move(LANE, self.state, event)

    async def _run_forever(self) -> None:
        # The request that woke the lane first is not what the lane is doing later.
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(run=self.run.id)
        while self.state is not LaneState.CLOSED:
            self._wake.clear()
            try:
                await self._turn()
            except HostLost as error:
                log.warning("lane_detached", why=error.message)
                self._detach()
                continue
            except TwinkleDaskError as error:
                log.exception("run_not_restored")
                self._detach()
                await self._fail_in_flight(error)
                continue
            except Exception:
                # A fault of ours (the store, for example). Nothing is lost: the journal has it.
                log.exception("lane_failed")
                self._detach()
                await asyncio.sleep(1.0)
                continue
            again_s = self.order.look_again_s(time.monotonic())
            if again_s is not None:
                # The time may be over already while somebody is still sending.
                again_s = max(again_s, 0.05)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), again_s)

    async def _fail_in_flight(self, why: TwinkleDaskError) -> None:
        """The run cannot be set up (its snapshot is damaged, say); the next work tries again."""
        fault = ServiceFault(
            f"The run could not be restored: {why.message} Start a new run from a checkpoint."
        )
        for seq, operation in list(self._in_flight.items()):
            await self._parts.finish(self.run, operation, fault)
            del self._in_flight[seq]

    async def _turn(self) -> None:
        """Do everything that can be done now."""
        if self._in_flight and self._link is None:
            await self._restore()
        ready = self.order.take(time.monotonic(), sending=self._parts.sending(self.run))
        for seq, operation in ready:
            # In flight from here on, so that a loss during the restore does not forget it.
            self._in_flight[seq] = operation
        if ready and self._link is None:
            await self._restore()
        elif self._link is not None:
            for _, operation in ready:
                self._send(self._link, operation)
        if self._link is not None and self._snapshot_due():
            self._start(self._snapshot(self._link))
        if self._release_wanted and not self.num_queued:
            self._release()

    def _release(self) -> None:
        self._release_wanted = False
        link, self._link = self._link, None
        if link is not None:
            link.load -= 1
            self._ignore(link.send(self._command(DropRun())))
            self._do(LaneEvent.RELEASE)

    def _detach(self) -> None:
        if self._link is not None:
            self._link.load -= 1
        self._link = None
        self._attempt += 1
        self._do(LaneEvent.HOST_LOST)
        self._wake.set()

    async def _restore(self) -> None:
        """Set the run up on a host, and send again what has no outcome."""
        if self.state is LaneState.DETACHED:
            self._do(LaneEvent.WORK)
        link = await self._parts.supervisor.trainer(self.source)
        self._ignore(link.send(self._command(DropRun())))
        again: list[asyncio.Future[bytes]] = []
        after = -1
        if self.run.snapshot_path is not None:
            load = LoadFolder(folder=self.run.snapshot_path, with_optimizer=True)
            again.append(link.send(self._command(load)))
            after = self.run.snapshot_seq
        for record in await self._parts.store.journal.for_run(self.run.id, after_seq=after):
            if record.state is not OperationState.DONE or record.seq in self._in_flight:
                continue
            if record.payload_path is None:
                continue
            payload = await asyncio.to_thread(self._parts.blobs.get, record.payload_path)
            request: LaneRequest = packing.unpack(payload)
            if changes_run(request):
                again.append(link.send(self._host_command(request, payload)))
                self._count(request, len(payload))
        if again:
            log.info("run_restored", host=link.name, repeated=len(again))
        await asyncio.gather(*again)
        self._link = link
        link.load += 1
        self._do(LaneEvent.RESTORED)
        for seq in sorted(self._in_flight):
            self._send(link, self._in_flight[seq])

    def _send(self, link: HostLink, operation: LaneOperation) -> None:
        answer = link.send(self._host_command(operation.request, operation.payload))
        self._last_sent = max(self._last_sent, operation.seq)
        self._count(operation.request, len(operation.payload))
        self._start(self._await_answer(self._attempt, operation, answer))

    def _count(self, request: LaneRequest, num_bytes: int) -> None:
        if changes_run(request):
            self._since_snapshot += 1
            self._bytes_since_snapshot += num_bytes
        if isinstance(request, LoadState):
            # The checkpoint may be deleted one day; a snapshot makes us independent of it.
            self._snapshot_wanted = True

    async def _await_answer(
        self, attempt: int, operation: LaneOperation, answer: "asyncio.Future[bytes]"
    ) -> None:
        outcome: bytes | TwinkleDaskError
        try:
            outcome = await answer
        except HostLost:
            if attempt == self._attempt:
                self._detach()
            return
        except TwinkleDaskError as error:
            outcome = error
        if attempt != self._attempt:
            # Detached meanwhile: the operation has been sent again, and that answer counts.
            return
        await self._parts.finish(self.run, operation, outcome)
        self._in_flight.pop(operation.seq, None)
        self._wake.set()

    def _snapshot_due(self) -> bool:
        config = self._parts.config
        return not self._snapshotting and (
            self._snapshot_wanted
            or self._since_snapshot >= config.snapshot_operations
            or self._bytes_since_snapshot >= config.snapshot_bytes
        )

    async def _snapshot(self, link: HostLink) -> None:
        """Have the run written down as it stands behind the last operation sent."""
        seq, attempt = self._last_sent, self._attempt
        self._snapshotting = True
        self._snapshot_wanted = False
        self._since_snapshot = self._bytes_since_snapshot = 0
        folder = f"snapshots/{self.run.id}/{seq}-{secrets.token_hex(4)}"
        save = SaveFolder(
            folder=folder, base_model=self.run.base_model, optimizer=True, gradients=True
        )
        try:
            await link.send(self._command(save))
            # Until then an operation inside the snapshot may still lack its stored result.
            while any(at <= seq for at in self._in_flight):
                await asyncio.sleep(0.05)
                if attempt != self._attempt:
                    return
            old = await self._parts.store.runs.set_snapshot(self.run.id, folder, seq)
            self.run = replace(self.run, snapshot_path=folder, snapshot_seq=seq)
            await self._forget(old, seq)
        except HostLost:
            return
        except TwinkleDaskError as error:
            # The journal still has everything; it only grows until the next try succeeds.
            log.warning("snapshot_failed", error=error.message)
        finally:
            self._snapshotting = False

    async def _forget(self, old_folder: str | None, seq: int) -> None:
        """Remove what the new snapshot has made superfluous."""
        for path in await self._parts.store.journal.prune_replayed(self.run.id, up_to_seq=seq):
            await asyncio.to_thread(self._parts.blobs.remove, path)
        if old_folder is not None:
            await asyncio.to_thread(self._parts.blobs.remove, old_folder)

    def _host_command(self, request: LaneRequest, payload: bytes) -> Command:
        match request:
            case ForwardBackward() | OptimStep():
                return self._command(None, payload)
            case StartRun():
                return self._command(CreateRun(spec=request.spec))
            case LoadState():
                return self._command(
                    LoadFolder(folder=request.folder, with_optimizer=request.with_optimizer)
                )
            case SaveState() | SaveForSampler():
                return self._command(
                    SaveFolder(
                        folder=request.folder,
                        base_model=self.run.base_model,
                        optimizer=isinstance(request, SaveState),
                        gradients=False,
                    )
                )

    def _command(self, body: object, packed: bytes | None = None) -> Command:
        return Command(
            id=secrets.token_hex(12),
            run=self.run.id,
            tenant=self.run.tenant_id,
            body=packing.pack(body) if packed is None else packed,
        )

    def _start(self, job: "Awaitable[None]") -> None:
        task = asyncio.ensure_future(job)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Usually the store. Doing it again from the journal is right, but not at once.
            log.error("lane_task_failed", run=self.run.id, exc_info=error)
            asyncio.get_running_loop().call_later(1.0, self._detach)

    def _ignore(self, answer: "asyncio.Future[bytes]") -> None:
        """Nobody needs to know how this ends; a lost host frees everything anyway."""
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
