"""The real operations over a real store in a folder; only the hosts are make-believe."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from twinkle_dask import packing
from twinkle_dask.cluster.commands import (
    Command,
    ExportFolder,
    Failure,
    FolderSaved,
    LoadFolder,
    Sample,
    SaveFolder,
)
from twinkle_dask.config import JournalConfig, LimitConfig, ModelConfig, ServiceConfig
from twinkle_dask.errors import StorageFailed
from twinkle_dask.operations.audit import Audit
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.closing import Closing
from twinkle_dask.operations.drawing import Drawing
from twinkle_dask.operations.events import Events
from twinkle_dask.operations.inflight import InflightWeights
from twinkle_dask.operations.processors import Processors
from twinkle_dask.operations.quotas import Quotas
from twinkle_dask.operations.recording import Recording
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.samplers import Samplers
from twinkle_dask.operations.sampling import Sampling
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.upkeep import Upkeep
from twinkle_dask.operations.values import Done, LoraRequest, ServedModel, Tenant
from twinkle_dask.processor.commands import run
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.store import Store, sqlite_url
from twinkle_dask.types import (
    ForwardBackward,
    ForwardBackwardResult,
    ModelFacts,
    OptimStep,
    RunId,
    SamplePart,
    SampleResult,
    SessionId,
    StepResult,
    TenantId,
    TicketId,
)

ANN = Tenant(id=TenantId("ann"), name="Ann", key_hint="1234")
MODEL = "tiny"
FACTS = ModelFacts(
    architecture="x",
    vocab_size=100,
    context_length=100,
    num_parameters=1,
    dtype="float32",
    eos_token_ids=(0,),
    max_rank=8,
    has_tokenizer=False,
)


@dataclass
class Host:
    """Does nothing, successfully; while ``open`` is not set, it does not answer.

    While ``drawing`` is not set, it does not answer to samples; without ``up`` it is not there.
    Without ``snapshots`` it writes none. With ``logprobs``, which are used up in turn, its batches
    have that logprob everywhere.
    """

    blobs: BlobStore
    name: str = "host"
    load: int = 0
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    drawing: asyncio.Event = field(default_factory=asyncio.Event)
    up: asyncio.Event = field(default_factory=asyncio.Event)
    snapshots: bool = True
    logprobs: list[float] = field(default_factory=list[float])
    commands: list[object] = field(default_factory=list[object])
    watching: list[Callable[[SamplePart], None]] = field(
        default_factory=list[Callable[[SamplePart], None]]
    )

    def send(
        self, command: Command, on_part: Callable[[SamplePart], None] | None = None
    ) -> "asyncio.Future[bytes]":
        body = packing.unpack(command.body)
        self.commands.append(body)
        if on_part is not None:
            self.watching.append(on_part)
        return asyncio.ensure_future(self._answer(body))

    async def _answer(self, body: object) -> bytes:
        await self.open.wait()
        await asyncio.sleep(0)  # never before whoever sent it waits for it
        match body:
            case SaveFolder() if body.folder.startswith("snapshots/") and not self.snapshots:
                raise StorageFailed("The disk is full.")
            case LoadFolder() if not self.blobs.names(body.folder):
                raise StorageFailed("There is no such folder.")
            case SaveFolder() | ExportFolder():
                self.blobs.put_folder(body.folder, {"state.json": b"{}"}, overwrite=True)
                return packing.pack(FolderSaved(num_bytes=2))
            case Sample():
                await self.drawing.wait()
                return packing.pack(SampleResult(sequences=()))
            case OptimStep():
                return packing.pack(StepResult(metrics={}))
            case ForwardBackward() if self.logprobs:
                value = self.logprobs.pop(0)
                rows = tuple(np.full(d.target_tokens.shape, value, np.float32) for d in body.data)
                return packing.pack(ForwardBackwardResult(logprobs=rows, metrics={}))
            case _:
                return b""


@dataclass
class Supervisor:
    host: Host

    async def trainer(self, _source: str) -> Host:
        return self.host

    @property
    def processing(self) -> "Processing":
        return Processing()

    async def sampler(self, _source: str, _adapter: str | None) -> Host:
        await self.host.up.wait()
        return self.host


class Processing:
    """Does the work of CPU workers in a thread."""

    async def call(self, function: str, value: object, *, tenant: TenantId) -> Any:
        packed = await asyncio.to_thread(run, function, packing.pack(value), "info")
        answer = packing.unpack(packed)
        if "kind" in answer:
            raise Failure(**answer).error()
        return answer["result"]


@dataclass(kw_only=True)
class Parts:
    store: Store
    blobs: BlobStore
    host: Host
    sessions: Sessions
    runs: Runs
    samplers: Samplers
    sampling: Sampling
    recording: Recording
    events: Events
    checkpoints: Checkpoints
    tickets: TicketBoard
    quotas: Quotas
    processors: Processors
    closing: Closing
    upkeep: Upkeep
    folder: Path

    async def a_session(self) -> SessionId:
        return await self.sessions.create(
            ANN,
            tags=(),
            user_metadata={},
            display_name=None,
            project_id=None,
            sdk_version=None,
            idempotency_key=None,
        )

    async def a_run(self, session: SessionId) -> RunId:
        """A run that has been created, as its client knows."""
        ticket = await self.runs.create(
            ANN, session, seq=0, base_model=MODEL, lora=LoraRequest(rank=1), user_metadata={}
        )
        await self.done(ticket.id)
        assert ticket.run is not None
        return ticket.run

    async def done(self, ticket: TicketId) -> None:
        assert isinstance(await self.tickets.wait(ANN.id, ticket, 5), Done)

    async def end(self, session: SessionId) -> None:
        assert await self.sessions.finish(ANN, session, reason="done", detail=None)

    def files(self, kind: str) -> list[Path]:
        return [path for path in self.folder.glob(f"blobs/{kind}/**/*") if path.is_file()]


@asynccontextmanager
async def open_parts(folder: Path, limits: LimitConfig | None = None) -> AsyncGenerator[Parts]:
    """As ``open_service`` puts them together, without recovering anything."""
    config = ServiceConfig(
        models={MODEL: ModelConfig(source="tiny")},
        journal=JournalConfig(keep_delivered_s=1e-6, snapshot_operations=2),
        limits=limits or LimitConfig(),
    )
    store = await Store.open(sqlite_url(folder / "records.sqlite3"))
    blobs = BlobStore(folder / "blobs")
    host = Host(blobs)
    host.open.set()
    host.drawing.set()
    host.up.set()
    supervisor = cast(Any, Supervisor(host))
    served = ServedModel(name=MODEL, source="tiny", facts=FACTS, tokenizer_id=MODEL)
    catalogue = Catalogue({MODEL: served})
    audit = Audit(store)
    sessions, checkpoints = Sessions(store, audit), Checkpoints(store, blobs, audit)
    quotas = Quotas.of(config.limits)
    tickets = TicketBoard(store, blobs, quotas.queued_bytes)
    inflight = InflightWeights(store, checkpoints)
    runs = Runs(
        store=store,
        blobs=blobs,
        supervisor=supervisor,
        catalogue=catalogue,
        sessions=sessions,
        checkpoints=checkpoints,
        inflight=inflight,
        tickets=tickets,
        journal=config.journal,
        limits=config.limits,
        quotas=quotas,
    )
    samplers = Samplers(
        store=store,
        catalogue=catalogue,
        sessions=sessions,
        checkpoints=checkpoints,
        inflight=inflight,
    )
    events = Events(store)
    recording = Recording(store, blobs)
    drawing = Drawing(
        supervisor=supervisor,
        samplers=samplers,
        recording=recording,
        tickets=tickets,
        events=events,
        quotas=quotas,
    )
    sampling = Sampling(
        store=store,
        blobs=blobs,
        samplers=samplers,
        drawing=drawing,
        tickets=tickets,
        events=events,
        limits=config.limits,
        quotas=quotas,
    )
    processors = Processors(
        config=config,
        store=store,
        blobs=blobs,
        supervisor=supervisor,
        catalogue=catalogue,
        sessions=sessions,
    )
    closing = Closing(
        store=store,
        blobs=blobs,
        sessions=sessions,
        runs=runs,
        samplers=samplers,
        events=events,
        recording=recording,
        inflight=inflight,
        checkpoints=checkpoints,
        processors=processors,
    )
    upkeep = Upkeep(
        config=config,
        store=store,
        blobs=blobs,
        sessions=sessions,
        runs=runs,
        samplers=samplers,
        checkpoints=checkpoints,
        tickets=tickets,
        closing=closing,
    )
    await sessions.load()
    try:
        yield Parts(
            store=store,
            blobs=blobs,
            host=host,
            sessions=sessions,
            runs=runs,
            samplers=samplers,
            sampling=sampling,
            recording=recording,
            events=events,
            checkpoints=checkpoints,
            tickets=tickets,
            quotas=quotas,
            processors=processors,
            closing=closing,
            upkeep=upkeep,
            folder=folder,
        )
    finally:
        await runs.stop()
        await sampling.stop()
        await store.close()
