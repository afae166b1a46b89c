"""What every question of the client is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from twinkle_dask_client.errors import BadReply

R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[R]):
    """One request and how to read its reply.

    Attributes:
        path: Under ``/api/v1/``, without a leading slash.
        reply: What a 2xx body must be.
        body: Sent as JSON.
        repeatable: Whether doing it twice is the same as doing it once; a GET always is.
        timeout_s: Longest silence; None takes the service's.
        doing: What a progress display says while it goes on; empty for what is never long.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    reply: type[R]
    params: Mapping[str, int] = field(default_factory=dict[str, int])
    body: Mapping[str, Any] | None = None
    repeatable: bool = False
    timeout_s: float | None = None
    doing: str = ""

    def __post_init__(self) -> None:
        if self.method == "GET":
            object.__setattr__(self, "repeatable", True)

    def read(self, response: httpx.Response) -> R:
        """The reply's value.

        Raises:
            BadReply: The body is not what this call's replies look like.
        """
        try:
            return self.reply.model_validate_json(response.content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(step) for step in first["loc"]) or "body"
            problem = f"{self.path} gave a reply that is no {self.reply.__name__}"
            raise BadReply(f"{problem} ({where}: {first['msg']})", response.status_code) from None
