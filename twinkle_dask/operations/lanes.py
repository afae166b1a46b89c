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
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from twinkle_dask import packing
from twinkle_dask.cluster.commands import (
    Command,
    CreateRun,
    DropRun,
    ExportFolder,
    LoadFolder,
    SaveFolder,
)
from twinkle_dask.cluster.link import HostLink
from twinkle_dask.cluster.supervisor import Supervisor
from twinkle_dask.config import JournalConfig
from twinkle_dask.errors import (
    CheckpointCorrupt,
    HostLost,
    InvalidRequest,
    NotFound,
    Saturated,
    ServiceFault,
    StorageFailed,
    TwinkleDaskError,
)
from twinkle_dask.lifecycle import LANE, LaneEvent, LaneState, move
from twinkle_dask.operations import contents
from twinkle_dask.operations.requests import (
    LaneRequest,
    LoadState,
    SaveExternal,
    SaveForSampler,
    SaveState,
    StartRun,
    UnloadRun,
    changes_run,
)
from twinkle_dask.operations.values import TicketKind
from twinkle_dask.scheduling import RunOrder
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import OperationRecord, OperationState, RunPhase, RunRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import Embed, ForwardBackward, GradientStep, OptimStep, TicketId

log = structlog.stdlib.get_logger(__name__)

_RETRY_S = 1.0
_SUSPECT_LOSSES = 2
_MAX_LOSSES = 4
#: Trying again would fail in the same way.
_UNRESTORABLE = (CheckpointCorrupt, NotFound, InvalidRequest, packing.UnreadableBuffer)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneOperation:
    """An acknowledged operation.

    Attributes:
        payload: The packed request, as it stands in the journal.
        accepted_s: When it began to wait, on the clock of ``time.monotonic``.
    """

    ticket: TicketId
    seq: int
    request: LaneRequest
    payload: bytes = field(repr=False)
    accepted_s: float = field(default_factory=time.monotonic, compare=False)


