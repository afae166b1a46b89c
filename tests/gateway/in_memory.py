"""A stand-in for ``operations.Service`` that computes nothing: for tests of the face alone.

It keeps sessions, runs, samplers, checkpoints and finished tickets in dictionaries, records what
it was called with, and gives every forward pass logprobs of -0.5 and every sample the tokens 7, 8.
"""

import asyncio
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from twinkle_dask.errors import InvalidRequest, NotAuthenticated, NotFound, SessionEnded
from twinkle_dask.operations.events import Clone, Completion, Completions
from twinkle_dask.operations.provenance import BatchSpans
from twinkle_dask.operations.searching import FoundSessions
from twinkle_dask.operations.service import Service
from twinkle_dask.operations.tenants import KeyInfo
from twinkle_dask.operations.usage import UsageReport
from twinkle_dask.operations.values import (
    CheckpointAddress,
    CheckpointInfo,
    Done,
    Exported,
    Loaded,
    LoraRequest,
    Outcome,
    Page,
    QueueState,
    Result,
    RunCreated,
    RunInfo,
    SamplerInfo,
    SamplerSaved,
    Saved,
    ServedModel,
    SessionInfo,
    Tenant,
    Ticket,
    TicketKind,
    Unloaded,
    Waiting,
)
from twinkle_dask.store.records import (
    AuditRecord,
    CheckpointKind,
    KeyOrigin,
    SessionRecord,
    UsageKind,
    UsageRecord,
)
from twinkle_dask.store.searches import SessionPlace, SessionQuery, Stored
from twinkle_dask.types import (
    AdamParams,
    ForwardBackward,
    ForwardBackwardResult,
    Json,
    LoraSpec,
    ModelFacts,
    RunId,
    SampledSequence,
    SampleRequest,
    SampleResult,
    SamplerId,
    SessionId,
    StepResult,
    StopReason,
    TenantId,
    TicketId,
)

KEY = "tml-test-key"
TENANT = Tenant(id=TenantId("t"), name="test", key_hint="-key", key_id=7, key_name="laptop")
MODEL = "org/tiny"
NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


@dataclass
class _Run:
    info: RunInfo
    checkpoints: dict[CheckpointAddress, CheckpointInfo] = field(
        default_factory=dict[CheckpointAddress, CheckpointInfo]
    )


