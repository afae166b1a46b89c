"""Answers about the service and its sessions."""

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


class Sessions(Reply):
    """Ids of sessions."""

    sessions: list[str]


class Session(Reply):
    """``sessions/{id}``."""

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str]
    display_name: str | None
