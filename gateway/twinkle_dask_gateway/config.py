"""Settings of the HTTP side."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """How the gateway listens and what it takes.

    Attributes:
        host: Name or address to listen on.
        port: 0 takes a free one.
        backlog: Connections the kernel may hold for us; the Tinker SDK opens hundreds at once.
        url_prefix: Path before ``/api/v1``, for example ``/team-a``; empty for none.
        public_url: What comes before ``/api/v1`` in addresses that we hand out; None takes it from
            the request.
        max_body_bytes: Largest request body as sent.
        max_decoded_bytes: Largest request body after decompression, and, counted apart from it,
            the most that the sparse tensors of one request may grow to.
        max_data: Most data in one batch, counted before the batch is built.
        poll_s: How long a poll for a result is held. Clients read for 45 s and poll again at
            once, so seconds are safe and a fraction of one is a hot loop.
        metadata_above_bytes: A client that allows it is told the size of a larger result first, and
            fetches it when it has room.
        multiplex_polls: Have Tinker clients poll for all samples of a sampler in one request.
        thread_above_bytes: Bodies and results larger than this are (de)coded in a thread.
        compress_forward_backward: Ask Tinker clients for zstd; worth it on slow networks.
        custom_losses: Ask Tinker clients for the graphs of their custom losses.
        tokens: Give tokens for API keys, and tell Tinker clients to ask for them.
        token_lifetime_s: How long one is valid.
        info_message: Told to every new session, as are
        warning_message: and
        error_message: if there are any.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    backlog: int = 2048
    url_prefix: str = ""
    public_url: str | None = None
    max_body_bytes: int = 64 * 1024 * 1024
    max_decoded_bytes: int = 256 * 1024 * 1024
    max_data: int = 16384
    poll_s: float = 25.0
    metadata_above_bytes: int = 1024 * 1024
    multiplex_polls: bool = False
    thread_above_bytes: int = 256 * 1024
    compress_forward_backward: bool = False
    custom_losses: bool = True
    tokens: bool = True
    token_lifetime_s: float = 3600.0
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None

    def __post_init__(self) -> None:
        """Refuse a prefix that would make every route unreachable."""
        prefix = self.url_prefix
        if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
            raise ValueError(f"url_prefix must look like '/a/b', not {prefix!r}")
