"""The tables. A change here needs a revision in ``migrations/versions``; a test compares them."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeDecorator

from twinkle_dask.store.records import (
    CheckpointKind,
    KeyOrigin,
    OperationState,
    RunPhase,
    SessionState,
    UploadState,
    UsageKind,
)

E = TypeVar("E", bound=StrEnum)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes on every database; SQLite itself keeps no zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Insist on a zone, store UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without a zone cannot be stored")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give UTC back."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Named(TypeDecorator[E]):
    """A ``StrEnum`` stored as its value, so that a new member needs no migration."""

    impl = String
    cache_ok = True

    def __init__(self, enum: type[E]) -> None:
        super().__init__()
        self.enum = enum

    def process_bind_param(self, value: E | None, dialect: Dialect) -> str | None:
        """Store the plain string."""
        return None if value is None else value.value

    def process_result_value(self, value: str | None, dialect: Dialect) -> E | None:
        """Give the member back."""
        return None if value is None else self.enum(value)


class Strings(TypeDecorator[tuple[str, ...]]):
    """A tuple of strings as a JSON list."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: tuple[str, ...] | None, dialect: Dialect) -> list[str]:
        """Store a list."""
        return list(value or ())

    def process_result_value(self, value: list[str] | None, dialect: Dialect) -> tuple[str, ...]:
        """Give a tuple back."""
        return tuple(value or ())


class OptionalStrings(TypeDecorator[tuple[str, ...]]):
    """A tuple of strings as a JSON list, or NULL for None."""

    impl = JSON(none_as_null=True)
    cache_ok = True

    def process_bind_param(
        self, value: tuple[str, ...] | None, dialect: Dialect
    ) -> list[str] | None:
        """Store a list."""
        return None if value is None else list(value)

    def process_result_value(
        self, value: list[str] | None, dialect: Dialect
    ) -> tuple[str, ...] | None:
        """Give a tuple back."""
        return None if value is None else tuple(value)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _text(name: str, *more: Any) -> Column[str]:
    return Column(name, String, *more, nullable=False)


def _lora_columns() -> tuple[Column[Any], ...]:
    """The fields of ``LoraSpec``, under their own names."""
    return (
        Column("rank", Integer, nullable=False),
        Column("seed", BigInteger, nullable=False),
        Column("alpha", Float, nullable=False),
        Column("train_attn", Boolean, nullable=False),
        Column("train_mlp", Boolean, nullable=False),
        Column("train_unembed", Boolean, nullable=False),
        Column("targets", OptionalStrings),
        # NULL in rows of before there was such a choice.
        Column("dropout", Float),
        Column("rslora", Boolean),
    )


