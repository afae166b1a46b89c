"""All routes of the face, behind one door."""

from fastapi import APIRouter, Depends

from twinkle_dask_gateway.auth import authenticated
from twinkle_dask_gateway.tinker import (
    routes_futures,
    routes_records,
    routes_sampling,
    routes_service,
    routes_training,
    routes_weights,
    unsupported,
)


def router() -> APIRouter:
    """The face's routes, relative to ``/api/v1``.

    Whatever is included under ``closed`` asks for a key, whether its route thinks of it or not.
    """
    closed = APIRouter(dependencies=[Depends(authenticated)])
    # Matched in turn: the busiest first.
    closed.include_router(routes_futures.routes)
    closed.include_router(routes_training.routes)
    closed.include_router(routes_sampling.routes)
    closed.include_router(routes_service.routes)
    closed.include_router(routes_weights.routes)
    closed.include_router(routes_records.routes)
    closed.include_router(unsupported.routes)
    face = APIRouter()
    face.include_router(closed)
    face.include_router(routes_service.open_routes)
    return face
