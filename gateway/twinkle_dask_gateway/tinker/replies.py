"""The JSON bodies of answers that are not results of long operations."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """An answer; clients ignore fields they do not know."""

    model_config = ConfigDict(protected_namespaces=())


class Status(Reply):
    """``healthz``, ``telemetry``."""

    status: str


class Empty(Reply):
    """Nothing to say; a typed client still wants JSON."""


class ClientConfig(Reply):
    """Feature flags. Clients take their own default for a flag that is not here.

    Attributes:
        pjwt_auth_enabled: Exchange the API key for a JSON web token.
        parallel_fwdbwd_chunks: Send the chunks of one batch at the same time, the first one last.
        proto_compress_fwdbwd: Send ``forward_backward`` as zstd.
        sample_use_retrieve_futures: Poll for many results in one request.
        custom_loss_server_side: Send loss functions as graphs; when false the client evaluates
            them itself.
        sample_join_sampling_session: Copies of a sampling client ask for a number of their own;
            when false they draw one at random.
    """

    pjwt_auth_enabled: bool = False
    parallel_fwdbwd_chunks: bool = True
    proto_compress_fwdbwd: bool
    sample_use_retrieve_futures: bool = False
    custom_loss_server_side: bool = False
    sample_join_sampling_session: bool = False


class DynamicConfig(Reply):
    """Flags that a client asks for again while it runs."""

    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = True


class SupportedModel(Reply):
    """One base model."""

    model_name: str
    max_context_length: int
    trainable: bool = True
    sampleable: bool = True


class Capabilities(Reply):
    """``get_server_capabilities``."""

    supported_models: list[SupportedModel]


class SessionCreated(Reply):
    """``create_session``."""

    session_id: str


class ModelData(Reply):
    """What the client needs to find the tokenizer."""

    arch: str
    model_name: str
    tokenizer_id: str


class ModelInfo(Reply):
    """``get_info``."""

    type: Literal["get_info"] = "get_info"
    model_id: str
    model_name: str
    model_data: ModelData
    is_lora: bool = True
    lora_rank: int


class WeightsInfo(Reply):
    """``weights_info``."""

    base_model: str
    is_lora: bool = True
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool


class SamplingSessionCreated(Reply):
    """``create_sampling_session``."""

    sampling_session_id: str


class Sampler(Reply):
    """``samplers/{id}``."""

    sampler_id: str
    base_model: str
    model_path: str | None


class Checkpoint(Reply):
    """One checkpoint; its id is kind and name."""

    checkpoint_id: str
    checkpoint_type: Literal["training", "sampler"]
    time: datetime
    tinker_path: str
    size_bytes: int
    public: bool
    user_metadata: dict[str, str]
    expires_at: datetime | None


class TrainingRun(Reply):
    """One run."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool = True
    lora_rank: int
    last_request_time: datetime
    last_checkpoint: Checkpoint | None
    last_sampler_checkpoint: Checkpoint | None
    user_metadata: dict[str, str]


class Cursor(Reply):
    """Where a page lies in the whole list."""

    offset: int
    limit: int
    total_count: int


class TrainingRuns(Reply):
    """A page of runs, latest first."""

    training_runs: list[TrainingRun]
    cursor: Cursor


class Checkpoints(Reply):
    """Checkpoints, latest first."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class Sessions(Reply):
    """Ids of sessions."""

    sessions: list[str]


class Session(Reply):
    """``sessions/{id}``."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str]
    display_name: str | None
