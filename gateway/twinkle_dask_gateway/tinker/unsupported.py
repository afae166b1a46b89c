"""What the protocol has and this server does not, yet: a clear 400 instead of a bare 404.

A row moves out of the table when its route is written.
"""

from collections.abc import Awaitable, Callable
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

from twinkle_dask.errors import NotSupported
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ServiceDep
from twinkle_dask_gateway.tinker.errors import TinkerRoute
from twinkle_dask_gateway.tinker.reading import read_object
from twinkle_dask_gateway.tinker.submitting import submitting

routes = APIRouter(route_class=TinkerRoute)

_CHECKPOINT = "/training_runs/{run}/checkpoints/{kind}/{name}"


class Absent(NamedTuple):
    """An operation of the protocol.

    Attributes:
        instead: What the client can do, as a sentence; may be empty.
        ordered: Its body may carry a place in a run's order, which must be passed over.
    """

    method: str
    path: str
    instead: str = ""
    ordered: bool = False


ABSENT = (
    Absent("POST", "/auth/token", "Send the API key itself."),
    Absent("GET", "/auth/apikey/me"),
    Absent("DELETE", "/auth/apikey/me", "Keys are made and removed by the operator."),
    Absent("POST", "/save_weights_external", "Save with save_weights.", ordered=True),
    Absent("POST", "/unload_model", "Finish the session instead.", ordered=True),
    Absent("POST", "/create_custom_loss", "forward_backward_custom evaluates it on your side."),
    Absent("POST", "/join_sampling_session"),
    Absent("POST", "/retrieve_futures", "Poll with retrieve_future."),
    Absent("POST", "/copy_weights", "Start a new run from the checkpoint."),
    Absent("POST", f"{_CHECKPOINT}/publish"),
    Absent("DELETE", f"{_CHECKPOINT}/publish"),
    Absent("GET", f"{_CHECKPOINT}/external_weights_urls"),
    Absent("GET", f"{_CHECKPOINT}/archive"),
    Absent("PUT", "/sessions/{session}/project"),
    Absent("GET", "/sessions/{session}/trace_export"),
    Absent("POST", "/sessions/search", "List sessions with GET sessions."),
    Absent("GET", "/audit"),
    Absent("GET", "/billing/usage/events"),
    Absent("GET", "/billing/usage/checkpoints/current"),
)


def _refusal(absent: Absent) -> Callable[..., Awaitable[Response]]:
    message = f"{absent.method} {absent.path} is not supported by this server yet."
    message = f"{message} {absent.instead}".rstrip()

    async def refuse(request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
        if absent.ordered:
            async with submitting(service, tenant) as place:
                place.of(await read_object(request))
                raise NotSupported(message)
        raise NotSupported(message)

    return refuse


for _absent in ABSENT:
    routes.add_api_route(
        _absent.path,
        _refusal(_absent),
        methods=[_absent.method],
        name=f"absent_{_absent.method}_{_absent.path}",
    )