class InMemoryService:
    """See the module. ``failure``, once set, is raised by the next submit."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refused: list[tuple[str, int]] = []
        self.failure: Exception | None = None
        self.open_waits = 0
        self.num_sending = 0
        self._sessions: dict[SessionId, bool] = {}
        self._by_key: dict[str, SessionId] = {}
        self._runs: dict[RunId, _Run] = {}
        self._samplers: dict[SamplerId, SamplerInfo] = {}
        self.outcomes: dict[TicketId, Outcome] = {}
        self._by_place: dict[tuple[str, int], Ticket] = {}
        self.revoked = False
        self.token_secret = bytes(32)
        self.tenants = SimpleNamespace(
            authenticate=self._authenticate, of_key=self._of_key, key=self._key, revoke=self._revoke
        )
        self.audit = SimpleNamespace(of_day=self._of_day)
        self.usage = SimpleNamespace(between=self._usage_between, stored=self._stored)
        self.searching = SimpleNamespace(sessions=self._search_sessions)
        self.traces = SimpleNamespace(grant=self._grant_trace, document=self._trace)
        self._num_joined = 0
        self._cursors: dict[TicketId, int] = {}
        self.catalogue = SimpleNamespace(all=self._models, find=self._find_model)
        self.sessions = SimpleNamespace(
            create=self._create_session,
            active=self._active,
            info=self._session_info,
            page=self._session_page,
            assign_project=self._assign_project,
        )
        self.runs = SimpleNamespace(
            create=self._create_run,
            create_from=self._create_run_from,
            info=self._run_info,
            page=self._run_page,
            unload=self._unload,
            refuse=self._refuse,
            sending=self._sending,
        )
        self.training = SimpleNamespace(
            forward_backward=self._forward_backward,
            optim_step=self._optim_step,
            save_state=self._save_state,
            save_external=self._save_external,
            load_state=self._load_state,
            save_for_sampler=self._save_for_sampler,
        )
        self.samplers = SimpleNamespace(
            create=self._create_sampler, info=self._sampler_info, join=self._join_sampler
        )
        self.sampling = SimpleNamespace(
            sample=self._sample, cancel=self._cancel, completions=self._completions
        )
        self.checkpoints = SimpleNamespace(
            info=self._checkpoint_info,
            of_run=self._checkpoints_of_run,
            page=self._checkpoint_page,
            delete=self._delete_checkpoint,
            set_ttl=self._set_checkpoint_ttl,
            set_public=self._set_checkpoint_public,
        )
        self.copying = SimpleNamespace(into_project=self._copy_into_project)
        self.url_secret = b"secret"

    @property
    def service(self) -> Service:
        """Itself, as what faces are written for; ``test_in_memory`` compares the signatures."""
        return cast(Service, self)

    async def _authenticate(self, key: str | None) -> Tenant:
        if key != KEY or self.revoked:
            raise NotAuthenticated("The API key is missing or unknown.")
        return TENANT

    async def _of_key(self, key_id: int) -> Tenant | None:
        return TENANT if key_id == TENANT.key_id and not self.revoked else None

    async def _key(self, tenant: Tenant) -> KeyInfo:
        return KeyInfo(
            key_id=tenant.key_id,
            tenant=tenant.id,
            name="laptop",
            hint=tenant.key_hint,
            note="",
            email=None,
            created_at=NOW,
            origin=KeyOrigin.COMMAND,
        )

    async def _revoke(self, tenant: Tenant) -> None:
        self.revoked = True

    def _models(self) -> tuple[ServedModel, ...]:
        facts = ModelFacts(
            architecture="qwen3",
            vocab_size=100,
            context_length=64,
            num_parameters=1,
            dtype="float32",
            eos_token_ids=(0,),
            max_rank=64,
            has_tokenizer=True,
        )
        return (ServedModel(name=MODEL, source="/nowhere", facts=facts, tokenizer_id=MODEL),)

    def _find_model(self, name: str) -> ServedModel | None:
        return self._models()[0] if name == MODEL else None

    def _model(self, name: str) -> ServedModel:
        if name != MODEL:
            raise InvalidRequest(f"Unknown base model {name!r}. This server has: {MODEL}.")
        return self._models()[0]

    # ---- sessions

    async def _create_session(
        self,
        tenant: Tenant,
        *,
        tags: tuple[str, ...],
        user_metadata: Json,
        display_name: str | None,
        project_id: str | None,
        sdk_version: str | None,
        idempotency_key: str | None,
    ) -> SessionId:
        if idempotency_key in self._by_key:
            return self._by_key[idempotency_key]
        session = SessionId(f"s{len(self._sessions)}")
        self._sessions[session] = True
        if idempotency_key is not None:
            self._by_key[idempotency_key] = session
        return session

    async def _active(self, tenant: Tenant, session: SessionId) -> SessionRecord:
        self._alive(session)
        return cast(SessionRecord, session)  # the face does not look at it

    async def finish_session(
        self, tenant: Tenant, session: SessionId, *, reason: str, detail: str | None
    ) -> None:
        self._called("finish_session", session=session, reason=reason, detail=detail)
        self._sessions[session] = False

    # ---- runs

    async def _create_run(
        self,
        tenant: Tenant,
        session: SessionId,
        *,
        seq: int,
        base_model: str,
        lora: LoraRequest,
        user_metadata: Json,
    ) -> Ticket:
        self._called("create_run", seq=seq, base_model=base_model, lora=lora)
        self._alive(session)
        self._model(base_model)
        spec = LoraSpec(rank=lora.rank, seed=lora.seed or 0)
        run = self._new_run(session, seq, spec, user_metadata)
        return self._finished(TicketKind.CREATE_RUN, RunCreated(run=run))

    async def _create_run_from(
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
        self._called("create_run_from", address=address, with_optimizer=with_optimizer)
        source = await self._checkpoint_info(tenant, address)
        run = self._new_run(session, seq, source.spec, user_metadata)
        return self._finished(TicketKind.CREATE_RUN, Loaded(run=run, address=address))

    async def _run_info(self, tenant: Tenant, run: RunId, *, accessible: bool = False) -> RunInfo:
        return self._run(run).info

    async def _run_page(
        self,
        tenant: Tenant,
        limit: int,
        offset: int,
        *,
        project: str | None = None,
        accessible: bool = False,
    ) -> Page[RunInfo]:
        infos = tuple(run.info for run in self._runs.values())
        page = infos[offset : offset + limit]
        return Page(items=page, total=len(infos), limit=limit, offset=offset)

    # ---- training

    async def _forward_backward(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        seq: int | None,
        batch: ForwardBackward,
        spans: BatchSpans | None = None,
        rated: bool = True,
    ) -> Ticket:
        self._called("forward_backward", run=run, seq=seq, batch=batch, spans=spans)
        self._run(run)
        logprobs = tuple(
            np.full(datum.target_tokens.shape, -0.5, np.float32) for datum in batch.data
        )
        result = ForwardBackwardResult(
            logprobs=logprobs, metrics={"loss:sum": float(sum(-a.sum() for a in logprobs))}
        )
        return self._placed(run, seq, TicketKind.FORWARD_BACKWARD, result)

    async def _optim_step(
        self, tenant: Tenant, run: RunId, *, seq: int | None, adam: AdamParams
    ) -> Ticket:
        self._called("optim_step", run=run, seq=seq, adam=adam)
        self._run(run)
        metrics = {"grad_norm:mean": 1.5, "odd:mean": float("nan")}
        return self._placed(run, seq, TicketKind.OPTIM_STEP, StepResult(metrics=metrics))

    async def _save_state(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        seq: int | None,
        name: str,
        overwrite: bool,
        ttl_s: int | None,
        user_metadata: Json,
        optimizer: bool = True,
    ) -> Ticket:
        self._called("save_state", run=run, seq=seq, name=name, overwrite=overwrite, ttl_s=ttl_s)
        address = CheckpointAddress(run=run, kind=CheckpointKind.TRAINING, name=name)
        self._keep(address, user_metadata)
        return self._placed(run, seq, TicketKind.SAVE_STATE, Saved(address=address))

    async def _load_state(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        seq: int | None,
        address: CheckpointAddress,
        with_optimizer: bool,
        reader: Tenant | None = None,
    ) -> Ticket:
        self._called("load_state", run=run, seq=seq, address=address, with_optimizer=with_optimizer)
        await self._checkpoint_info(tenant, address)
        return self._placed(run, seq, TicketKind.LOAD_STATE, Loaded(run=run, address=address))

    async def _save_external(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        seq: int | None,
        name: str,
        ttl_s: int | None,
        recipients: tuple[str, ...],
    ) -> Ticket:
        self._called("save_external", run=run, seq=seq, name=name, recipients=recipients)
        address = CheckpointAddress(run=run, kind=CheckpointKind.EXTERNAL, name=name)
        self._keep(address, {})
        exported = Exported(address=address, size_bytes=10)
        return self._placed(run, seq, TicketKind.SAVE_EXTERNAL, exported)

    async def _save_for_sampler(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        seq: int | None,
        name: str | None,
        sampler_seq: int | None,
        ttl_s: int | None,
        user_metadata: Json,
        inflight: bool,
    ) -> Ticket:
        self._called("save_for_sampler", run=run, seq=seq, name=name, sampler_seq=sampler_seq)
        if name is not None:
            address = CheckpointAddress(run=run, kind=CheckpointKind.SAMPLER, name=name)
            self._keep(address, user_metadata)
            saved = SamplerSaved(address=address, sampler=None)
        else:
            sampler = SamplerId(f"{self._run(run).info.session}:sample:{sampler_seq}")
            self._samplers[sampler] = SamplerInfo(sampler=sampler, base_model=MODEL, address=None)
            saved = SamplerSaved(address=None, sampler=sampler)
        return self._placed(run, seq, TicketKind.SAVE_FOR_SAMPLER, saved)

    async def _refuse(self, tenant: Tenant, run: RunId, *, seq: int) -> None:
        self.refused.append((run, seq))

    @contextmanager
    def _sending(self, tenant: Tenant) -> Generator[None]:
        self.num_sending += 1
        try:
            yield
        finally:
            self.num_sending -= 1

    # ---- sampling

    async def _create_sampler(
        self,
        tenant: Tenant,
        session: SessionId,
        *,
        seq: int,
        base_model: str | None,
        address: CheckpointAddress | None,
    ) -> SamplerInfo:
        self._alive(session)
        if address is not None:
            await self._checkpoint_info(tenant, address)
        else:
            self._model(base_model or "")
        sampler = SamplerId(f"{session}:sample:{seq}")
        info = SamplerInfo(sampler=sampler, base_model=MODEL, address=address)
        self._samplers[sampler] = info
        return info

    async def _sampler_info(self, tenant: Tenant, sampler: SamplerId) -> SamplerInfo:
        if sampler not in self._samplers:
            raise NotFound(f"There is no sampler {sampler!r}.")
        return self._samplers[sampler]

    async def _join_sampler(self, tenant: Tenant, sampler: SamplerId) -> int:
        await self._sampler_info(tenant, sampler)
        self._num_joined += 1
        return self._num_joined

    async def _completions(
        self,
        tenant: Tenant,
        clone: Clone,
        *,
        after: int,
        retrieved: tuple[TicketId, ...],
        timeout_s: float,
    ) -> Completions:
        self._called("completions", clone=clone, after=after, retrieved=retrieved)
        await self._sampler_info(tenant, clone.sampler)
        samples = [ticket for ticket, number in self._cursors.items() if number > after]
        if not samples:
            await asyncio.sleep(timeout_s)
        items = tuple(Completion(ticket=ticket, num_bytes=16) for ticket in samples)
        return Completions(items=items, cursor=max([after, *self._cursors.values()]))

    async def _sample(
        self, tenant: Tenant, sampler: SamplerId, *, seq: int | None, request: SampleRequest
    ) -> Ticket:
        self._called("sample", sampler=sampler, seq=seq, request=request)
        await self._sampler_info(tenant, sampler)
        sequence = SampledSequence(
            tokens=np.array([7, 8], np.int32),
            logprobs=np.array([-0.25, -0.5], np.float32),
            stop_reason=StopReason.STOP,
        )
        scores = np.full(len(request.prompt), -1.0, np.float32)
        scores[:1] = np.nan
        result = SampleResult(
            sequences=(sequence,) * request.num_samples,
            prompt_logprobs=scores if request.prompt_logprobs else None,
        )
        ticket = self._finished(TicketKind.SAMPLE, result)
        self._cursors[ticket.id] = len(self._cursors) + 1
        ids = tuple(f"{ticket.id}:{i}" for i in range(request.num_samples))
        return replace(ticket, sequence_ids=ids)

    # ---- tickets

    async def outcome(self, tenant: Tenant, ticket: TicketId, *, timeout_s: float) -> Outcome:
        if ticket == "held":
            self.open_waits += 1
            try:
                await asyncio.sleep(timeout_s)
            finally:
                self.open_waits -= 1
            return Waiting(queue_state=QueueState.PAUSED_CAPACITY, reason="busy")
        if ticket not in self.outcomes:
            raise NotFound(f"There is no request {ticket!r}.")
        return self.outcomes[ticket]

    async def _cancel(self, tenant: Tenant, ticket: TicketId) -> None:
        self._called("cancel", ticket=ticket)

    # ---- records

    async def _checkpoint_info(self, tenant: Tenant, address: CheckpointAddress) -> CheckpointInfo:
        info = self._run(address.run).checkpoints.get(address)
        if info is None:
            raise NotFound(f"There is no checkpoint {address.name!r}.")
        return info

    async def _checkpoints_of_run(
        self, tenant: Tenant, run: RunId, *, exports: bool = True
    ) -> tuple[CheckpointInfo, ...]:
        return tuple(self._run(run).checkpoints.values())

    async def _checkpoint_page(
        self, tenant: Tenant, limit: int, offset: int, *, exports: bool = True
    ) -> Page[CheckpointInfo]:
        infos = tuple(info for run in self._runs.values() for info in run.checkpoints.values())
        page = infos[offset : offset + limit]
        return Page(items=page, total=len(infos), limit=limit, offset=offset)

    async def _delete_checkpoint(self, tenant: Tenant, address: CheckpointAddress) -> None:
        await self._checkpoint_info(tenant, address)
        del self._run(address.run).checkpoints[address]

    async def _set_checkpoint_ttl(
        self, tenant: Tenant, address: CheckpointAddress, ttl_s: int | None
    ) -> None:
        await self._checkpoint_info(tenant, address)
        self._called("set_checkpoint_ttl", address=address, ttl_s=ttl_s)

    async def _set_checkpoint_public(
        self, tenant: Tenant, address: CheckpointAddress, *, public: bool
    ) -> None:
        info = await self._checkpoint_info(tenant, address)
        self._run(address.run).checkpoints[address] = replace(info, public=public)

    async def _copy_into_project(
        self,
        tenant: Tenant,
        source: CheckpointAddress,
        *,
        reader: Tenant,
        project: str,
        ttl_s: int | None,
        idempotency_key: str | None,
    ) -> CheckpointAddress:
        await self._checkpoint_info(reader, source)
        self._called("copy_into_project", project=project, idempotency_key=idempotency_key)
        return replace(source, run=RunId("copy:train:0"))

    async def _unload(self, tenant: Tenant, run: RunId) -> Ticket:
        self._run(run)
        return self._finished(TicketKind.UNLOAD_RUN, Unloaded(run=run))

    async def _session_info(self, tenant: Tenant, session: SessionId) -> SessionInfo:
        if session not in self._sessions:
            raise NotFound(f"There is no session {session!r}.")
        return SessionInfo(
            session=session,
            runs=tuple(run for run, kept in self._runs.items() if kept.info.session == session),
            samplers=tuple(s for s in self._samplers if s.startswith(f"{session}:")),
            created_at=NOW,
            user_metadata={"n": 1, "s": "x"},
        )

    async def _session_page(self, tenant: Tenant, limit: int, offset: int) -> Page[SessionId]:
        ids = tuple(self._sessions)
        return Page(items=ids[offset:][:limit], total=len(ids), limit=limit, offset=offset)

    async def _assign_project(self, tenant: Tenant, session: SessionId, project: str) -> None:
        await self._session_info(tenant, session)
        self._called("assign_project", session=session, project=project)

    async def _search_sessions(
        self, tenant: Tenant, query: SessionQuery, limit: int
    ) -> FoundSessions:
        self._called("search_sessions", query=query, limit=limit)
        return FoundSessions(items=(), next=SessionPlace(NOW, SessionId("s0")))

    async def _of_day(
        self, tenant: Tenant, day: date | None, *, family: str | None
    ) -> tuple[AuditRecord, ...]:
        self._called("audit", day=day, family=family)
        details = {"path": "s0:train:0/weights/a", "actor": "laptop"}
        event = AuditRecord(
            id="e",
            tenant_id=tenant.id,
            event="checkpoints.deleted",
            details=details,
            created_at=NOW,
        )
        return (event,)

    async def _usage_between(self, tenant: Tenant, start: datetime, end: datetime) -> UsageReport:
        rows = tuple(
            UsageRecord(
                tenant_id=tenant.id,
                hour=NOW,
                key_id=tenant.key_id,
                kind=kind,
                base_model=MODEL,
                session_id=SessionId("s0"),
                amount=3,
            )
            for kind in UsageKind
        )
        return UsageReport(rows=rows, sessions={}, key_names={tenant.key_id: "laptop"})

    async def _stored(self, tenant: Tenant, project: str | None) -> Mapping[str | None, Stored]:
        return {project: Stored(num_checkpoints=1, num_bytes=5 * 10**8)}

    async def _grant_trace(self, tenant: Tenant, session: SessionId) -> SessionId:
        await self._session_info(tenant, session)
        return session

    async def _trace(self, session: SessionId) -> bytes:
        return b"{}"

    # ---- inside

    def called(self, name: str) -> dict[str, Any]:
        """The arguments of the last call of that name."""
        return next(arguments for what, arguments in reversed(self.calls) if what == name)

    def _called(self, what: str, /, **arguments: Any) -> None:
        self.calls.append((what, arguments))
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def _alive(self, session: SessionId) -> None:
        if session not in self._sessions:
            raise NotFound(f"There is no session {session!r}.")
        if not self._sessions[session]:
            raise SessionEnded(f"Session {session!r} was finished; create a new one.")

    def _new_run(self, session: SessionId, seq: int, spec: LoraSpec, metadata: Json) -> RunId:
        run = RunId(f"{session}:train:{seq}")
        info = RunInfo(
            run=run,
            session=session,
            base_model=MODEL,
            spec=spec,
            tokenizer_id=MODEL,
            architecture="qwen3",
            user_metadata=metadata,
            created_at=NOW,
            last_request_at=NOW,
            owner="test",
            last_checkpoint=None,
            last_sampler_checkpoint=None,
        )
        self._runs[run] = _Run(info)
        return run

    def _run(self, run: RunId) -> _Run:
        if run not in self._runs:
            raise NotFound(f"There is no training run {run!r}.")
        return self._runs[run]

    def _keep(self, address: CheckpointAddress, metadata: Json) -> None:
        run = self._run(address.run)
        info = CheckpointInfo(
            address=address,
            base_model=MODEL,
            spec=run.info.spec,
            created_at=NOW,
            expires_at=None,
            size_bytes=10,
            public=False,
            user_metadata=metadata,
        )
        run.checkpoints[address] = info
        if address.kind is CheckpointKind.TRAINING:
            run.info = replace(run.info, last_checkpoint=info)
        else:
            run.info = replace(run.info, last_sampler_checkpoint=info)

    def _placed(self, run: RunId, seq: int | None, kind: TicketKind, result: Result) -> Ticket:
        place = (run, seq or len(self.outcomes) + 1_000_000)
        if place not in self._by_place:
            self._by_place[place] = self._finished(kind, result)
        return self._by_place[place]

    def _finished(self, kind: TicketKind, result: Result) -> Ticket:
        ticket = Ticket(id=TicketId(f"r{len(self.outcomes)}"), kind=kind)
        self.outcomes[ticket.id] = Done(result=result)
        return ticket
