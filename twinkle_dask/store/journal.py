"""The journal: every acknowledged operation until neither its client nor a replay needs it."""

from collections.abc import Iterable
from datetime import datetime

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    delete,
    exists,
    func,
    or_,
    select,
    true,
    union_all,
    update,
)

from twinkle_dask.store import usage
from twinkle_dask.store.database import Database
from twinkle_dask.store.records import OperationRecord, OperationState, UsageKind
from twinkle_dask.store.runs import LIVE
from twinkle_dask.store.tables import operations as t
from twinkle_dask.store.tables import runs, samplers
from twinkle_dask.types import RunId, SamplerId, SessionId, TenantId, TicketId

_WITHOUT_BYTES = tuple(column for column in t.c if column.name not in {"payload", "result"})
_SETTLE = update(t).where(t.c.ticket_id == bindparam("ticket"), t.c.state == OperationState.PENDING)


class DuplicateOperation(Exception):
    """The place in the order (or the ticket) is taken; not an error of the tenant.

    Attributes:
        stored: The operation that holds it.
    """

    def __init__(self, stored: OperationRecord) -> None:
        super().__init__(stored)
        self.stored = stored


class Journal:
    """The operations of all tenants."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, operation: OperationRecord) -> None:
        """Store an operation; when this returns it survives the death of any process.

        Raises:
            DuplicateOperation: Its (run, seq), (sampler, seq) or ticket is there already.
        """

        def same() -> ColumnElement[bool]:
            ticket = t.c.ticket_id == operation.ticket_id
            owners = ((t.c.run_id, operation.run_id), (t.c.sampler_id, operation.sampler_id))
            places = (
                and_(column == owner, t.c.seq == operation.seq)
                for column, owner in owners
                if owner is not None and operation.seq is not None  # NULLs are never the same
            )
            return or_(ticket, *places)

        stored = await self._database.insert(t, operation, same)
        if stored != operation:  # equal: our own, from a commit whose answer was lost
            raise DuplicateOperation(stored)

    async def finish(
        self,
        ticket: TicketId,
        *,
        result: bytes | None = None,
        result_path: str | None = None,
        result_bytes: int,
        when: datetime,
        output_tokens: int | None = None,
        used: tuple[UsageKind, ...] = (),
    ) -> bool:
        """Record a result; False if the operation was not pending (the first outcome stands).

        Args:
            ticket: Whose.
            result: The packed result, or
            result_path: the blob with it.
            result_bytes: How long it is.
            when: Now.
            output_tokens: How many were drawn.
            used: What to count for the tenant, in the same transaction.
        """
        values = {
            "ticket": ticket,
            "state": OperationState.DONE,
            "result": result,
            "result_path": result_path,
            "result_bytes": result_bytes,
            "finished_at": when,
            "output_tokens": output_tokens,
        }

        def work(connection: Connection) -> bool:
            if connection.execute(_SETTLE, values).rowcount != 1:
                return False
            for kind in used:
                usage.count(connection, ticket, kind, when)
            return True

        return await self._database.write(work)

    async def fail(self, ticket: TicketId, *, kind: str, message: str, when: datetime) -> bool:
        """Record a failure; False if the operation was not pending (the first outcome stands)."""
        return await self._settle(
            ticket,
            state=OperationState.FAILED,
            error_kind=kind,
            error_message=message,
            finished_at=when,
        )

    async def delivered(self, tickets: Iterable[TicketId], when: datetime) -> None:
        """Note, in one write, that clients were given the outcomes of these tickets."""
        await self._database.change_named(
            update(t).values(delivered_at=when), t.c.ticket_id, tickets
        )

    async def get(self, tenant: TenantId, ticket: TicketId) -> OperationRecord | None:
        """The tenant's operation; None if there is none or it is another tenant's."""
        return await self._database.one(
            OperationRecord, select(t).where(t.c.ticket_id == ticket, t.c.tenant_id == tenant)
        )

    async def at(self, run: RunId, seq: int) -> OperationRecord | None:
        """The operation at a place of a run's order."""
        return await self._database.one(
            OperationRecord, select(t).where(t.c.run_id == run, t.c.seq == seq)
        )

    async def last_of_kind(self, run: RunId, kind: str) -> OperationRecord | None:
        """The run's newest operation of one kind."""
        query = select(t).where(t.c.run_id == run, t.c.kind == kind)
        return await self._database.one(OperationRecord, query.order_by(t.c.seq.desc()).limit(1))

    async def first_pending_seq(self, run: RunId) -> int | None:
        """The lowest place of a run whose operation has no outcome; None if there is none."""
        pending = and_(t.c.run_id == run, t.c.state == OperationState.PENDING)
        return await self._database.scalar(select(func.min(t.c.seq)).where(pending))

    async def pending(self) -> tuple[OperationRecord, ...]:
        """Every pending operation: run by run in ``seq`` order, then those of no run by age."""
        query = (
            select(t)
            .where(t.c.state == OperationState.PENDING)
            .order_by(t.c.run_id.nulls_last(), t.c.seq.nulls_last(), t.c.created_at, t.c.ticket_id)
        )
        return await self._database.all(OperationRecord, query)

    async def unread(
        self, sampler: SamplerId, *, first_seq: int, end_seq: int
    ) -> tuple[OperationRecord, ...]:
        """What a sampler has drawn or failed to draw and no client was given, oldest first.

        Those without a ``seq`` are there where ``first_seq`` is 0; payloads and results are not.
        """
        place = and_(t.c.seq >= first_seq, t.c.seq < end_seq)
        if first_seq == 0:
            place = or_(place, t.c.seq.is_(None))
        unread = and_(t.c.state != OperationState.PENDING, t.c.delivered_at.is_(None))
        query = select(*_WITHOUT_BYTES).where(t.c.sampler_id == sampler, place, unread)
        return await self._database.all(
            OperationRecord, query.order_by(t.c.finished_at, t.c.ticket_id)
        )

    async def in_session(self, session: SessionId) -> tuple[OperationRecord, ...]:
        """What is kept of all runs and samplers of a session, oldest first, without bytes."""
        ours = or_(
            t.c.run_id.in_(select(runs.c.id).where(runs.c.session_id == session)),
            t.c.sampler_id.in_(select(samplers.c.id).where(samplers.c.session_id == session)),
        )
        query = select(*_WITHOUT_BYTES).where(ours)
        return await self._database.all(
            OperationRecord, query.order_by(t.c.created_at, t.c.ticket_id)
        )

    async def for_run(self, run: RunId, *, after_seq: int) -> tuple[OperationRecord, ...]:
        """What a replay goes through: the run's operations with a larger ``seq``, in order.

        Finished and failed ones are among them; those without a ``seq`` are not.
        """
        query = select(t).where(t.c.run_id == run, t.c.seq > after_seq).order_by(t.c.seq)
        return await self._database.all(OperationRecord, query)

    async def loads(self, kind: str) -> tuple[OperationRecord, ...]:
        """The finished loads that a replay would do again: those of live runs without a snapshot.

        Args:
            kind: The journal's word for a load.
        """
        after_snapshot = or_(runs.c.snapshot_path.is_(None), t.c.seq > runs.c.snapshot_seq)
        query = (
            select(t)
            .join(runs, runs.c.id == t.c.run_id)
            .where(runs.c.state.in_(LIVE), t.c.kind == kind, after_snapshot)
        )
        found = await self._database.all(OperationRecord, query)
        # Not in the query, or SQLite would go through all that is done.
        return tuple(one for one in found if one.state is OperationState.DONE)

    async def last_finished_seq(self, run: RunId) -> int:
        """The largest ``seq`` of the run that is done, failed or in its snapshot; -1 if none."""
        finished = and_(t.c.run_id == run, t.c.state != OperationState.PENDING)
        snapshot = and_(runs.c.id == run, runs.c.snapshot_path.is_not(None))
        seqs = union_all(
            select(t.c.seq).where(finished), select(runs.c.snapshot_seq).where(snapshot)
        ).subquery()
        return await self._database.scalar(select(func.coalesce(func.max(seqs.c.seq), -1)))

    async def prune(
        self, *, delivered_before: datetime, finished_before: datetime, limit: int = 1000
    ) -> tuple[OperationRecord, ...]:
        """Remove finished operations that are delivered, or old enough to give up on their client.

        Of what a live run's snapshot does not contain, two things stay: operations that change
        the run, since a replay needs them, and the last one, which tells where its order stands.

        Returns:
            What was removed, without bytes, so that payload and result blobs can go too. At most
            ``limit``, to keep the transaction short; fewer means that nothing is left to remove.
        """
        later = t.alias()
        follows = and_(later.c.run_id == t.c.run_id, later.c.seq > t.c.seq)
        is_last = ~exists().where(follows).correlate(t)
        after_snapshot = or_(runs.c.snapshot_path.is_(None), t.c.seq > runs.c.snapshot_seq)
        needed = exists().where(
            runs.c.id == t.c.run_id,
            runs.c.state.in_(LIVE),
            t.c.seq.is_not(None),
            after_snapshot,
            or_(t.c.changes_run, is_last),
        )
        done_with = and_(
            t.c.state != OperationState.PENDING,
            or_(t.c.delivered_at < delivered_before, t.c.finished_at < finished_before),
            ~needed,
        )
        # Found outside the writer: what is done with stays so, and others need not wait.
        query = select(*_WITHOUT_BYTES).where(done_with).limit(limit)
        found = await self._database.all(OperationRecord, query)
        if found:
            tickets = tuple(operation.ticket_id for operation in found)
            await self._database.change(delete(t).where(t.c.ticket_id.in_(tickets)))
        return found

    async def prune_replayed(self, run: RunId, *, up_to_seq: int | None = None) -> tuple[str, ...]:
        """Forget the payloads that the run's snapshot has made needless; without it, all of them.

        Those of pending operations stay.

        Returns:
            Their blob paths, to be removed.
        """
        needless = and_(
            t.c.run_id == run,
            true() if up_to_seq is None else t.c.seq <= up_to_seq,
            or_(t.c.payload.is_not(None), t.c.payload_path.is_not(None)),
            t.c.state != OperationState.PENDING,
        )

        def work(connection: Connection) -> tuple[str, ...]:
            paths = connection.scalars(select(t.c.payload_path).where(needless)).all()
            connection.execute(
                update(t).where(needless).values(payload=None, payload_path=None, payload_bytes=0)
            )
            return tuple(path for path in paths if path is not None)

        return await self._database.write(work)

    async def blob_paths(self) -> frozenset[str]:
        """Every payload and result that an operation names."""
        paths = (
            select(path).where(path.is_not(None)) for path in (t.c.payload_path, t.c.result_path)
        )
        return frozenset(await self._database.values(union_all(*paths)))

    async def _settle(self, ticket: TicketId, **outcome: object) -> bool:
        return await self._database.change(_SETTLE, {"ticket": ticket, **outcome}) == 1
