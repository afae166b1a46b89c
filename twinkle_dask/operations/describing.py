"""Runs as their owners see them."""

from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.checkpoints import describe
from twinkle_dask.operations.values import RunInfo, Tenant
from twinkle_dask.store.records import CheckpointKind, RunRecord
from twinkle_dask.store.store import Store


async def describe_runs(
    store: Store, catalogue: Catalogue, tenant: Tenant, records: tuple[RunRecord, ...]
) -> tuple[RunInfo, ...]:
    """Runs with their newest checkpoints, in the order given; one query for all of them."""
    latest = await store.checkpoints.latest(tenant.id, [run.id for run in records])
    infos: list[RunInfo] = []
    for record in records:
        model = catalogue.find(record.base_model)
        training = latest.get((record.id, CheckpointKind.TRAINING))
        sampler = latest.get((record.id, CheckpointKind.SAMPLER))
        infos.append(
            RunInfo(
                run=record.id,
                session=record.session_id,
                base_model=record.base_model,
                spec=record.spec,
                tokenizer_id=model.tokenizer_id if model else record.base_model,
                architecture=model.facts.architecture if model else "unknown",
                user_metadata=record.user_metadata,
                created_at=record.created_at,
                last_request_at=record.last_request_at,
                owner=tenant.name,
                last_checkpoint=describe(training) if training else None,
                last_sampler_checkpoint=describe(sampler) if sampler else None,
            )
        )
    return tuple(infos)
