"""What every route of this face says of itself in the OpenAPI document."""

from twinkle_dask_gateway.openapi import Answers, Failure


def _failure(description: str) -> dict[str, object]:
    return {"description": description, "model": Failure}


# What any route that asks for a key may answer.
CLOSED: Answers = {
    400: _failure("The request cannot be fulfilled as it is; sending it again will not help."),
    401: _failure("The key is missing or unknown."),
    403: _failure("The key does not permit this."),
    404: _failure("There is no such thing, or it is another tenant's."),
    409: _failure("It does not go together with what is there, or the session is over."),
    422: {"description": "The body is not of the form that it must have."},
    429: _failure("Too much at once; send it again after `Retry-After` seconds."),
    500: _failure("A failure of the service, with the incident's id for its operator."),
    503: _failure("The service is full; send it again after `Retry-After` seconds."),
}
#: A route that answers ``null``.
VOID: Answers = {
    200: {"description": "OK", "content": {"application/json": {"schema": {"type": "null"}}}}
}
ANY: Answers = {status: CLOSED[status] for status in (400, 404, 500)}
