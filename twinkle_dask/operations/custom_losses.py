"""Losses that tenants define: made once in a session, then named by its batches."""

import asyncio
import secrets
from collections.abc import Sequence

import structlog

from twinkle_dask import packing
from twinkle_dask.clock import utc_now
from twinkle_dask.custom_losses import Node, checked_graph
from twinkle_dask.errors import InvalidRequest, NotFound, NotSupported
from twinkle_dask.operations import validation
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.values import CustomLossCreated, Tenant, Ticket, TicketKind
from twinkle_dask.store.records import CustomLossRecord, OperationRecord, OperationState
from twinkle_dask.store.store import Store
from twinkle_dask.types import CustomLoss, RunId, SessionId, TicketId

log = structlog.stdlib.get_logger(__name__)

MAX_PER_SESSION = 256
_CHECK_INLINE_NODES = 64


class CustomLosses:
    """The losses of sessions that are alive.

    Args:
        store: Keeps them over a restart.
        sessions: Whose they are.
        runs: Whose batches name them.
        enabled: Whether tenants may define any.
    """

    def __init__(self, store: Store, sessions: Sessions, runs: Runs, *, enabled: bool) -> None:
        self._store = store
        self._sessions = sessions
        self._runs = runs
        self._enabled = enabled

    async def create(
        self,
        tenant: Tenant,
        session: SessionId,
        *,
        seq: int,
        name: str,
        ranks: Sequence[tuple[str, int]],
        nodes: Sequence[Node],
    ) -> Ticket:
        """Check a loss and keep it. ``seq`` counts the session's losses; a repeat finds the first.

        Returns:
            A ticket whose result is there already.

        Raises:
            InvalidRequest: The loss is not allowed, or the session has too many.
        """
        if not self._enabled:
            raise NotSupported(
                "This server does not compute custom losses; give forward_backward_custom a plain "
                "function, which your client evaluates."
            )
        await self._sessions.active(tenant, session)
        loss = await self._store.custom_losses.at(session, seq)
        if loss is None:
            validation.text(name, "The name of a loss", validation.MAX_LABEL_LENGTH)
            if await self._store.custom_losses.count(session) >= MAX_PER_SESSION:
                raise InvalidRequest(
                    f"A session may have {MAX_PER_SESSION} custom losses. Make each of them once, "
                    "and give as inputs what changes from batch to batch."
                )
            if len(nodes) > _CHECK_INLINE_NODES:
                graph = await asyncio.to_thread(checked_graph, ranks, nodes)
            else:
                graph = checked_graph(ranks, nodes)
            loss = await self._store.custom_losses.add(
                CustomLossRecord(
                    id=f"loss-{secrets.token_hex(12)}",
                    tenant_id=tenant.id,
                    session_id=session,
                    loss_seq=seq,
                    name=name,
                    ranks=[list(pair) for pair in ranks],
                    graph=graph,
                    created_at=utc_now(),
                )
            )
            log.info("custom_loss_created", session=session, loss=loss.id, nodes=len(nodes))
        return await self._done(tenant, loss)

    async def get(self, tenant: Tenant, run: RunId, loss: str) -> CustomLoss:
        """The loss that a batch of a run names.

        Raises:
            NotFound: No such loss of this tenant, or no such run.
            InvalidRequest: It belongs to another session.
        """
        lane = await self._runs.lane(tenant, run)
        record = await self._store.custom_losses.get(tenant.id, loss)
        if record is None:
            raise NotFound(
                f"There is no custom loss {loss[:60]!r}; losses live as long as their session."
            )
        if record.session_id != lane.run.session_id:
            raise InvalidRequest(
                f"Custom loss {record.name!r} belongs to session {record.session_id!r}; create it "
                "in this run's session too."
            )
        ranks = {str(name): int(rank) for name, rank in record.ranks}
        return CustomLoss(id=record.id, name=record.name, ranks=ranks, graph=record.graph)

    async def _done(self, tenant: Tenant, loss: CustomLossRecord) -> Ticket:
        """A ticket with its result, as if it had been worked on."""
        ticket = TicketId(secrets.token_hex(12))
        result = packing.pack(CustomLossCreated(loss=loss.id))
        now = utc_now()
        await self._store.journal.add(
            OperationRecord(
                ticket_id=ticket,
                tenant_id=tenant.id,
                kind=TicketKind.CREATE_CUSTOM_LOSS,
                changes_run=False,
                payload_bytes=0,
                state=OperationState.DONE,
                result=result,
                result_bytes=len(result),
                created_at=now,
                finished_at=now,
            )
        )
        return Ticket(id=ticket, kind=TicketKind.CREATE_CUSTOM_LOSS)
