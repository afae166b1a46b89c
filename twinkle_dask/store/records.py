"""The durable records, as immutable values. Every datetime is aware and in UTC."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from twinkle_dask.lifecycle import SessionState
from twinkle_dask.types import Json, LoraSpec, RunId, SamplerId, SessionId, TenantId, TicketId


class RunPhase(StrEnum):
    """A run is usable while ready; failed means it could not be created.

    Unloaded is what its client asked for; it is closed as soon as its work is done. Closed is the
    end of all: only results and checkpoints are left. Copied was never anything else: such a run
    holds a copied checkpoint and cannot be trained.
    """

    CREATING = "creating"
    READY = "ready"
    FAILED = "failed"
    UNLOADED = "unloaded"
    CLOSED = "closed"
    COPIED = "copied"


class OperationState(StrEnum):
    """An operation is acknowledged (pending) until its result or its failure is stored."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class UploadState(StrEnum):
    """How an upload stands."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


class CheckpointKind(StrEnum):
    """Training state (weights and optimizer), weights for samplers only, or an exported adapter."""

    TRAINING = "weights"
    SAMPLER = "sampler_weights"
    EXTERNAL = "external_weights"


class KeyOrigin(StrEnum):
    """Where a key comes from: the configuration, a start without one, ``twinkle-dask keys``."""

    CONFIGURED = "configured"
    START = "start"
    COMMAND = "command"


class UsageKind(StrEnum):
    """What is counted: tokens, and for checkpoints their number."""

    TRAINING = "training"
    PREFILL = "sampling_prefill"
    SAMPLE = "sampling_sample"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantKey:
    """An API key, known only by its hash.

    Attributes:
        key_hash: SHA-256 of the key, in hex.
        hint: Its last four characters, to tell keys apart in lists.
        origin: None in databases of old, for a configured one.
        email: Of whoever holds it, if the operator told.
        revoked_at: From then on it is nobody's.
    """

    key_hash: str
    tenant_id: TenantId
    name: str
    hint: str
    created_at: datetime
    origin: KeyOrigin | None = None
    note: str | None = None
    email: str | None = None
    revoked_at: datetime | None = None

    @property
    def key_id(self) -> int:
        """Names the key without telling it: 48 bits of its hash, so that JSON can hold them."""
        return int(self.key_hash[:12], 16)


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
class RunSettingsRecord:
    """What a run is set to between calls; ``operations.adapter_settings`` reads both documents.

    Attributes:
        settings: What its client has set.
        progress: Counters, and what its metrics have gathered.
        pending_path: The blob of a batch that waits for its backward pass, if there is one.
    """

    run_id: RunId
    tenant_id: TenantId
    settings: Json
    progress: Json
    pending_path: str | None = None
    created_at: datetime


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
        key_id: Of the key that the client sent it with; see ``TenantKey.key_id``.
        input_tokens: Of the batch, or of the prompt.
        output_tokens: That were drawn, once it is done.
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
    key_id: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    payload: bytes | None = field(default=None, repr=False)
    result: bytes | None = field(default=None, repr=False)

    @property
    def has_payload(self) -> bool:
        """Whether it can be replayed."""
        return self.payload is not None or self.payload_path is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettingsRecord:
    """What the samplers of a session are set to under an adapter's name.

    Attributes:
        adapter: The client's name; empty where it named none.
        template: How trajectories are encoded, as it was sent; None if nothing was.
        weights: The id of the checkpoint that the name stands for; None for the adapter of the
            session that has the name.
    """

    session_id: SessionId
    base_model: str
    adapter: str
    template: Json | None = None
    weights: str | None = None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerRecord:
    """One sampling session.

    Attributes:
        sampler_seq: Place among the session's samplers, unique there.
        checkpoint_id: The weights it samples with; None is the base model. It stays after the
            checkpoint is deleted, so that the sampler never turns into the base model.
        follows_run_id: Instead, the run whose newest inflight weights it samples with.
        num_joined: Copies of its client that asked for a number so far.
    """

    id: SamplerId
    session_id: SessionId
    tenant_id: TenantId
    sampler_seq: int
    base_model: str
    checkpoint_id: str | None = None
    follows_run_id: RunId | None = None
    num_joined: int = 0
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class InflightRecord:
    """Weights that a run saved for all samplers that follow it, at a place in its order."""

    checkpoint_id: str
    run_id: RunId
    seq: int
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRecord:
    """Prompt and tokens of one sample, kept while its session lives.

    Attributes:
        ticket_id: Of the sample, from which its sequences have their names.
        content: Packed by the operations layer, or
        content_path: the blob with it.
    """

    ticket_id: TicketId
    tenant_id: TenantId
    session_id: SessionId
    created_at: datetime
    content_path: str | None = None
    content: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """Saved state; its files lie in the blob folder ``path``, which copies share.

    Attributes:
        id: A uuid in hex.
        name: Unique with run and kind; None for weights saved for one sampler only, and for one
            that was deleted or replaced and whose files are about to go.
        expires_at: From then on it is in no list and found by no address, whether it is still
            there or not.
        last_used_at: When an unnamed one was last sampled, as far as it was written down.
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
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomLossRecord:
    """A loss that a tenant has defined in a session.

    Attributes:
        ranks: ``[name, rank]`` of each input, ``logprobs`` first.
        graph: See ``twinkle_dask.custom_losses``.
    """

    id: str
    tenant_id: TenantId
    session_id: SessionId
    loss_seq: int
    name: str
    ranks: list[list[Any]]
    graph: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorRecord:
    """A data set, loader or other object of the processor service, for the time of its session.

    Attributes:
        state: Its JSON; see ``twinkle_dask.processor.states``.
        num_bytes: Of its files, which lie in ``folder`` among the blobs.
    """

    id: str
    tenant_id: TenantId
    session_id: SessionId
    processor_type: str
    class_type: str
    state: str
    num_bytes: int
    created_at: datetime

    @property
    def folder(self) -> str:
        """Where its files lie."""
        return f"processors/{self.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedDataRecord:
    """A file of rows that a tenant has saved under a name of its own.

    Attributes:
        path: Of its blob.
        used_at: When it was saved or last read.
    """

    tenant_id: TenantId
    name: str
    path: str
    num_bytes: int
    created_at: datetime
    used_at: datetime


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


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRecord:
    """How much of one kind one key used in one hour, of one base model and in one session.

    Attributes:
        hour: Its start.
        amount: Tokens, or checkpoints.
    """

    tenant_id: TenantId
    hour: datetime
    key_id: int
    kind: UsageKind
    base_model: str
    session_id: SessionId
    amount: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRecord:
    """Sending a checkpoint's adapter files elsewhere.

    Attributes:
        run_id: Whose checkpoint, which is of ``kind`` and called ``name``.
        target: ``hub:owner/name``, or a folder or URL of the operator's.
        error: Why it failed, in words for the tenant.
    """

    id: str
    tenant_id: TenantId
    run_id: RunId
    kind: CheckpointKind
    name: str
    target: str
    state: UploadState
    error: str | None
    created_at: datetime
