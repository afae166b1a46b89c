"""Answers about the service and sessions."""

from pydantic import Field

from twinkle_dask_gateway.twinkle.replies.base import Answer


class ModelHealth(Answer):
    """Whether some host serves a base model; ``status_code`` is what HTTP would say of it."""

    healthy: bool
    status_code: int


class DeepHealth(Answer):
    """The service with every base model."""

    healthy: bool
    models: dict[str, ModelHealth]


class OneModelHealth(Answer):
    """A base model's own health, in words."""

    healthy: bool
    detail: str


class Capacity(Answer):
    """How many adapters a tenant may have at the same time, has, and may add."""

    max_loras: int
    used_loras: int
    free_loras: int


class ServedName(Answer):
    """A base model that may be asked for."""

    model_name: str


class ServedNames(Answer):
    """The base models."""

    supported_models: list[ServedName]


class SessionOpened(Answer):
    """A new session."""

    session_id: str


class Beaten(Answer):
    """The session goes on."""


class ResourceCounts(Answer):
    """What the tenant has that is alive."""

    sessions: int
    models: int
    sampling_sessions: int
    futures: int


class CleanUp(Answer):
    """When sessions end by themselves: after so many seconds of silence."""

    running: bool = True
    expiration_timeout: float


class ServiceStatus(Answer):
    """Counts of what is alive, and how it ends."""

    resources: ResourceCounts
    cleanup: CleanUp = Field(description="When sessions end by themselves.")
