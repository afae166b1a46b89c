"""What routes are handed: the service, the settings, the polls in progress, signatures."""

from typing import Annotated, cast

from fastapi import Depends, Request

from twinkle_dask.operations.service import Service
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.polls import Polls
from twinkle_dask_gateway.signing import Signer

# `async def`, because FastAPI sends plain functions to a thread.


async def _service(request: Request) -> Service:
    return cast(Service, request.app.state.service)


async def _config(request: Request) -> GatewayConfig:
    return cast(GatewayConfig, request.app.state.config)


async def _polls(request: Request) -> Polls:
    return cast(Polls, request.app.state.polls)


async def _signer(request: Request) -> Signer:
    return cast(Signer, request.app.state.signer)


ServiceDep = Annotated[Service, Depends(_service)]
ConfigDep = Annotated[GatewayConfig, Depends(_config)]
PollsDep = Annotated[Polls, Depends(_polls)]
SignerDep = Annotated[Signer, Depends(_signer)]
