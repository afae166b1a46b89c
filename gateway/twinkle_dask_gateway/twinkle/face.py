"""All routes of the face, behind one door."""

from fastapi import Depends, FastAPI

from twinkle_dask_gateway.auth import authenticated
from twinkle_dask_gateway.twinkle import (
    routes_gateway,
    routes_model,
    routes_processor,
    routes_runs,
    routes_sampler,
    routes_saving,
    routes_training,
)
from twinkle_dask_gateway.twinkle.openapi import ANY, CLOSED

# Matched in turn: the busiest first.
_CLOSED = (
    routes_training.routes,
    routes_sampler.routes,
    routes_processor.routes,
    routes_model.routes,
    routes_saving.routes,
    routes_gateway.routes,
    routes_runs.routes,
)
_OPEN = (routes_gateway.open_routes,)


def add_routes(app: FastAPI, prefix: str) -> None:
    """Add the face to an app, under ``prefix`` and ``/api/v1``.

    Whatever is closed asks for a key, whether its routes think of it or not.
    """
    for routes in _CLOSED:
        app.include_router(
            routes,
            prefix=f"{prefix}/api/v1",
            dependencies=[Depends(authenticated)],
            responses=CLOSED,
        )
    for routes in _OPEN:
        app.include_router(routes, prefix=f"{prefix}/api/v1", responses=ANY)
