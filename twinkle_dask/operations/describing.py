"""Runs as their owners see them, and as much as others may see."""

from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.checkpoints import describe
from twinkle_dask.operations.values import RunInfo, Tenant
from twinkle_dask.store.records import CheckpointKind, CheckpointRecord, RunRecord
from twinkle_dask.store.store import Store

_SOMEBODY = "another tenant"


async def describe_runs(
    store: Store, catalogue: Catalogue, tenant: Tenant, records: tuple[RunRecord, ...]
) -> tuple[RunInfo, ...]:
    """Runs with their newest checkpoints, in the order given; one query for all of them.

    Of another tenant's run only what was published is told: the base model, the adapter's shape
    and the published checkpoints.
    """
    own = [run.id for run in records if run.tenant_id == tenant.id]
    others = [run.id for run in records if run.tenant_id != tenant.id]
    latest: dict[tuple[str, CheckpointKind], CheckpointRecord] = {}
    if own:
        latest |= await store.checkpoints.latest(tenant.id, own)
    if others:
        latest |= await store.sharing.latest_published(others)
    infos: list[RunInfo] = []
    for record in records:
        model = catalogue.find(record.base_model)
        training = latest.get((record.id, CheckpointKind.TRAINING))
        sampler = latest.get((record.id, CheckpointKind.SAMPLER))
        ours = record.tenant_id == tenant.id
        published = [found.created_at for found in (training, sampler) if found is not None]
        last_request_at = record.last_request_at
        if not ours:
            last_request_at = max(published, default=record.created_at)
        infos.append(
            RunInfo(
                run=record.id,
                session=record.session_id,
                base_model=record.base_model,
                spec=record.spec,
                tokenizer_id=model.tokenizer_id if model else record.base_model,
                architecture=model.facts.architecture if model else "unknown",
                user_metadata=record.user_metadata if ours else {},
                created_at=record.created_at,
                last_request_at=last_request_at,
                owner=tenant.name if ours else _SOMEBODY,
                last_checkpoint=describe(training) if training else None,
                last_sampler_checkpoint=describe(sampler) if sampler else None,
            )
        )
    return tuple(infos)