Finish = Callable[[RunRecord, LaneOperation, bytes | TwinkleDaskError], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneParts:
    """What every lane works with.

    Attributes:
        finish: Told each operation's outcome until it has made it durable.
        suspects: Held by a run that hosts were lost under, so that it is alone with the next.
        sending: Whether a tenant is in the middle of sending a request.
    """

    store: Store
    blobs: BlobStore
    supervisor: Supervisor
    config: JournalConfig
    finish: Finish
    suspects: asyncio.Lock
    sending: Callable[[RunRecord], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Redone:
    """An operation done again for its effect. ``must_succeed`` as it did the first time.

    ``folder`` is what it reads, if it reads any.
    """

    answer: "asyncio.Future[bytes]"
    must_succeed: bool
    folder: str | None = None

    async def check(self) -> None:
        try:
            await self.answer
        except HostLost:
            raise
        except TwinkleDaskError:
            if self.must_succeed:
                raise


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
        # Counts losses of the host; what belongs to an earlier attempt no longer matters.
        self._attempt = 0
        self._in_flight: dict[int, LaneOperation] = {}
        self._losses: Counter[int] = Counter()
        self._giving_up: set[int] = set()
        self._answers: dict[int, asyncio.Task[None]] = {}
        self._recording = 0
        self._calm = asyncio.Event()
        self._calm.set()
        self._suspect = False
        self._since_snapshot = 0
        self._bytes_since_snapshot = 0
        self._snapshot_wanted = False
        self._snapshotting = False
        self._release_wanted = False
        self._unloading = False
        self._last_sent = next_seq - 1
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._main: asyncio.Task[None] | None = None

    @property
    def num_queued(self) -> int:
        """Operations that have no outcome yet."""
        return len(self.order) + len(self._in_flight)

    @property
    def unloaded(self) -> bool:
        """Whether the run takes no more work, since it is or will be unloaded."""
        return self._unloading or self.run.state in {RunPhase.UNLOADED, RunPhase.CLOSED}

    @property
    def paused(self) -> str | None:
        """Why the run waits for room on its host, as the host said last; None if it does not."""
        if self._link is None or self.run.id not in self._link.health.paused:
            return None
        return self._link.health.reason

    def accept(self, operation: LaneOperation) -> None:
        """Let an acknowledged operation wait for its turn."""
        self.order.add(operation.seq, operation, time.monotonic())
        if isinstance(operation.request, UnloadRun):
            self._unloading = True
        if self._main is None or self._main.done():
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

    async def fail_waiting(self, timeout_s: float) -> None:
        """Fail what has waited so long for a host, while there is none.

        What a host was given is let be: it may be half done. The making of a run waits on, since
        everything else builds on it.
        """
        for seq, operation in list(self._in_flight.items()):
            waited_s = time.monotonic() - operation.accepted_s
            made = isinstance(operation.request, StartRun | UnloadRun)
            if self._link is not None or made or waited_s < timeout_s or seq in self._giving_up:
                continue
            # Out of what a host would be given, before anything is awaited.
            del self._in_flight[seq]
            self._giving_up.add(seq)
            refusal = Saturated(
                f"No host took this within {timeout_s:g} s, so it was not done. Send it again.", 5.0
            )
            try:
                await self._record(operation, refusal)
            finally:
                self._giving_up.discard(seq)

    async def stop(self) -> None:
        """End the lane's tasks; what has no outcome stays in the journal."""
        self._do(LaneEvent.CLOSE)
        tasks = [*self._tasks, *([self._main] if self._main else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._clear_suspicion()

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
                self._detach(self._attempt)
                continue
            except _UNRESTORABLE as error:
                log.exception("run_not_restored")
                self._detach(self._attempt)
                await self._fail_in_flight(error)
                continue
            except Exception:
                # Usually the store. Nothing is lost: the journal has it; try again in a while.
                log.exception("lane_failed")
                self._detach(self._attempt)
                await asyncio.sleep(_RETRY_S)
                continue
            again_s = self.order.look_again_s(time.monotonic())
            if again_s is not None:
                # The time may be over already while somebody is still sending.
                again_s = max(again_s, 0.05)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), again_s)

    async def _fail_in_flight(self, why: Exception) -> None:
        """The run cannot be set up (its snapshot is damaged, say); the next work tries again."""
        fault = ServiceFault(
            f"The run could not be restored: {why} Start a new run from a checkpoint."
        )
        for operation in list(self._in_flight.values()):
            await self._record(operation, fault)

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
                self._send(self._link, operation, self._attempt)
        if not self._in_flight:
            self._clear_suspicion()
        if self._link is not None and self._snapshot_due():
            self._start(self._snapshot(self._link))
        if self._release_wanted and not (self.num_queued or self._snapshotting or self._recording):
            self._release()

    def _release(self) -> None:
        self._release_wanted = False
        link, self._link = self._link, None
        if link is not None:
            self._attempt += 1
            link.load -= 1
            self._ignore(link.send(self._command(DropRun())))
            self._do(LaneEvent.RELEASE)

    def _detach(self, attempt: int) -> None:
        """The host of an attempt is of no use any more; a later attempt is left alone."""
        if attempt != self._attempt:
            return
        if self._link is not None:
            self._link.load -= 1
            if self._link.lost.is_set():
                self._losses.update(self._in_flight.keys())
        self._link = None
        self._attempt += 1
        self._clear_suspicion()
        self._do(LaneEvent.HOST_LOST)
        self._wake.set()

    async def _restore(self) -> None:
        """Set the run up on a host: its snapshot, then everything after it in order.

        What has an outcome is done again for its effect alone; what has none is sent again.
        """
        # An outcome or snapshot that is being recorded decides what must be done again.
        await self._calm.wait()
        await self._give_up_killers()
        attempt = self._attempt
        if self.state is LaneState.DETACHED:
            self._do(LaneEvent.WORK)
        if any(count >= _SUSPECT_LOSSES for count in self._losses.values()):
            # It may be what takes hosts down. One such run at a time, so that it fails alone.
            await self._parts.suspects.acquire()
            self._suspect = True
        link = await self._parts.supervisor.trainer(self.source)
        link.load += 1
        self._link = link
        unfinished = dict(self._in_flight)
        self._ignore(link.send(self._command(DropRun())))
        redone: list[_Redone] = []
        after = -1
        if self.run.snapshot_path is not None:
            after = self.run.snapshot_seq
            load = LoadFolder(folder=self.run.snapshot_path, with_optimizer=True)
            answer = link.send(self._command(load))
            redone.append(_Redone(answer=answer, must_succeed=True, folder=load.folder))
        for record in await self._parts.store.journal.for_run(self.run.id, after_seq=after):
            if record.seq in unfinished:
                self._send(link, unfinished.pop(record.seq), attempt)
            elif (again := await self._redo(link, record)) is not None:
                redone.append(again)
        if redone:
            log.info("run_restored", host=link.name, repeated=len(redone))
        for one in redone:
            # One failure is enough; nobody looks at those behind it then.
            self._ignore(one.answer)
        for one in redone:
            await self._check(one, attempt)
        if attempt != self._attempt:
            raise HostLost(f"Host {link.name} went away while the run was restored on it.")
        self._do(LaneEvent.RESTORED)

    async def _redo(self, link: HostLink, record: OperationRecord) -> "_Redone | None":
        """Send an operation that has an outcome again, if the run depends on it."""
        if record.state is OperationState.PENDING:
            return None  # waits for its turn
        failed = record.state is OperationState.FAILED
        if failed and record.kind not in (TicketKind.OPTIM_STEP, TicketKind.GRADIENT_STEP):
            return None  # without effect; a failed step has dropped the gradient, though
        if not record.has_payload:
            if failed or not record.changes_run:
                return None
            raise CheckpointCorrupt(f"The journal lacks operation {record.seq} of the run.")
        if not record.changes_run:
            return None
        payload = await contents.payload_of(self._parts.blobs, record)
        request: LaneRequest = packing.unpack(payload)
        answer = link.send(self._host_command(request, payload))
        self._count(request, len(payload))
        folder = request.folder if isinstance(request, LoadState) else None
        return _Redone(answer=answer, must_succeed=not failed, folder=folder)

    async def _check(self, redone: _Redone, attempt: int) -> None:
        try:
            await redone.check()
        except StorageFailed as error:
            # What was sent behind it fails only for want of it, so those answers do not count.
            self._detach(attempt)
            if redone.folder is None:
                raise
            if await asyncio.to_thread(self._parts.blobs.names, redone.folder):
                raise
            # Else it would be tried for ever, and whoever waits would never learn why.
            raise CheckpointCorrupt("The files that it goes on from are gone.") from error

    @contextlib.contextmanager
    def _recorded(self) -> Generator[None]:
        """While something is being made durable, a restore must wait: see ``_restore``."""
        self._recording += 1
        self._calm.clear()
        try:
            yield
        finally:
            self._recording -= 1
            if not self._recording:
                self._calm.set()
                self._wake.set()

    async def _give_up_killers(self) -> None:
        """Fail what was in flight each time that a host went down."""
        for seq, operation in list(self._in_flight.items()):
            if self._losses[seq] >= _MAX_LOSSES:
                await self._record(
                    operation,
                    ServiceFault(
                        f"The host went down {_MAX_LOSSES} times while it did this, so it is not "
                        "tried again."
                    ),
                )

    def _clear_suspicion(self) -> None:
        if self._suspect:
            self._suspect = False
            self._parts.suspects.release()

    def _send(self, link: HostLink, operation: LaneOperation, attempt: int) -> None:
        if isinstance(operation.request, UnloadRun):
            self._answers[operation.seq] = self._start(self._unload(attempt, operation))
            return
        answer = link.send(self._host_command(operation.request, operation.payload))
        self._last_sent = max(self._last_sent, operation.seq)
        self._count(operation.request, len(operation.payload))
        waiting = self._await_answer(attempt, operation, answer)
        self._answers[operation.seq] = self._start(waiting)

    async def _unload(self, attempt: int, operation: LaneOperation) -> None:
        """Leave the host once everything before has its outcome."""
        before = [task for at, task in self._answers.items() if at < operation.seq]
        if before:
            await asyncio.wait(before)
        if attempt == self._attempt:
            await self._record(operation, b"")
            self.release()

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
            self._detach(attempt)
            return
        except TwinkleDaskError as error:
            outcome = error
        if attempt == self._attempt:
            # Else the operation has been sent again, and that answer counts.
            await self._record(operation, outcome)

    async def _record(self, operation: LaneOperation, outcome: bytes | TwinkleDaskError) -> None:
        """Make an outcome durable, however long the store is away, and forget the operation."""
        with self._recorded():
            while True:
                try:
                    await self._parts.finish(self.run, operation, outcome)
                    break
                except StorageFailed as error:
                    # The work is done; doing it again or calling it failed would both be wrong.
                    log.warning("outcome_not_stored", seq=operation.seq, error=error.message)
                    await asyncio.sleep(_RETRY_S)
        self._in_flight.pop(operation.seq, None)
        self._losses.pop(operation.seq, None)
        self._answers.pop(operation.seq, None)
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
            before = [task for at, task in self._answers.items() if at <= seq]
            if before:
                await asyncio.wait(before)
            if attempt == self._attempt:
                await self._record_snapshot(folder, seq)
            else:
                await asyncio.to_thread(self._parts.blobs.remove, folder)
        except HostLost:
            return
        except TwinkleDaskError as error:
            # The journal still has everything; it only grows until the next try succeeds.
            log.warning("snapshot_failed", error=error.message)
        finally:
            self._snapshotting = False
            self._wake.set()

    async def _record_snapshot(self, folder: str, seq: int) -> None:
        """Note the snapshot, and remove what it has made superfluous."""
        with self._recorded():
            old = await self._parts.store.runs.set_snapshot(self.run.id, folder, seq)
            self.run = replace(self.run, snapshot_path=folder, snapshot_seq=seq)
            paths = list(await self._parts.store.journal.prune_replayed(self.run.id, up_to_seq=seq))
            for path in [*paths, *([old] if old else [])]:
                await asyncio.to_thread(self._parts.blobs.remove, path)

    def _host_command(self, request: LaneRequest, payload: bytes) -> Command:
        match request:
            case ForwardBackward() | Embed() | OptimStep() | GradientStep():
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
                        optimizer=isinstance(request, SaveState) and request.optimizer,
                        gradients=False,
                    )
                )

            case SaveExternal():
                return self._command(
                    ExportFolder(
                        folder=request.folder,
                        base_model=self.run.base_model,
                        recipients=request.recipients,
                    )
                )
            case UnloadRun():
                return self._command(DropRun())

    def _command(self, body: object, packed: bytes | None = None) -> Command:
        return Command(
            id=secrets.token_hex(12),
            run=self.run.id,
            tenant=self.run.tenant_id,
            body=packing.pack(body) if packed is None else packed,
        )

    def _start(self, job: "Coroutine[Any, Any, None]") -> "asyncio.Task[None]":
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Usually the store. Doing it again from the journal is right, but not at once.
            log.error("lane_task_failed", run=self.run.id, exc_info=error)
            asyncio.get_running_loop().call_later(_RETRY_S, self._detach, self._attempt)

    def _ignore(self, answer: "asyncio.Future[bytes]") -> None:
        """Nobody needs to know how this ends; a lost host frees everything anyway."""
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
