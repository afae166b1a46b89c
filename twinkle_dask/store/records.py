"""The durable records, as immutable values. Every datetime is aware and in UTC."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from twinkle_dask.lifecycle import SessionState
from twinkle_dask.types import Json, LoraSpec, RunId, SamplerId, SessionId, TenantId, TicketId


class RunPhase(StrEnum):
    """A run is usable while ready; failed means it could not be created.

    Closed is the end of all: its session is over, and only results and checkpoints are left.
    """

    CREATING = "creating"
    READY = "ready"
    FAILED = "failed"
    CLOSED = "closed"


class OperationState(StrEnum):
    """An operation is acknowledged (pending) until its result or its failure is stored."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class CheckpointKind(StrEnum):
    """Training state (weights and optimizer), or weights for samplers only."""

    TRAINING = "weights"
    SAMPLER = "sampler_weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantKey:
    """An API key, known only by its hash.

    Attributes:
        key_hash: SHA-256 of the key, in hex.
        hint: Its last four characters, to tell keys apart in lists.
    """

    key_hash: str
    tenant_id: TenantId
    name: str
    hint: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """One client's connection.

    Attributes:
        idempotency_key: Unique per tenant; a repeated create finds the session it made.
    """

    id: SessionId
    tenant_id: TenantId
    state: SessionState = SessionState.ACTIVE
    tags: tuple[str, ...] = ()
    user_metadata: Json = field(default_factory=Json)
    display_name: str | None = None
    project_id: str | None = None
    sdk_version: str | None = None
    idempotency_key: str | None = None
    created_at: datetime
    last_seen_at: datetime
    ended_at: datetime | None = None
    end_reason: str | None = None
    end_detail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One tenant's adapter, optimizer and history.

    Attributes:
        run_seq: Place among the session's runs, unique there.
        base_model: The served name.
        snapshot_path: Folder of the newest snapshot that a host wrote, if any.
        snapshot_seq: Last operation the snapshot contains; means nothing without a snapshot.
    """

    id: RunId
    session_id: SessionId
    tenant_id: TenantId
    run_seq: int
    base_model: str
    spec: LoraSpec
    user_metadata: Json = field(default_factory=Json)
    state: RunPhase = RunPhase.CREATING
    created_at: datetime
    last_request_at: datetime
    snapshot_path: str | None = None
    snapshot_seq: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationRecord:
    """One acknowledged operation: a row of the journal.

    Attributes:
        kind: What it does, in the words of the operations layer.
        run_id: The run in whose order it stands, if any.
        sampler_id: The sampler that it asks, if any; an operation has a run or a sampler, not both.
        seq: Unique within the run, or within the sampler; None if it was given none.
        changes_run: Whether the run differs afterwards, so that a replay needs it.
        payload: What to replay it from, or
        payload_path: the blob with it; both None once no replay can need it.
        sequence_ids: For samples, the names of the sequences.
        result: What was answered, or
        result_path: the blob with it.
        error_kind: For a failure, the class of the error.
        delivered_at: When the client was last given the outcome.
    """

    ticket_id: TicketId
    tenant_id: TenantId
    kind: str
    run_id: RunId | None = None
    sampler_id: SamplerId | None = None
    seq: int | None = None
    changes_run: bool = False
    payload_path: str | None = None
    payload_bytes: int = 0
    state: OperationState = OperationState.PENDING
    sequence_ids: tuple[str, ...] = ()
    result_path: str | None = None
    result_bytes: int = 0
    error_kind: str | None = None
    error_message: str | None = None
    created_at: datetime
    finished_at: datetime | None = None
    delivered_at: datetime | None = None
    payload: bytes | None = field(default=None, repr=False)
    result: bytes | None = field(default=None, repr=False)

    @property
    def has_payload(self) -> bool:
        """Whether it can be replayed."""
        return self.payload is not None or self.payload_path is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerRecord:
    """One sampling session.

    Attributes:
        sampler_seq: Place among the session's samplers, unique there.
        checkpoint_id: The weights it samples with; None is the base model. It stays after the
            checkpoint is deleted, so that the sampler never turns into the base model.
    """

    id: SamplerId
    session_id: SessionId
    tenant_id: TenantId
    sampler_seq: int
    base_model: str
    checkpoint_id: str | None = None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """Saved state; its files lie in the blob folder ``path``.

    Attributes:
        id: A uuid in hex.
        name: Unique with run and kind; None for weights saved for one sampler only.
    """

    id: str
    tenant_id: TenantId
    run_id: RunId
    kind: CheckpointKind
    name: str | None
    path: str
    base_model: str
    spec: LoraSpec
    has_optimizer: bool
    size_bytes: int
    public: bool = False
    user_metadata: Json = field(default_factory=Json)
    created_at: datetime
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """Random bytes that this service made for itself, for example to sign with."""

    name: str
    value: bytes = field(repr=False)
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """Something that somebody did and that is worth knowing later.

    Attributes:
        id: A uuid in hex.
        event: ``<family>.<what>``, for example ``checkpoints.published``.
        details: Strings by name: the object's address, the key that was used.
    """

    id: str
    tenant_id: TenantId
    event: str
    details: Json
    created_at: datetime
