"""What calls of this face have in common: bodies, sessions, models, and waiting for results."""

from typing import Annotated, Any, TypeVar

import structlog
from fastapi import Depends, Header, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from twinkle_dask.errors import InvalidRequest, NotFound
from twinkle_dask.operations.service import Service
from twinkle_dask.operations.values import Failed, Result, ServedModel, Tenant, Ticket, Waiting
from twinkle_dask.types import SessionId
from twinkle_dask_gateway.auth import TenantDep
from twinkle_dask_gateway.deps import ConfigDep, ServiceDep
from twinkle_dask_gateway.reading import aside, read_object
from twinkle_dask_gateway.twinkle.arrays import encode

_M = TypeVar("_M", bound=BaseModel)
#: A result is awaited in pieces of this; the request itself is held until it is there.
_WAIT_S = 60.0


async def read(request: Request, model: type[_M]) -> _M:
    """Read a JSON body; what ``model`` keeps beside its fields is the model's affair.

    Raises:
        InvalidRequest: It is no JSON object (400).
        RequestValidationError: It is not what ``model`` says (422).
    """
    content = await read_object(request)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        for problem in problems:
            problem["loc"] = ("body", *problem["loc"])
        raise RequestValidationError(problems) from None


async def session_of(
    service: ServiceDep,
    tenant: TenantDep,
    x_twinkle_session_id: Annotated[
        str | None,
        Header(description="The session in which adapters and processors live.", max_length=256),
    ] = None,
) -> SessionId:
    """The session that a call names, which was heard of with it.

    Raises:
        InvalidRequest: It names none.
        NotFound: There is none of this tenant.
        SessionEnded: It was finished or has expired.
    """
    if not x_twinkle_session_id:
        raise InvalidRequest(
            "This call belongs to a session: create one and send its id as X-Twinkle-Session-Id."
        )
    session = SessionId(x_twinkle_session_id)
    structlog.contextvars.bind_contextvars(session=session)
    await service.sessions.active(tenant, session)
    return session


async def model_of(service: ServiceDep, _tenant: TenantDep, model_id: str) -> ServedModel:
    """The base model that an address names.

    Raises:
        NotFound: It is not served.
    """
    model = service.catalogue.find(model_id)
    if model is None:
        served = ", ".join(sorted(one.name for one in service.catalogue.all()))
        raise NotFound(f"Model {model_id[:80]!r} is not served here. Served: {served}.")
    return model


#: Of an active session of the tenant, touched by the call.
SessionDep = Annotated[SessionId, Depends(session_of)]
#: Of ``{model_id:path}`` in the route's address.
ModelDep = Annotated[ServedModel, Depends(model_of)]


async def result_of(service: Service, tenant: Tenant, ticket: Ticket) -> Result:
    """Wait for a ticket however long it takes.

    Raises:
        TwinkleDaskError: What became of it instead of a result.
    """
    while True:
        outcome = await service.outcome(tenant, ticket.id, timeout_s=_WAIT_S)
        if isinstance(outcome, Failed):
            raise outcome.error
        if not isinstance(outcome, Waiting):
            return outcome.result


def write(answer: BaseModel) -> Response:
    """An answer as JSON."""
    return Response(answer.model_dump_json(), media_type="application/json")


def nothing() -> Response:
    """The answer of a call without a result: ``null``."""
    return Response(b"null", media_type="application/json")


async def json_answer(body: Any, config: ConfigDep, *, num_bytes: int = 0) -> Response:
    """A JSON body; NaN and infinities become null, numpy arrays lists.

    Args:
        body: Made of what JSON has, numpy arrays and numpy numbers.
        config: Says what is much.
        num_bytes: About how large the answer is; much is written in a thread.
    """
    content = await aside(num_bytes, config, lambda: encode(body))
    return Response(content, media_type="application/json")
