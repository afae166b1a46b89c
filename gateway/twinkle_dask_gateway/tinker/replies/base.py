"""What all answers have in common."""

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """An answer; clients ignore fields they do not know."""

    model_config = ConfigDict(protected_namespaces=())


class Failure(Reply):
    """Every answer with status 4xx or 5xx."""

    detail: str


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
