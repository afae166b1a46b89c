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
        max_body_bytes: Largest request body as sent.
        max_decoded_bytes: Largest request body after decompression, and, counted apart from it,
            the most that the sparse tensors of one request may grow to.
        max_data: Most data in one batch, counted before the batch is built.
        poll_s: How long a poll for a result is held. Clients read for 45 s and poll again at
            once, so seconds are safe and a fraction of one is a hot loop.
        thread_above_bytes: Bodies and results larger than this are (de)coded in a thread.
        compress_forward_backward: Ask Tinker clients for zstd; worth it on slow networks.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    backlog: int = 2048
    url_prefix: str = ""
    max_body_bytes: int = 64 * 1024 * 1024
    max_decoded_bytes: int = 256 * 1024 * 1024
    max_data: int = 16384
    poll_s: float = 25.0
    thread_above_bytes: int = 256 * 1024
    compress_forward_backward: bool = False

    def __post_init__(self) -> None:
        """Refuse a prefix that would make every route unreachable."""
        prefix = self.url_prefix
        if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
            raise ValueError(f"url_prefix must look like '/a/b', not {prefix!r}")
