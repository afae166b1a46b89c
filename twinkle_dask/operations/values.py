"""What faces hand in and get back. Core ids and words only; each face has a codec."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Generic, TypeAlias, TypeVar

from twinkle_dask import packing
from twinkle_dask.errors import TwinkleDaskError
from twinkle_dask.store.records import CheckpointKind
from twinkle_dask.types import (
    EmbedResult,
    ForwardBackwardResult,
    GradientStepResult,
    Json,
    LoraSpec,
    ModelFacts,
    RunId,
    SampleResult,
    SamplerId,
    SessionId,
    StepResult,
    TenantId,
    TicketId,
)

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Who asks, and with which key.

    Attributes:
        key_hint: The end of the key, for lists and logs.
        key_id: Names the key; see ``TenantKey.key_id``. 0 if nobody asks with a key.
        key_name: What the key is called.
        email: Of whoever holds the key, if the operator told.
    """

    id: TenantId
    name: str
    key_hint: str
    key_id: int = 0
    key_name: str = ""
    email: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A name that tenants may ask for; ``tokenizer_id`` is what clients should load."""

    name: str
    source: str
    facts: ModelFacts
    tokenizer_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRequest:
    """What a tenant asks of an adapter; without a seed one is drawn.

    Attributes:
        targets: As in ``LoraSpec``; so ``alpha``, ``dropout`` and ``rslora``.
        target_pattern: In their place a pattern of whole paths, see ``lora_targets.matching``.
    """

    rank: int
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    alpha: float = 32.0
    targets: tuple[str, ...] | None = None
    target_pattern: str | None = None
    dropout: float = 0.0
    rslora: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointAddress:
    """A checkpoint by its run, kind and name; faces write it as a URI of their own."""

    run: RunId
    kind: CheckpointKind
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCreated:
    """A run is ready for work."""

    run: RunId


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A training checkpoint is durable."""

    address: CheckpointAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSaved:
    """Sampler weights are durable: under an address, or as a sampler of their own."""

    address: CheckpointAddress | None = None
    sampler: SamplerId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A run stands where a checkpoint stood."""

    run: RunId
    address: CheckpointAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """An adapter is durable as files for other programs."""

    address: CheckpointAddress
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloaded:
    """A run is freed and takes no more work."""

    run: RunId


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomLossCreated:
    """A loss may be named by the batches of its session."""

    loss: str


Result: TypeAlias = (
    RunCreated
    | CustomLossCreated
    | ForwardBackwardResult
    | EmbedResult
    | StepResult
    | GradientStepResult
    | Saved
    | SamplerSaved
    | Exported
    | Loaded
    | Unloaded
    | SampleResult
)


class TicketKind(StrEnum):
    """What a ticket's operation does; the journal's word for it."""

    CREATE_RUN = "create_run"
    FORWARD_BACKWARD = "forward_backward"
    EMBED = "embed"
    OPTIM_STEP = "optim_step"
    GRADIENT_STEP = "gradient_step"
    SAVE_STATE = "save_state"
    LOAD_STATE = "load_state"
    SAVE_FOR_SAMPLER = "save_for_sampler"
    SAVE_EXTERNAL = "save_external"
    UNLOAD_RUN = "unload_run"
    CREATE_CUSTOM_LOSS = "create_custom_loss"
    SAMPLE = "sample"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A result to come. ``sequence_ids`` names a sample's sequences, in result order."""

    id: TicketId
    kind: TicketKind
    run: RunId | None = None
    sequence_ids: tuple[str, ...] = ()


class QueueState(StrEnum):
    """Why a result is not there yet."""

    ACTIVE = "active"
    PAUSED_CAPACITY = "paused_capacity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The operation succeeded."""

    result: Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The operation failed and changed nothing."""

    error: TwinkleDaskError


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Not yet; ask again."""

    queue_state: QueueState = QueueState.ACTIVE
    reason: str | None = None


Outcome: TypeAlias = Done | Failed | Waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A saved checkpoint as its owner sees it. ``tenant`` is the owner, if that may be told."""

    address: CheckpointAddress
    base_model: str
    spec: LoraSpec
    created_at: datetime
    expires_at: datetime | None
    size_bytes: int
    public: bool
    user_metadata: Json
    tenant: TenantId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """A run as its owner sees it. ``owner`` names the tenant, never its key."""

    run: RunId
    session: SessionId
    base_model: str
    spec: LoraSpec
    tokenizer_id: str
    architecture: str
    user_metadata: Json
    created_at: datetime
    last_request_at: datetime
    owner: str
    last_checkpoint: CheckpointInfo | None = None
    last_sampler_checkpoint: CheckpointInfo | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerInfo:
    """A sampler: the base model, and the saved weights it samples with, if they have a name."""

    sampler: SamplerId
    base_model: str
    address: CheckpointAddress | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """A session with what was made in it."""

    session: SessionId
    runs: tuple[RunId, ...]
    samplers: tuple[SamplerId, ...]
    created_at: datetime
    user_metadata: Json = field(default_factory=Json)
    display_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[Item]):
    """Part of a list, and how long the list is."""

    items: tuple[Item, ...]
    total: int
    limit: int
    offset: int


packing.register(
    CheckpointAddress,
    CheckpointKind,
    CustomLossCreated,
    Exported,
    Loaded,
    RunCreated,
    Saved,
    SamplerSaved,
    Unloaded,
)
