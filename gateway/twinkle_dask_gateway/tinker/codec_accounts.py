"""Keys, events and usage in Tinker's words."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Final, assert_never

from twinkle_dask.operations.tenants import KeyInfo
from twinkle_dask.operations.usage import UsageReport
from twinkle_dask.operations.values import Tenant
from twinkle_dask.store.records import AuditRecord, UsageKind, UsageRecord
from twinkle_dask.store.searches import Stored
from twinkle_dask_gateway.tinker import codec, replies
from twinkle_dask_gateway.tokens import user_urn

#: Which of our events a client means. Sessions are among all events only.
FAMILIES: Final = {
    "all": None,
    "checkpoints": "checkpoints",
    "projects": "projects",
    "organizations": "keys",
}
_RESOURCES: Final = {
    "checkpoints": "checkpoint",
    "projects": "project",
    "keys": "api_key",
    "sessions": "session",
}
_HOUR: Final = timedelta(hours=1)
_GIGABYTE: Final = 10**9


def own_key(key: KeyInfo) -> replies.OwnKey:
    """A key as its holder sees it. Without an address, its tenant's name stands for the holder."""
    return replies.OwnKey(
        key_id=key.key_id,
        name=key.name,
        note=key.note,
        details=replies.KeyDetails(
            org_details=replies.Organization(name=key.tenant),
            user_details=replies.KeyHolder(email=key.email or key.tenant),
        ),
    )


def audit_entry(event: AuditRecord) -> replies.AuditEntry:
    """An event, named ``<resource>_<action>``."""
    family, _, action = event.event.partition(".")
    path = event.details.get("path") if family == "checkpoints" else None
    return replies.AuditEntry(
        timestamp=event.created_at,
        event=f"{_RESOURCES.get(family, family)}_{action}",
        event_details=event.details,
        model_id=None if path is None else str(path).partition("/")[0],
        tinker_path=None if path is None else f"tinker://{path}",
    )


def usage_events(tenant: Tenant, report: UsageReport) -> replies.UsageEvents:
    """Usage by the hour."""
    events: list[replies.UsageEvent] = []
    for row in report.rows:
        session = report.sessions.get(row.session_id)
        events.append(
            replies.UsageEvent(
                bucket_start=row.hour,
                bucket_end=row.hour + _HOUR,
                event_info=_amount(row),
                base_model=row.base_model,
                user_id=user_urn(tenant.id),
                user_name=report.key_names.get(row.key_id),
                session_id=row.session_id,
                project_id=None if session is None else session.project_id,
            )
        )
    sessions = {
        str(name): replies.UsageSession(user_metadata=codec.texts(session.user_metadata))
        for name, session in report.sessions.items()
    }
    return replies.UsageEvents(data=events, sessions=sessions)


def checkpoint_storage(
    tenant: Tenant, stored: Mapping[str | None, Stored]
) -> replies.CheckpointStorage:
    """What lies in storage, by project."""
    return replies.CheckpointStorage(
        data=[
            replies.StoredCheckpoints(
                project_id=project,
                org_user_urn=user_urn(tenant.id),
                user_email=tenant.email,
                user_name=tenant.name,
                checkpoint_count=sums.num_checkpoints,
                size_bytes=sums.num_bytes,
                size_gigabytes=sums.num_bytes / _GIGABYTE,
            )
            for project, sums in stored.items()
        ]
    )


def _amount(
    row: UsageRecord,
) -> replies.TrainingUsed | replies.PrefillUsed | replies.SampleUsed | replies.CheckpointsSaved:
    match row.kind:
        case UsageKind.TRAINING:
            return replies.TrainingUsed(token_count=row.amount)
        case UsageKind.PREFILL:
            return replies.PrefillUsed(token_count=row.amount)
        case UsageKind.SAMPLE:
            return replies.SampleUsed(token_count=row.amount)
        case UsageKind.CHECKPOINT:
            return replies.CheckpointsSaved(count=row.amount)
        case _:
            assert_never(row.kind)
