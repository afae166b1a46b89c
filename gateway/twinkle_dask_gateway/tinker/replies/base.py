"""What all answers have in common."""

from pydantic import BaseModel, ConfigDict

from twinkle_dask_gateway.openapi import Failure

__all__ = ["Cursor", "Empty", "Failure", "Reply", "Status"]


class Reply(BaseModel):
    """An answer; clients ignore fields they do not know."""

    model_config = ConfigDict(protected_namespaces=())


class Status(Reply):
    """``healthz``, ``telemetry``."""

    status: str


class Empty(Reply):
    """Nothing to say; a typed client still wants JSON."""


class Cursor(Reply):
    """Where a page lies in the whole list."""

    offset: int
    limit: int
    total_count: int
