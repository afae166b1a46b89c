"""Every question the client can ask, as a value: no I/O here, so both services share all of it.

To add a call: a function here, a model in ``models.py``, a method on each service.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import httpx
from pydantic import ValidationError

from twinkle_dask_client.errors import BadReply
from twinkle_dask_client.models import Capabilities, Health, Reply, RunPage

R = TypeVar("R", bound=Reply)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[R]):
    """One request and how to read its reply.

    Attributes:
        path: Under ``/api/v1/``, without a leading slash.
        reply: What a 2xx body must be.
    """

    method: Literal["GET", "POST"]
    path: str
    reply: type[R]
    params: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def repeatable(self) -> bool:
        """Whether doing it twice is the same as doing it once."""
        return self.method == "GET"

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


def health() -> Call[Health]:
    """Is the service up? Needs no key."""
    return Call(method="GET", path="healthz", reply=Health)


def capabilities() -> Call[Capabilities]:
    """What does it serve?"""
    return Call(method="GET", path="get_server_capabilities", reply=Capabilities)


def runs(*, limit: int, offset: int) -> Call[RunPage]:
    """Which runs does this key own?"""
    if limit < 1 or offset < 0:
        raise ValueError(f"limit must be at least 1 and offset at least 0: {limit=}, {offset=}")
    params = {"limit": limit, "offset": offset}
    return Call(method="GET", path="training_runs", reply=RunPage, params=params)
