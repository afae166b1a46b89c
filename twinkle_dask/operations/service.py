"""The front of the core: what a face may call, whatever its protocol."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import structlog

from twinkle_dask.cluster.supervisor import Supervisor
from twinkle_dask.config import ServiceConfig
from twinkle_dask.operations import validation
from twinkle_dask.operations.audit import Audit
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.closing import Closing
from twinkle_dask.operations.quotas import Quotas
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.sampling import Sampling
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.sweeping import sweep
from twinkle_dask.operations.tenants import Tenants
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.training import Training
from twinkle_dask.operations.upkeep import Upkeep
from twinkle_dask.operations.values import Outcome, QueueState, Tenant, Waiting
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.store import Store
from twinkle_dask.types import SessionId, TicketId

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The parts, by subject; each is told who asks and checks that it is theirs.

    Attributes:
        made_key: An API key made at this start, to be shown once; None if keys were configured.
    """

    config: ServiceConfig
    tenants: Tenants
    catalogue: Catalogue
    sessions: Sessions
    runs: Runs
    training: Training
    sampling: Sampling
    checkpoints: Checkpoints
    tickets: TicketBoard
    audit: Audit
    supervisor: Supervisor
    made_key: str | None

    async def finish_session(
        self, tenant: Tenant, session: SessionId, *, reason: str, detail: str | None
    ) -> None:
        """Close a session and free what its runs hold on hosts."""
        validation.text(detail, "detail", validation.MAX_DETAIL_LENGTH)
        if await self.sessions.finish(tenant, session, reason=reason, detail=detail):
            await self.runs.release_session(session)

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
        StartupError: The cluster or a base model cannot be had.
    """
    tenants = Tenants(store)
    made_key = await tenants.configure(config.api_keys)
    supervisor = Supervisor(config, blobs.url)
    try:
        await supervisor.start()
        facts = {model.source: supervisor.facts(model.source) for model in config.models.values()}
        catalogue = Catalogue.of(config, facts)
        audit = Audit(store)
        sessions = Sessions(store)
        checkpoints = Checkpoints(store, blobs)
        quotas = Quotas.of(config.limits)
        tickets = TicketBoard(store, blobs, quotas.queued_bytes)
        runs = Runs(
            store=store,
            blobs=blobs,
            supervisor=supervisor,
            catalogue=catalogue,
            sessions=sessions,
            checkpoints=checkpoints,
            tickets=tickets,
            journal=config.journal,
            limits=config.limits,
            quotas=quotas,
        )
        sampling = Sampling(
            store=store,
            blobs=blobs,
            supervisor=supervisor,
            catalogue=catalogue,
            sessions=sessions,
            checkpoints=checkpoints,
            tickets=tickets,
            limits=config.limits,
            quotas=quotas,
        )
        closing = Closing(
            store=store,
            blobs=blobs,
            sessions=sessions,
            runs=runs,
            sampling=sampling,
            checkpoints=checkpoints,
        )
        upkeep = Upkeep(
            config=config,
            store=store,
            blobs=blobs,
            sessions=sessions,
            runs=runs,
            checkpoints=checkpoints,
            tickets=tickets,
            closing=closing,
        )
        await sweep(store, blobs)
        await sessions.load()
        await runs.recover()
        await sampling.recover()
        tidying = asyncio.create_task(upkeep.run_forever(), name="upkeep")
        try:
            yield Service(
                config=config,
                tenants=tenants,
                catalogue=catalogue,
                sessions=sessions,
                runs=runs,
                training=Training(runs, store, checkpoints, catalogue, config.limits),
                sampling=sampling,
                checkpoints=checkpoints,
                tickets=tickets,
                audit=audit,
                supervisor=supervisor,
                made_key=made_key,
            )
        finally:
            tidying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await tidying
            await runs.stop()
            await sampling.stop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(upkeep.flush(), 1.0)
    finally:
        await supervisor.close()
