"""The front of the core: what a face may call, whatever its protocol."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import structlog

from twinkle_dask.cluster.supervisor import Supervisor
from twinkle_dask.config import ServiceConfig
from twinkle_dask.operations import validation
from twinkle_dask.operations.adapter_state import AdapterState
from twinkle_dask.operations.adapter_steps import AdapterSteps
from twinkle_dask.operations.adapter_training import AdapterTraining
from twinkle_dask.operations.adapters import Adapters
from twinkle_dask.operations.audit import Audit
from twinkle_dask.operations.batch_training import BatchTraining
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.closing import Closing
from twinkle_dask.operations.copying import Copying
from twinkle_dask.operations.custom_losses import CustomLosses
from twinkle_dask.operations.downloads import Downloads
from twinkle_dask.operations.drawing import Drawing
from twinkle_dask.operations.events import Events
from twinkle_dask.operations.inflight import InflightWeights
from twinkle_dask.operations.pending_batches import PendingBatches
from twinkle_dask.operations.processors import Processors
from twinkle_dask.operations.provenance import Provenance
from twinkle_dask.operations.quotas import Quotas
from twinkle_dask.operations.recording import Recording
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.sampled_weights import SampledWeights
from twinkle_dask.operations.samplers import Samplers
from twinkle_dask.operations.sampling import Sampling
from twinkle_dask.operations.save_roots import SaveRoots
from twinkle_dask.operations.saving import Saving
from twinkle_dask.operations.searching import Searching
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.sweeping import sweep
from twinkle_dask.operations.templates import Templates
from twinkle_dask.operations.tenants import Tenants
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.traces import Traces
from twinkle_dask.operations.training import Training
from twinkle_dask.operations.upkeep import Upkeep
from twinkle_dask.operations.uploads import Uploads
from twinkle_dask.operations.usage import Usage
from twinkle_dask.operations.values import Outcome, QueueState, ServedModel, Tenant, Waiting
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.store import Store
from twinkle_dask.types import SessionId, TicketId

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The parts, by subject; each is told who asks and checks that it is theirs.

    Attributes:
        url_secret: Signs the URLs of downloads; kept across restarts.
        made_key: An API key made at this start, to be shown once; None if there are others.
        token_secret: Signs what faces give out in place of a key.
    """

    config: ServiceConfig
    tenants: Tenants
    catalogue: Catalogue
    sessions: Sessions
    runs: Runs
    training: Training
    adapters: Adapters
    adapter_training: AdapterTraining
    adapter_steps: AdapterSteps
    adapter_state: AdapterState
    save_roots: SaveRoots
    saving: Saving
    uploads: Uploads
    batch_training: BatchTraining
    custom_losses: CustomLosses
    samplers: Samplers
    sampling: Sampling
    sampled_weights: SampledWeights
    checkpoints: Checkpoints
    copying: Copying
    downloads: Downloads
    tickets: TicketBoard
    audit: Audit
    searching: Searching
    templates: Templates
    processors: Processors
    usage: Usage
    traces: Traces
    supervisor: Supervisor
    url_secret: bytes = field(repr=False)
    made_key: str | None
    token_secret: bytes = field(repr=False)

    async def finish_session(
        self, tenant: Tenant, session: SessionId, *, reason: str, detail: str | None
    ) -> None:
        """Close a session and free what its runs hold on hosts."""
        validation.text(detail, "detail", validation.MAX_DETAIL_LENGTH)
        if await self.sessions.finish(tenant, session, reason=reason, detail=detail):
            await self.runs.release_session(session)

    def why_not_up(self, model: ServedModel) -> str | None:
        """Why a base model cannot be used at the moment; None if its hosts are there."""
        return self.supervisor.why_not_up(model.source)

    async def outcome(self, tenant: Tenant, ticket: TicketId, *, timeout_s: float) -> Outcome:
        """What became of a ticket; waits at most ``timeout_s`` for it.

        Raises:
            NotFound: No such ticket of this tenant.
        """
        outcome = await self.tickets.wait(tenant.id, ticket, timeout_s)
        if not isinstance(outcome, Waiting):
            return outcome
        run = self.tickets.run_of(ticket)
        reason = None if run is None else self.runs.paused(run)
        if not self.supervisor.links():
            reason = "No host is up; the work is kept and will be done."
        if reason is None:
            return outcome
        return replace(outcome, queue_state=QueueState.PAUSED_CAPACITY, reason=reason)


