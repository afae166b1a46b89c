"""All routes of the face, behind one door."""

from fastapi import Depends, FastAPI

from twinkle_dask_gateway.auth import authenticated
from twinkle_dask_gateway.openai import routes_chat


def add_routes(app: FastAPI, prefix: str) -> None:
    """Add the face to an app, under ``prefix`` and ``/api/v1``, and the same under ``/v1``."""
    for at, described in ((f"{prefix}/api/v1", True), (f"{prefix}/v1", False)):
        app.include_router(
            routes_chat.routes,
            prefix=at,
            dependencies=[Depends(authenticated)],
            responses=routes_chat.FAILURES,
            include_in_schema=described,
        )