tenant_keys = Table(
    "tenant_keys",
    metadata,
    Column("key_hash", String, primary_key=True),
    _text("tenant_id"),
    _text("name"),
    _text("hint"),
    Column("created_at", UtcDateTime, nullable=False),
    Column("origin", Named(KeyOrigin)),
    Column("note", Text),
    Column("email", Text),
    Column("revoked_at", UtcDateTime),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", String, primary_key=True),
    _text("tenant_id"),
    Column("state", Named(SessionState), nullable=False, index=True),
    Column("tags", Strings, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("display_name", Text),
    Column("project_id", String),
    Column("sdk_version", String),
    Column("idempotency_key", String),
    Column("created_at", UtcDateTime, nullable=False),
    Column("last_seen_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime),
    Column("end_reason", String),
    Column("end_detail", Text),
    UniqueConstraint("tenant_id", "idempotency_key"),
    Index(None, "tenant_id", "created_at"),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String, primary_key=True),
    _text("session_id", ForeignKey("sessions.id")),
    _text("tenant_id"),
    Column("run_seq", Integer, nullable=False),
    _text("base_model"),
    *_lora_columns(),
    Column("user_metadata", JSON, nullable=False),
    Column("state", Named(RunPhase), nullable=False, index=True),
    Column("created_at", UtcDateTime, nullable=False),
    Column("last_request_at", UtcDateTime, nullable=False),
    Column("snapshot_path", String),
    Column("snapshot_seq", BigInteger, nullable=False),
    UniqueConstraint("session_id", "run_seq"),
    Index(None, "tenant_id", "created_at"),
)

samplers = Table(
    "samplers",
    metadata,
    Column("id", String, primary_key=True),
    _text("session_id", ForeignKey("sessions.id")),
    _text("tenant_id"),
    Column("sampler_seq", Integer, nullable=False),
    _text("base_model"),
    Column("checkpoint_id", String),  # no foreign key: see SamplerRecord
    Column("follows_run_id", String),
    Column("num_joined", Integer, nullable=False, server_default="0"),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("session_id", "sampler_seq"),
)

inflight_weights = Table(
    "inflight_weights",
    metadata,
    Column("checkpoint_id", String, primary_key=True),
    _text("run_id", ForeignKey("runs.id")),
    Column("seq", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "run_id", "seq"),
)

recorded_samples = Table(
    "recorded_samples",
    metadata,
    Column("ticket_id", String, primary_key=True),
    _text("tenant_id"),
    _text("session_id", ForeignKey("sessions.id")),
    Column("created_at", UtcDateTime, nullable=False),
    Column("content_path", String),
    Column("content", LargeBinary),
    Index(None, "session_id"),
)

operations = Table(
    "operations",
    metadata,
    Column("ticket_id", String, primary_key=True),
    _text("tenant_id"),
    _text("kind"),
    Column("run_id", String, ForeignKey("runs.id")),
    Column("sampler_id", String, ForeignKey("samplers.id")),
    Column("seq", BigInteger),
    Column("changes_run", Boolean, nullable=False),
    Column("payload_path", String),
    Column("payload_bytes", BigInteger, nullable=False),
    Column("state", Named(OperationState), nullable=False, index=True),
    Column("sequence_ids", Strings, nullable=False),
    Column("result_path", String),
    Column("result_bytes", BigInteger, nullable=False),
    Column("error_kind", String),
    Column("error_message", Text),
    Column("created_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime, index=True),
    Column("delivered_at", UtcDateTime, index=True),
    Column("key_id", BigInteger),
    Column("input_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    # Last, so that SQLite finds the others without reading through them.
    Column("payload", LargeBinary),
    Column("result", LargeBinary),
    UniqueConstraint("run_id", "seq"),
    UniqueConstraint("sampler_id", "seq"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("id", String, primary_key=True),
    _text("tenant_id"),
    _text("run_id", ForeignKey("runs.id")),
    Column("kind", Named(CheckpointKind), nullable=False),
    Column("name", String),
    Column("path", String, nullable=False, index=True),
    _text("base_model"),
    *_lora_columns(),
    Column("has_optimizer", Boolean, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("public", Boolean, nullable=False),
    Column("user_metadata", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, index=True),
    Column("last_used_at", UtcDateTime),
    UniqueConstraint("run_id", "kind", "name"),
    Index(None, "tenant_id", "created_at"),
)

custom_losses = Table(
    "custom_losses",
    metadata,
    Column("id", String, primary_key=True),
    _text("tenant_id"),
    _text("session_id", ForeignKey("sessions.id")),
    Column("loss_seq", BigInteger, nullable=False),
    _text("name"),
    Column("ranks", JSON, nullable=False),
    Column("graph", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("session_id", "loss_seq"),
)

processors = Table(
    "processors",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", String, nullable=False, index=True),
    _text("session_id", ForeignKey("sessions.id")),
    _text("processor_type"),
    _text("class_type"),
    Column("state", Text, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

saved_data = Table(
    "saved_data",
    metadata,
    Column("tenant_id", String, primary_key=True),
    Column("name", String, primary_key=True),
    _text("path"),
    Column("num_bytes", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("used_at", UtcDateTime, nullable=False),
)

run_settings = Table(
    "run_settings",
    metadata,
    Column("run_id", String, ForeignKey("runs.id"), primary_key=True),
    _text("tenant_id"),
    Column("settings", JSON, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("pending_path", String),
    Column("created_at", UtcDateTime, nullable=False),
)

sampler_settings = Table(
    "sampler_settings",
    metadata,
    Column("session_id", String, ForeignKey("sessions.id"), primary_key=True),
    Column("base_model", String, primary_key=True),
    Column("adapter", String, primary_key=True),
    Column("template", JSON(none_as_null=True)),
    Column("weights", String),
    Column("created_at", UtcDateTime, nullable=False),
)

secrets = Table(
    "secrets",
    metadata,
    Column("name", String, primary_key=True),
    Column("value", LargeBinary, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

audit_events = Table(
    "audit_events",
    metadata,
    Column("id", String, primary_key=True),
    _text("tenant_id"),
    _text("event"),
    Column("details", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index(None, "tenant_id", "created_at"),
)

usage = Table(
    "usage",
    metadata,
    Column("tenant_id", String, primary_key=True),
    Column("hour", UtcDateTime, primary_key=True),
    Column("key_id", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", Named(UsageKind), primary_key=True),
    Column("base_model", String, primary_key=True),
    Column("session_id", String, primary_key=True),
    Column("amount", BigInteger, nullable=False),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", String, nullable=False, index=True),
    _text("run_id"),
    Column("kind", Named(CheckpointKind), nullable=False),
    _text("name"),
    _text("target"),
    Column("state", Named(UploadState), nullable=False),
    Column("error", Text),
    Column("created_at", UtcDateTime, nullable=False),
)
