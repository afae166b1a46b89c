"""Records with plain values, so that a test names only what it is about."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

from twinkle_dask.store.records import (
    CheckpointKind,
    CheckpointRecord,
    OperationRecord,
    RunPhase,
    RunRecord,
    SamplerRecord,
    SessionRecord,
)
from twinkle_dask.store.store import Store
from twinkle_dask.types import LoraSpec, RunId, SamplerId, SessionId, TenantId, TicketId

NOW = datetime(2026, 11, 23, 12, 0, 0, 123456, tzinfo=UTC)
ANN = TenantId("ann")
BOB = TenantId("bob")
SPEC = LoraSpec(rank=8, seed=2**62, alpha=32.0, train_unembed=False)


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def session(
    name: str = "s1",
    *,
    tenant: TenantId = ANN,
    key: str | None = None,
    created_at: datetime = NOW,
) -> SessionRecord:
    return SessionRecord(
        id=SessionId(name),
        tenant_id=tenant,
        tags=("a", "ü"),
        user_metadata={"n": [1, None, "x"]},
        idempotency_key=key,
        created_at=created_at,
        last_seen_at=created_at,
    )


def run(seq: int = 0, *, session: str = "s1", state: RunPhase = RunPhase.READY) -> RunRecord:
    return RunRecord(
        id=RunId(f"{session}:train:{seq}"),
        session_id=SessionId(session),
        tenant_id=ANN,
        run_seq=seq,
        base_model="tiny",
        spec=SPEC,
        state=state,
        created_at=at(seq),
        last_request_at=at(seq),
    )


def sampler(seq: int = 0, *, checkpoint: str | None = None) -> SamplerRecord:
    return SamplerRecord(
        id=SamplerId(f"s1:sample:{seq}"),
        session_id=SessionId("s1"),
        tenant_id=ANN,
        sampler_seq=seq,
        base_model="tiny",
        checkpoint_id=checkpoint,
        created_at=at(seq),
    )


def operation(
    seq: int | None = 1, *, run: str | None = "s1:train:0", sampler: str | None = None
) -> OperationRecord:
    ticket = uuid4().hex
    return OperationRecord(
        ticket_id=TicketId(ticket),
        tenant_id=ANN,
        kind="optim_step",
        run_id=None if run is None else RunId(run),
        sampler_id=None if sampler is None else SamplerId(sampler),
        seq=seq,
        changes_run=run is not None,
        payload_path=f"journal/{ticket}",
        payload_bytes=10,
        created_at=at(seq or 0),
    )


def checkpoint(
    name: str | None = "first",
    *,
    kind: CheckpointKind = CheckpointKind.TRAINING,
    run: str = "s1:train:0",
    created_at: datetime = NOW,
    expires_at: datetime | None = None,
) -> CheckpointRecord:
    identity = uuid4().hex
    return CheckpointRecord(
        id=identity,
        tenant_id=ANN,
        run_id=RunId(run),
        kind=kind,
        name=name,
        path=f"checkpoints/{identity}",
        base_model="tiny",
        spec=SPEC,
        has_optimizer=kind is CheckpointKind.TRAINING,
        size_bytes=2**40,
        created_at=created_at,
        expires_at=expires_at,
    )


async def fill(store: Store) -> None:
    """One session of Ann with one ready run and one sampler."""
    await store.sessions.add(session())
    await store.runs.add(run())
    await store.samplers.add(sampler())