@asynccontextmanager
async def open_service(
    config: ServiceConfig, store: Store, blobs: BlobStore
) -> AsyncGenerator[Service]:
    """Start the cluster and everything over it; stop it all at the end of the block.

    Raises:
        StartupError: The cluster or a base model cannot be had, or there is no key and others
            could connect.
    """
    audit = Audit(store)
    tenants = Tenants(store, audit)
    made_key = await tenants.configure(config.api_keys, loopback=config.loopback)
    token_secret = await store.secrets.get("jwt")
    supervisor = Supervisor(config, blobs.url)
    try:
        await supervisor.start()
        facts = {model.source: supervisor.facts(model.source) for model in config.models.values()}
        catalogue = Catalogue.of(config, facts)
        sessions = Sessions(store, audit)
        checkpoints = Checkpoints(store, blobs, audit)
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
        training = Training(
            runs, store, checkpoints, catalogue, config.limits, Provenance(recording)
        )
        await sweep(store, blobs)
        await sessions.load()
        await runs.recover()
        await sampling.recover()
        tidying = asyncio.create_task(upkeep.run_forever(), name="upkeep")
        watching = asyncio.create_task(upkeep.watch_queues(), name="queues")
        adapters = Adapters(store, sessions, catalogue, runs, tickets)
        save_roots = SaveRoots(config.save_roots)
        saving = Saving(
            store=store,
            blobs=blobs,
            training=training,
            checkpoints=checkpoints,
            tickets=tickets,
            adapters=adapters,
            save_roots=save_roots,
        )
        uploads = Uploads(store, saving, audit, config.upload_roots)
        await uploads.recover()
        batch_training = BatchTraining(runs, training, catalogue, tickets)
        adapter_steps = AdapterSteps(
            adapters=adapters, training=training, tickets=tickets, store=store
        )
        try:
            yield Service(
                config=config,
                tenants=tenants,
                catalogue=catalogue,
                sessions=sessions,
                runs=runs,
                training=training,
                adapters=adapters,
                save_roots=save_roots,
                saving=saving,
                uploads=uploads,
                batch_training=batch_training,
                adapter_training=AdapterTraining(
                    adapters=adapters,
                    batches=batch_training,
                    training=training,
                    runs=runs,
                    catalogue=catalogue,
                    tickets=tickets,
                    pending=PendingBatches(adapters, store, blobs),
                    steps=adapter_steps,
                ),
                adapter_steps=adapter_steps,
                adapter_state=AdapterState(
                    adapters=adapters,
                    training=training,
                    runs=runs,
                    catalogue=catalogue,
                    checkpoints=checkpoints,
                    tickets=tickets,
                    blobs=blobs,
                ),
                custom_losses=CustomLosses(store, sessions, runs, enabled=config.custom_losses),
                samplers=samplers,
                sampling=sampling,
                sampled_weights=SampledWeights(
                    store=store,
                    catalogue=catalogue,
                    sessions=sessions,
                    samplers=samplers,
                    checkpoints=checkpoints,
                ),
                checkpoints=checkpoints,
                copying=Copying(store, checkpoints, sessions, audit),
                downloads=Downloads(store, blobs, checkpoints, audit),
                tickets=tickets,
                audit=audit,
                supervisor=supervisor,
                url_secret=await store.secrets.get("urls"),
                usage=Usage(store, tenants),
                traces=Traces(store),
                searching=Searching(store),
                templates=Templates(supervisor, catalogue),
                processors=processors,
                made_key=made_key,
                token_secret=token_secret,
            )
        finally:
            for task in (tidying, watching):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await uploads.stop()
            await runs.stop()
            await sampling.stop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(upkeep.flush(), 1.0)
    finally:
        await supervisor.close()
