"""Losses that tenants define; their batches come as any other (``routes_training``)."""

from fastapi import APIRouter, Request, Response

from twinkle_dask.custom_losses import Node
from twinkle_dask.types import SessionId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ServiceDep
from twinkle_dask_gateway.openapi import gives, takes
from twinkle_dask_gateway.reading import read
from twinkle_dask_gateway.tinker import replies, wire
from twinkle_dask_gateway.tinker.answers import promise
from twinkle_dask_gateway.tinker.errors import TinkerRoute

routes = APIRouter(route_class=TinkerRoute)


@routes.post(
    "/create_custom_loss",
    openapi_extra=takes(wire.CreateCustomLoss),
    responses=gives(replies.Promise),
)
async def create_custom_loss(request: Request, service: ServiceDep, tenant: TenantDep) -> Response:
    """Check a loss and keep it for its session; the result is its id."""
    body = await read(request, wire.CreateCustomLoss)
    ticket = await service.custom_losses.create(
        tenant,
        SessionId(body.session_id),
        seq=body.custom_loss_seq_id,
        name=body.name,
        ranks=[(one.name, one.rank) for one in body.inputs],
        nodes=[
            Node(op=node.op, name=node.name, target=node.target, args=node.args, kwargs=node.kwargs)
            for node in body.graph.nodes
        ],
    )
    return promise(ticket)
