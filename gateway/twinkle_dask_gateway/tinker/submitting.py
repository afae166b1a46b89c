"""What becomes of a run's order while a step is being read, and when it is refused."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from twinkle_dask.errors import RequestError
from twinkle_dask.operations.service import Service
from twinkle_dask.operations.values import Tenant
from twinkle_dask.types import RunId
from twinkle_dask_gateway.tinker.wire.base import MAX_RUN_SEQ


@dataclass(slots=True)
class Place:
    """Where in a run's order a submit stands, as soon as enough of it has been read."""

    run: RunId | None = None
    seq: int = 0

    def of(self, body: Mapping[str, Any]) -> None:
        """Take it from a JSON body, as far as it is there."""
        run, seq = body.get("model_id"), body.get("seq_id")
        if isinstance(run, str) and isinstance(seq, int) and seq <= MAX_RUN_SEQ:
            self.at(run, seq)

    def at(self, run: str, seq: int) -> None:
        """Set it."""
        self.run, self.seq = RunId(run), seq
        structlog.contextvars.bind_contextvars(run=run[:256])


@asynccontextmanager
async def submitting(service: Service, tenant: Tenant) -> AsyncGenerator[Place, None]:
    """Around the reading, decoding and handing over of one step of a run.

    While it is being read, the run waits for the place it may have. When it is refused for good,
    the run is told to pass over that place: the client counts on regardless. A failure after which
    the client sends the same number again (capacity, ours) is let be.
    """
    place = Place()
    with service.runs.sending(tenant):
        try:
            yield place
        except RequestError:
            if place.run and place.seq > 0:
                await service.runs.refuse(tenant, place.run, seq=place.seq)
            raise
