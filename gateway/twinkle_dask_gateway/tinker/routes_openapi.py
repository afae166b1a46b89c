"""The OpenAPI document, for whoever has a key."""

import asyncio
from typing import cast

import orjson
from fastapi import APIRouter, FastAPI, Request, Response

from twinkle_dask_gateway.openapi import Answers, document
from twinkle_dask_gateway.tinker.errors import TinkerRoute

_OBJECT = {"application/json": {"schema": {"type": "object"}}}
_ANSWERS: Answers = {200: {"description": "OpenAPI 3.1.", "content": _OBJECT}}

routes = APIRouter(route_class=TinkerRoute)


@routes.get("/openapi.json", responses=_ANSWERS)
async def openapi(request: Request) -> Response:
    """This document."""
    state = request.app.state
    if not hasattr(state, "openapi"):
        # Made when it is first wanted, which takes a while; two who ask at once make it twice.
        state.openapi = await asyncio.to_thread(_written, cast(FastAPI, request.app))
    return Response(cast(bytes, state.openapi), media_type="application/json")


def _written(app: FastAPI) -> bytes:
    return orjson.dumps(document(app))
