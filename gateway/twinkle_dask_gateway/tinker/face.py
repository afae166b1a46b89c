"""All routes of the face, behind one door."""

from fastapi import Depends, FastAPI

from twinkle_dask_gateway.auth import authenticated
from twinkle_dask_gateway.openapi import ANY, CLOSED
from twinkle_dask_gateway.tinker import (
    routes_accounts,
    routes_checkpoints,
    routes_custom_losses,
    routes_downloads,
    routes_futures,
    routes_openapi,
    routes_records,
    routes_sampling,
    routes_service,
    routes_sessions,
    routes_training,
    routes_weights,
)

# Matched in turn: the busiest first.
_CLOSED = (
    routes_futures.routes,
    routes_training.routes,
    routes_custom_losses.routes,
    routes_sampling.routes,
    routes_service.routes,
    routes_weights.routes,
    routes_checkpoints.routes,
    routes_records.routes,
    routes_sessions.routes,
    routes_accounts.routes,
    routes_openapi.routes,
)
_OPEN = (routes_service.open_routes, routes_downloads.open_routes, routes_sessions.open_routes)


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
