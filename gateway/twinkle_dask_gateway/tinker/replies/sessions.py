"""Answers about the service and its sessions."""

from datetime import datetime
from typing import Literal

from twinkle_dask_gateway.tinker.replies.base import Reply


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

    pjwt_auth_enabled: bool
    parallel_fwdbwd_chunks: bool = True
    proto_compress_fwdbwd: bool
    sample_use_retrieve_futures: bool
    custom_loss_server_side: bool = True
    sample_join_sampling_session: bool = True


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
    """``create_session``; clients log the messages at the level of their name."""

    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None


class HeartbeatTaken(Reply):
    """``session_heartbeat``, written as bytes."""

    type: Literal["session_heartbeat"]


class Sessions(Reply):
    """Ids of sessions."""

    sessions: list[str]


class Session(Reply):
    """``sessions/{id}``."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str]
    display_name: str | None


class SessionEnd(Reply):
    """How a client said that its work ended."""

    type: str


class SessionStatus(Reply):
    """How a session is: reason and detail only for one that its client finished."""

    type: Literal["active", "client_finished"]
    reason: SessionEnd | None = None
    detail: str | None = None


class SessionSummary(Reply):
    """A session as a search finds it; ``project_id`` is empty where it has none."""

    session_id: str
    created_at: datetime
    owner: str
    project_id: str
    status: SessionStatus | None
    checkpoints_count: int
    display_name: str | None
    user_metadata: dict[str, str]
    checkpoint_storage_bytes: int


class SessionCursor(Reply):
    """Where the next page of a search begins."""

    last_created_at: datetime
    last_session_id: str


class FoundSessions(Reply):
    """``sessions/search``."""

    sessions: list[SessionSummary]
    next_cursor: SessionCursor | None


class TraceExport(Reply):
    """``trace_export``."""

    status: Literal["ready"] = "ready"
    url: str
