"""Bodies of sessions."""

from typing import Annotated, Any

from pydantic import Field

from twinkle_dask_gateway.twinkle.wire.base import Body


class OpenSession(Body):
    """Open a session; ``metadata`` is kept with it as it is."""

    metadata: dict[str, Any] | None = None


class Beat(Body):
    """A session's client is alive."""

    session_id: Annotated[str, Field(min_length=1, max_length=256)]
