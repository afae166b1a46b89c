"""What was used, summed by the hour. Counted with the outcome itself, so once and exactly."""

from datetime import datetime
from functools import cache

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Insert,
    and_,
    bindparam,
    func,
    literal,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite

from twinkle_dask.store.database import Database
from twinkle_dask.store.records import UsageKind, UsageRecord
from twinkle_dask.store.tables import operations, runs, samplers
from twinkle_dask.store.tables import usage as t
from twinkle_dask.types import SessionId, TenantId, TicketId


class Usage:
    """The sums of all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def between(
        self, tenant: TenantId, start: datetime, end: datetime
    ) -> tuple[UsageRecord, ...]:
        """The tenant's hours from ``start`` up to but without ``end``: oldest first, then most."""
        chosen = and_(t.c.tenant_id == tenant, t.c.hour >= start, t.c.hour < end)
        return await self._database.all(
            UsageRecord, select(t).where(chosen).order_by(t.c.hour, t.c.amount.desc(), t.c.kind)
        )

    async def of_session(self, tenant: TenantId, session: SessionId) -> tuple[UsageRecord, ...]:
        """What was used in one session, oldest first."""
        chosen = and_(t.c.tenant_id == tenant, t.c.session_id == session)
        return await self._database.all(
            UsageRecord, select(t).where(chosen).order_by(t.c.hour, t.c.kind)
        )


def count(connection: Connection, ticket: TicketId, kind: UsageKind, when: datetime) -> None:
    """Add what an operation used of one kind to the hour of ``when``.

    For the transaction that stores the operation's outcome, and only if it is the first outcome.
    """
    hour = when.replace(minute=0, second=0, microsecond=0)
    connection.execute(_adding(kind, connection.dialect.name), {"ticket": ticket, "in_hour": hour})


@cache
def _adding(kind: UsageKind, dialect: str) -> Insert:
    """The operation's amount onto its row of the table, made once for each kind."""
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    amount = _amount(kind)
    amounts = (
        select(
            operations.c.tenant_id,
            bindparam("in_hour", type_=t.c.hour.type),
            func.coalesce(operations.c.key_id, 0),
            literal(kind, t.c.kind.type),
            func.coalesce(runs.c.base_model, samplers.c.base_model),
            func.coalesce(runs.c.session_id, samplers.c.session_id),
            amount,
        )
        .select_from(operations)
        .outerjoin(runs, runs.c.id == operations.c.run_id)
        .outerjoin(samplers, samplers.c.id == operations.c.sampler_id)
        .where(operations.c.ticket_id == bindparam("ticket"), amount > 0)
    )
    adding = insert(t).from_select([column.name for column in _ORDER], amounts)
    return adding.on_conflict_do_update(
        index_elements=list(t.primary_key), set_={"amount": t.c.amount + adding.excluded.amount}
    )


_ORDER = (
    t.c.tenant_id,
    t.c.hour,
    t.c.key_id,
    t.c.kind,
    t.c.base_model,
    t.c.session_id,
    t.c.amount,
)


def _amount(kind: UsageKind) -> ColumnElement[int]:
    match kind:
        case UsageKind.TRAINING | UsageKind.PREFILL:
            return operations.c.input_tokens
        case UsageKind.SAMPLE:
            return operations.c.output_tokens
        case UsageKind.CHECKPOINT:
            return literal(1, BigInteger)
