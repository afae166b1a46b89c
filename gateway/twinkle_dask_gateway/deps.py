"""What routes are handed: the service, the settings, the polls in progress."""

from typing import Annotated, cast

from fastapi import Depends, Request

from twinkle_dask.operations.service import Service
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.polls import Polls

# `async def`, because FastAPI sends plain functions to a thread.


async def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


async def _config(request: Request) -> GatewayConfig:
    return cast(GatewayConfig, request.app.state.config)


async def _polls(request: Request) -> Polls:
    return cast(Polls, request.app.state.polls)


ServiceDep = Annotated[Service, Depends(_service)]
ConfigDep = Annotated[GatewayConfig, Depends(_config)]
PollsDep = Annotated[Polls, Depends(_polls)]
