"""Answers about keys, events and usage."""

from datetime import datetime
from typing import Any, Literal

from twinkle_dask_gateway.tinker.replies.base import Reply


class Token(Reply):
    """``auth/token``."""

    jwt: str


class Organization(Reply):
    """Whose a key is."""

    name: str


class KeyHolder(Reply):
    """Who holds a key."""

    email: str


class KeyDetails(Reply):
    """Whose a key is and who holds it."""

    org_details: Organization
    user_details: KeyHolder


class OwnKey(Reply):
    """``auth/apikey/me``."""

    key_id: int
    name: str
    note: str
    details: KeyDetails


class AuditEntry(Reply):
    """One event; the last two for events of checkpoints only."""

    timestamp: datetime
    event: str
    event_details: dict[str, Any]
    model_id: str | None = None
    tinker_path: str | None = None


class AuditLog(Reply):
    """``audit``, newest first."""

    entries: list[AuditEntry]


class TrainingUsed(Reply):
    """Tokens of batches."""

    type: Literal["training"] = "training"
    token_count: int


class PrefillUsed(Reply):
    """Tokens of prompts."""

    type: Literal["sampling_prefill"] = "sampling_prefill"
    cached: bool = False
    token_count: int


class SampleUsed(Reply):
    """Tokens that were drawn."""

    type: Literal["sampling_sample"] = "sampling_sample"
    token_count: int


class CheckpointsSaved(Reply):
    """Checkpoints that were saved."""

    type: Literal["checkpoint"] = "checkpoint"
    count: int


class UsageEvent(Reply):
    """What one key used of one kind in one hour. This server knows no prices."""

    bucket_start: datetime
    bucket_end: datetime
    event_info: TrainingUsed | PrefillUsed | SampleUsed | CheckpointsSaved
    base_model: str | None
    user_id: str
    user_name: str | None
    session_id: str
    project_id: str | None
    estimated_cost_usd: None = None
    effective_rate_usd_per_million_tokens: None = None
    effective_rate_usd_per_gigabyte_month: None = None


class UsageSession(Reply):
    """What a client said about its session."""

    user_metadata: dict[str, str]


class UsageEvents(Reply):
    """``billing/usage/events``."""

    data: list[UsageEvent]
    sessions: dict[str, UsageSession]
    cost_data_through: None = None


class StoredCheckpoints(Reply):
    """What the checkpoints of one project take."""

    project_id: str | None
    org_user_urn: str
    user_email: str | None
    user_name: str
    checkpoint_count: int
    size_bytes: int
    size_gigabytes: float
    estimated_monthly_cost_usd: None = None


class CheckpointStorage(Reply):
    """``billing/usage/checkpoints/current``."""

    effective_rate_usd_per_gigabyte_month: None = None
    data: list[StoredCheckpoints]
