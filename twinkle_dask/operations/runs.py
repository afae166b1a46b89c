"""Runs and their lanes.

Creation, the acknowledged submit that all training goes through, and setting lanes up again after
a restart.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager

import structlog

from twinkle_dask import packing
from twinkle_dask.clock import utc_now
from twinkle_dask.cluster.supervisor import Supervisor
from twinkle_dask.config import JournalConfig, LimitConfig
from twinkle_dask.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    RequestError,
    SessionEnded,
    StorageFailed,
)
from twinkle_dask.lifecycle import LaneState
from twinkle_dask.operations import contents, validation
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.describing import describe_runs
from twinkle_dask.operations.finishing import Finisher
from twinkle_dask.operations.inflight import InflightWeights
from twinkle_dask.operations.lanes import Lane, LaneOperation, LaneParts
from twinkle_dask.operations.quotas import Held, Quotas
from twinkle_dask.operations.requests import (
    LaneRequest,
    StartRun,
    UnloadRun,
    changes_run,
    kind_of,
    load_of,
)
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.usage import input_tokens
from twinkle_dask.operations.values import (
    CheckpointAddress,
    LoraRequest,
    Page,
    RunInfo,
    ServedModel,
    Tenant,
    Ticket,
    TicketKind,
)
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.journal import DuplicateOperation
from twinkle_dask.store.records import (
    OperationRecord,
    OperationState,
    RunPhase,
    RunRecord,
)
from twinkle_dask.store.store import Store
from twinkle_dask.types import (
    Embed,
    ForwardBackward,
    Json,
    LoraSpec,
    RunId,
    SessionId,
    TenantId,
    TicketId,
)

log = structlog.stdlib.get_logger(__name__)

#: Larger payloads are packed on a thread, so that the event loop keeps turning.
_PACK_INLINE_TOKENS = 20_000
_PACK_INLINE_BYTES = 2**20
_PACK_INLINE_SCORES = 200_000
#: Places in a session of runs that clients name; no client counts that far.
_NAMED_SEQ = 2**30
#: States in which a run takes no work although its session may be alive.
_OVER = frozenset({RunPhase.UNLOADED, RunPhase.CLOSED, RunPhase.COPIED})


class Runs:
    """All runs of all tenants."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: BlobStore,
        supervisor: Supervisor,
        catalogue: Catalogue,
        sessions: Sessions,
        checkpoints: Checkpoints,
        inflight: InflightWeights,
        tickets: TicketBoard,
        journal: JournalConfig,
        limits: LimitConfig,
        quotas: Quotas,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._catalogue = catalogue
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._tickets = tickets
        self._limits = limits
        self._quotas = quotas
        # Runs of sessions that are alive, whether they have a lane or not.
        self._counted: dict[RunId, RunRecord] = {}
        self._lanes: dict[RunId, Lane] = {}
        self._submits: dict[tuple[RunId, int], asyncio.Task[Ticket]] = {}
        self._sending: Counter[TenantId] = Counter()
        self._arriving: Counter[RunId] = Counter()
        self._touched: set[RunId] = set()
        self._parts = LaneParts(
            store=store,
            blobs=blobs,
            supervisor=supervisor,
            config=journal,
            finish=Finisher(store, checkpoints, tickets, inflight).finish,
            suspects=asyncio.Lock(),
            sending=self._is_sending,
        )

    async def create(
        self,
        tenant: Tenant,
        session: SessionId,
        *,
        seq: int,
        base_model: str,
        lora: LoraRequest,
        user_metadata: Json,
    ) -> Ticket:
        """Make a run with a fresh adapter. ``seq`` counts the session's runs from 0."""
        model = self._catalogue.get(base_model)
        lora = validation.lora(lora, model)
        spec = LoraSpec(
            rank=lora.rank,
            seed=secrets.randbits(62) if lora.seed is None else lora.seed,
            train_attn=lora.train_attn,
            train_mlp=lora.train_mlp,
            train_unembed=lora.train_unembed,
            alpha=lora.alpha,
            targets=lora.targets,
            dropout=lora.dropout,
            rslora=lora.rslora,
        )
        request = StartRun(spec=spec)
        return await self._start(tenant, session, seq, model, spec, user_metadata, request)

    async def create_from(
        self,
        tenant: Tenant,
        session: SessionId,
        *,
        seq: int,
        address: CheckpointAddress,
        with_optimizer: bool,
        base_model: str | None,
        user_metadata: Json,
        reader: Tenant | None = None,
    ) -> Ticket:
        """Make a run that starts where a checkpoint stands, in the checkpoint's LoRA shape.

        ``reader`` is who may read the checkpoint, if that is another account of the caller's.
        """
        record = await self._checkpoints.find((reader or tenant).id, address)
        if base_model is not None and not self._catalogue.same_base(base_model, record.base_model):
            raise NotFound(
                f"There is no such checkpoint of {base_model!r}; it belongs to another base model."
            )
        model = self._catalogue.get(base_model or record.base_model)
        request = load_of(record, address, with_optimizer=with_optimizer)
        return await self._start(tenant, session, seq, model, record.spec, user_metadata, request)

    async def create_named(
        self,
        tenant: Tenant,
        session: SessionId,
        run: RunId,
        *,
        base_model: str,
        spec: LoraSpec,
        user_metadata: Json,
    ) -> Ticket:
        """Make a run under an id that a client chose; unlike ``create`` it is not repeatable.

        Raises:
            Conflict: There is such a run, which stays as it is.
        """
        model = self._catalogue.get(base_model)
        validation.metadata(user_metadata, "A run's")
        await self._sessions.active(tenant, session)
        stored = await self._store.runs.in_session(session)
        taken = Conflict(
            f"The session has a run {run!r} already, which is as it was; choose another name."
        )
        mine = [record for record in self._counted.values() if record.session_id == session]
        if any(record.id == run for record in (*stored, *mine)):
            raise taken
        places = [record.run_seq for record in (*stored, *mine) if record.run_seq >= _NAMED_SEQ]
        now = utc_now()
        record = RunRecord(
            id=run,
            session_id=session,
            tenant_id=tenant.id,
            run_seq=max(places, default=_NAMED_SEQ - 1) + 1,
            base_model=model.name,
            spec=spec,
            user_metadata=user_metadata,
            created_at=now,
            last_request_at=now,
        )
        with self._quotas.runs.taking(tenant.id):
            self._counted[run] = record
            try:
                if (await self._store.runs.add(record)) != record:
                    raise taken
            except BaseException:
                del self._counted[run]
                raise
        lane = await self.lane(tenant, run)
        return await self._submit_once(tenant, lane, 0, lambda _lane, _model: StartRun(spec=spec))

    async def forget(self, run: RunId) -> None:
        """Remove a run that could not be made, as if nobody had asked for it."""
        lane = self._lanes.pop(run, None)
        self._discount(run)
        if lane is not None:
            await lane.stop()
        await self._store.runs.remove_failed(run)

    async def submit(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        seq: int | None,
        make: Callable[[Lane, ServedModel], LaneRequest],
        rated: bool = True,
    ) -> Ticket:
        """Acknowledge an operation: when this returns, it will be done whatever is killed.

        Args:
            tenant: Who asks.
            run: Theirs, or it is not found.
            seq: Its place; None or 0 takes the next. A place that is taken gives the ticket of
                the operation that has it, so a submit may be repeated.
            make: Builds and checks the request; what it raises frees the place.
            rated: Whether it counts for the tenant's rates; not if it belongs to one that did.

        Raises:
            OutOfOrder: The run has moved past ``seq``.
            QuotaExceeded: Too much is queued in this run.
        """
        lane = await self.lane(tenant, run)
        if not seq:
            taken = (at for of, at in self._submits if of == run)
            seq = max([lane.order.free_seq() - 1, *taken]) + 1
        return await self._submit_once(tenant, lane, seq, make, rated=rated)

    async def unload(self, tenant: Tenant, run: RunId) -> Ticket:
        """Free a run for good, once what was submitted before is done; its checkpoints stay.

        A repeat gives the ticket of the first.
        """
        lane = self._lanes.get(run) or await self._open(tenant.id, run)
        if lane.run.tenant_id == tenant.id and lane.unloaded:
            first = await self._store.journal.last_of_kind(run, TicketKind.UNLOAD_RUN)
            if first is not None:
                return _ticket(first)
        return await self.submit(
            tenant, run, seq=None, make=lambda _lane, _model: UnloadRun(), rated=False
        )

    async def refuse(self, tenant: Tenant, run: RunId, *, seq: int) -> None:
        """A request with this place was refused before it got here."""
        try:
            lane = await self.lane(tenant, run)
        except RequestError:
            return
        if (run, seq) not in self._submits:  # else another request has the place after all
            lane.refuse(seq)

    @contextmanager
    def sending(self, tenant: Tenant) -> Generator[None]:
        """While a request's body is on its way, absent places of the tenant's runs are awaited."""
        self._sending[tenant.id] += 1
        try:
            yield
        finally:
            self._sending[tenant.id] -= 1

    async def lane(self, tenant: Tenant, run: RunId) -> Lane:
        """A run's lane, opened if need be.

        Raises:
            NotFound: No such run of this tenant.
            SessionEnded: Its session is over.
            InvalidRequest: It was unloaded, or holds a copy and was never to be trained.
        """
        lane = self._lanes.get(run) or await self._open(tenant.id, run)
        if lane.run.tenant_id != tenant.id:
            raise _unknown(run)
        if not self._sessions.is_active(lane.run.session_id):
            raise SessionEnded(
                f"The session of run {run!r} is over. Save and load checkpoints to go on in "
                "another one."
            )
        if self._has_outlived(lane.run):
            raise SessionEnded(
                f"Run {run!r} has reached the longest life that this server gives a run, "
                f"{self._limits.run_lifetime_s:g} s. Go on in a new run, from a checkpoint."
            )
        if lane.unloaded:
            raise _over(lane.run)
        self._touched.add(run)
        return lane

    async def expire(self) -> None:
        """Free the runs that have reached the longest life, once their work is done."""
        for run in list(self._counted.values()):
            if not self._has_outlived(run):
                continue
            lane = self._lanes.get(run.id) or await self._open(run.tenant_id, run.id)
            if lane.unloaded or not self._sessions.is_active(run.session_id):
                continue
            nobody = Tenant(id=run.tenant_id, name="expiry", key_hint="")
            seq = lane.order.free_seq()
            await self._submit_once(
                nobody, lane, seq, lambda _lane, _model: UnloadRun(), rated=False
            )
            log.info("run_expired", run=run.id)

    async def fail_waiting(self) -> None:
        """Fail what no host has taken for too long."""
        timeout_s = self._limits.queue_timeout_s
        if timeout_s is not None:
            for lane in list(self._lanes.values()):
                await lane.fail_waiting(timeout_s)

    def _has_outlived(self, run: RunRecord) -> bool:
        lifetime_s = self._limits.run_lifetime_s
        if lifetime_s is None:
            return False
        return (utc_now() - run.created_at).total_seconds() >= lifetime_s

    async def recover(self) -> None:
        """Count what tenants hold, and queue again what was acknowledged and not finished."""
        for session in self._sessions.all_active():
            for run in await self._store.runs.in_session(session):
                if run.state in _OVER:
                    continue
                self._counted[run.id] = run
                self._quotas.runs.restore(run.tenant_id)
        for record in await self._store.journal.pending():
            if record.run_id is None:
                continue
            try:
                await self._requeue(record)
            except InvalidRequest as error:
                # Its model is not served at the moment; the journal keeps the operation.
                log.warning("operation_not_recovered", run=record.run_id, error=error.message)
            except (StorageFailed, packing.UnreadableBuffer) as error:
                # A payload is not flushed to the disk, so a power cut may have taken it.
                log.exception("operation_lost", run=record.run_id, seq=record.seq)
                fault = StorageFailed(f"The request could not be read back: {error}")
                self._open_ticket(record)
                await self._tickets.fail(record.ticket_id, fault)

    async def _requeue(self, record: OperationRecord) -> None:
        if record.run_id is None or record.seq is None or not record.has_payload:
            raise InvalidRequest(f"Operation {record.ticket_id} has nothing to be repeated from.")
        lane = self._lanes.get(record.run_id) or await self._open(record.tenant_id, record.run_id)
        payload = await contents.payload_of(self._blobs, record)
        request: LaneRequest = packing.unpack(payload)
        self._open_ticket(record)
        lane.accept(
            LaneOperation(ticket=record.ticket_id, seq=record.seq, request=request, payload=payload)
        )
        log.info("operation_recovered", run=record.run_id, seq=record.seq, kind=record.kind)

    def _open_ticket(self, record: OperationRecord) -> None:
        self._quotas.queued_bytes.restore(record.tenant_id, record.payload_bytes)
        self._tickets.open(
            record.tenant_id, record.ticket_id, record.payload_bytes, run=record.run_id
        )

    async def info(self, tenant: Tenant, run: RunId, *, accessible: bool = False) -> RunInfo:
        """A run's record with its newest checkpoints.

        With ``accessible`` it may be another tenant's that has a published checkpoint; of that
        only a part is told.
        """
        find = self._store.sharing.run if accessible else self._store.runs.get
        record = await find(tenant.id, run)
        if record is None:
            raise _unknown(run)
        return (await describe_runs(self._store, self._catalogue, tenant, (record,)))[0]

    async def page(
        self,
        tenant: Tenant,
        limit: int,
        offset: int,
        *,
        project: str | None = None,
        accessible: bool = False,
    ) -> Page[RunInfo]:
        """A tenant's runs, newest first.

        Args:
            tenant: Who asks.
            limit: At most so many.
            offset: So many newer ones are left out.
            project: Only the tenant's own of this project.
            accessible: Also others' with a published checkpoint, of which only a part is told.
        """
        validation.text(project, "project_id", validation.MAX_LABEL_LENGTH)
        records, total = await self._store.sharing.runs(
            tenant.id, limit, offset, project=project, accessible=accessible
        )
        items = await describe_runs(self._store, self._catalogue, tenant, records)
        return Page(items=items, total=total, limit=limit, offset=offset)

    async def release_session(self, session: SessionId) -> None:
        """Free what a session's runs hold on hosts; their records and checkpoints stay."""
        for lane in self._lanes.values():
            if lane.run.session_id == session:
                lane.release()
        for run in [run for run in self._counted.values() if run.session_id == session]:
            self._discount(run.id)

    async def drop_ended(self) -> None:
        """Release ended sessions; take their and unloaded lanes out of memory when they are idle.

        Those that have work, or have not left their host yet, are there for the next call.
        """
        runs = (*self._counted.values(), *(lane.run for lane in self._lanes.values()))
        ended = {run.session_id for run in runs if not self._sessions.is_active(run.session_id)}
        for session in ended:
            await self.release_session(session)
        for lane in list(self._lanes.values()):
            if not (lane.unloaded or lane.run.session_id in ended):
                continue
            idle = lane.num_queued == 0 and lane.state is LaneState.DETACHED
            if idle and lane.run.id not in self._arriving:
                del self._lanes[lane.run.id]
                self._discount(lane.run.id)
                await lane.stop()

    def held(self, tenant: Tenant) -> Held:
        """How many runs of sessions that are alive a tenant has, and may have."""
        return Held(used=self._quotas.runs.held(tenant.id), limit=self._quotas.runs.limit)

    def has_lane(self, run: RunId) -> bool:
        """Whether the run may be doing something."""
        return run in self._lanes

    def paused(self, run: RunId) -> str | None:
        """Why a run's work waits for room on its host; None if it does not."""
        lane = self._lanes.get(run)
        return None if lane is None else lane.paused

    async def flush(self) -> None:
        """Write down which runs were used since the last call."""
        touched, self._touched = self._touched, set()
        if touched:
            await self._store.runs.touch(touched, utc_now())

    async def stop(self) -> None:
        """End all lanes; what they have not done stays in the journal."""
        await asyncio.gather(*(lane.stop() for lane in self._lanes.values()))

    async def _start(
        self,
        tenant: Tenant,
        session: SessionId,
        seq: int,
        model: ServedModel,
        spec: LoraSpec,
        user_metadata: Json,
        request: LaneRequest,
    ) -> Ticket:
        validation.metadata(user_metadata, "A run's")
        await self._sessions.active(tenant, session)
        if seq < 0:
            raise InvalidRequest(f"model_seq_id must be at least 0, not {seq}.")
        now = utc_now()
        run = RunId(f"{session}:train:{seq}")
        record = RunRecord(
            id=run,
            session_id=session,
            tenant_id=tenant.id,
            run_seq=seq,
            base_model=model.name,
            spec=spec,
            user_metadata=user_metadata,
            created_at=now,
            last_request_at=now,
        )
        if run not in self._counted:  # else the request is a repeat
            with self._quotas.runs.taking(tenant.id):
                self._counted[run] = record
                try:
                    stored = await self._store.runs.add(record)
                    if stored.state in _OVER:
                        raise _over(stored)
                except BaseException:
                    del self._counted[run]
                    raise
        lane = await self.lane(tenant, run)
        return await self._submit_once(tenant, lane, 0, lambda _lane, _model: request, rated=False)

    async def _submit_once(
        self,
        tenant: Tenant,
        lane: Lane,
        seq: int,
        make: Callable[[Lane, ServedModel], LaneRequest],
        *,
        rated: bool = False,
    ) -> Ticket:
        """Join the submit of the same place that is going on, or begin one."""
        place = (lane.run.id, seq)
        submit = self._submits.get(place)
        if submit is None:
            submit = asyncio.create_task(self._submit(tenant, lane, seq, make, rated=rated))
            self._submits[place] = submit
            self._arriving[lane.run.id] += 1
            submit.add_done_callback(lambda _: self._arrived(place))
        # The client may hang up; what it asked for goes on, and a repeat finds it.
        return await asyncio.shield(submit)

    def _arrived(self, place: tuple[RunId, int]) -> None:
        del self._submits[place]
        run, _ = place
        self._arriving[run] -= 1
        if not self._arriving[run]:
            del self._arriving[run]

    def _discount(self, run: RunId) -> None:
        """A run that is over counts no more."""
        counted = self._counted.pop(run, None)
        if counted is not None:
            self._quotas.runs.remove(counted.tenant_id)

    def _is_sending(self, run: RunRecord) -> bool:
        return self._sending[run.tenant_id] > 0 or self._arriving[run.id] > 0

    async def _submit(
        self,
        tenant: Tenant,
        lane: Lane,
        seq: int,
        make: Callable[[Lane, ServedModel], LaneRequest],
        *,
        rated: bool,
    ) -> Ticket:
        if lane.order.knows(seq):
            known = await self._store.journal.at(lane.run.id, seq)
            if known is not None:
                return _ticket(known)
        lane.order.check(seq)
        if lane.num_queued >= self._limits.max_queued_operations:
            raise QuotaExceeded(
                f"{lane.num_queued} operations wait in this run; collect results first.", 1.0
            )
        try:
            request = make(lane, self._catalogue.get(lane.run.base_model))
            tokens = validation.input_tokens(input_tokens(request), self._limits)
        except RequestError:
            lane.refuse(seq)
            raise
        if rated:
            self._quotas.rates.admit(tenant.id, tokens)
        payload = await _pack(request)
        try:
            with self._quotas.queued_bytes.taking(tenant.id, len(payload)):
                return await self._acknowledge(tenant, lane, seq, request, payload)
        except DuplicateOperation as duplicate:
            stored = duplicate.stored
            forgotten = not self._tickets.is_pending(stored.ticket_id)
            if stored.state is OperationState.PENDING and stored.has_payload and forgotten:
                # It was committed although the store had said that it was not.
                await self._requeue(stored)
            return _ticket(stored)

    async def _acknowledge(
        self, tenant: Tenant, lane: Lane, seq: int, request: LaneRequest, payload: bytes
    ) -> Ticket:
        ticket = TicketId(secrets.token_hex(12))
        kept = await contents.keep(self._blobs, f"journal/{ticket}", payload)
        record = OperationRecord(
            ticket_id=ticket,
            tenant_id=tenant.id,
            kind=kind_of(request),
            run_id=lane.run.id,
            seq=seq,
            changes_run=changes_run(request),
            payload=kept.inline,
            payload_path=kept.path,
            payload_bytes=len(payload),
            created_at=utc_now(),
            key_id=tenant.key_id,
            input_tokens=input_tokens(request),
        )
        try:
            await self._store.journal.add(record)
        except DuplicateOperation:
            await contents.discard(self._blobs, kept)
            raise
        except StorageFailed:
            # Unless the write was committed and only its answer was lost.
            if await self._store.journal.get(tenant.id, ticket) is None:
                await contents.discard(self._blobs, kept)
            raise
        self._tickets.open(tenant.id, ticket, len(payload), run=lane.run.id)
        lane.accept(LaneOperation(ticket=ticket, seq=seq, request=request, payload=payload))
        return _ticket(record)

    async def _open(self, tenant: TenantId, run: RunId) -> Lane:
        record = await self._store.runs.get(tenant, run)
        if record is None:
            raise _unknown(run)
        if record.state is RunPhase.COPIED:
            raise _over(record)
        source = self._catalogue.get(record.base_model).source
        pending = await self._store.journal.first_pending_seq(run)
        if pending is None:
            next_seq = await self._store.journal.last_finished_seq(run) + 1
            lane = Lane(self._parts, record, source, next_seq)
        else:
            lane = Lane(self._parts, record, source, pending)
            for later in await self._store.journal.for_run(run, after_seq=pending):
                if later.state is not OperationState.PENDING and later.seq is not None:
                    lane.refuse(later.seq)  # has had its turn; nobody need wait for it
        # Of several openers at a time the first one wins, or two lanes would write the same run.
        return self._lanes.setdefault(run, lane)


async def _pack(request: LaneRequest) -> bytes:
    if isinstance(request, ForwardBackward):
        aside = (
            request.num_tokens > _PACK_INLINE_TOKENS
            or request.num_image_bytes > _PACK_INLINE_BYTES
            or request.num_scores > _PACK_INLINE_SCORES
        )
    else:
        aside = isinstance(request, Embed) and request.num_tokens > _PACK_INLINE_TOKENS
    if aside:
        return await asyncio.to_thread(packing.pack, request)
    return packing.pack(request)


def _ticket(record: OperationRecord) -> Ticket:
    return Ticket(id=record.ticket_id, kind=TicketKind(record.kind), run=record.run_id)


def _over(run: RunRecord) -> InvalidRequest:
    """What to say of work for a run that takes none."""
    if run.state is RunPhase.COPIED:
        return InvalidRequest(
            f"Run {run.id!r} holds a copied checkpoint and cannot be trained; create a new run "
            "from the checkpoint."
        )
    return InvalidRequest(
        f"Run {run.id!r} was unloaded; create a new run from one of its checkpoints."
    )


def _unknown(run: RunId) -> NotFound:
    return NotFound(f"There is no run {run!r}.")
