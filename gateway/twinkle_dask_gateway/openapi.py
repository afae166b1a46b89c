"""The OpenAPI document: what FastAPI sees of the routes, and what they say of themselves.

Routes read their bodies and write their hot answers themselves, so they declare both here:
``openapi_extra=takes(...)`` and ``responses=gives(...)``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, Union, cast

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict

Schema: TypeAlias = dict[str, Any]
Answers: TypeAlias = dict[int | str, dict[str, Any]]

_JSON = "application/json"
_PROTOBUF = "application/x-protobuf"
_SCHEMAS = "#/components/schemas/"
_KEY = "api_key"
_BEARER = "bearer"
_DESCRIPTION = """\
The Tinker protocol. Long operations answer with a `request_id`, whose result is asked for with
`retrieve_future`. Every failure is `{"detail": "..."}`. Protobuf messages are of `tinker.proto`.
An unknown field of a request is refused unless it asks for nothing (null, false, 0, empty).
"""


class Failure(BaseModel):
    """Every answer with status 4xx or 5xx."""

    model_config = ConfigDict(protected_namespaces=())

    detail: str


def _failure(description: str) -> dict[str, Any]:
    return {"description": description, "model": Failure}


# What any route may answer.
ANY: Answers = {
    400: _failure("The request cannot be fulfilled as it is; sending it again will not help."),
    404: _failure("There is no such thing, or it is another tenant's."),
    422: _failure("A parameter of the address is none, or a checkpoint is damaged."),
    500: _failure("A failure of the service, with the incident's id for its operator."),
}
# What every route that asks for a key may answer; 401 is also how `document` tells that it does.
CLOSED: Answers = ANY | {
    401: _failure("The key is missing or unknown."),
    403: _failure("The key does not permit this."),
    429: _failure("Too much at once; send it again after `Retry-After` seconds."),
}


def takes(
    *models: type[BaseModel], protobuf: str | None = None, required: bool = True
) -> dict[str, Any]:
    """A route's ``openapi_extra``: its body is JSON of one of these models.

    Args:
        models: As ``reading.read`` is given them; none where any JSON will do.
        protobuf: The message of ``tinker.proto`` that may be sent instead.
        required: Whether an empty body is refused.
    """
    schemas = [model.model_json_schema(ref_template=f"{_SCHEMAS}{{model}}") for model in models]
    content: dict[str, Any] = {}
    if protobuf is not None:
        content[_PROTOBUF] = {"schema": _binary(protobuf)}
    content[_JSON] = {"schema": _any_of(schemas)}
    too_large = {
        "description": "The body is too large.",
        "content": {_JSON: {"schema": {"$ref": f"{_SCHEMAS}{Failure.__name__}"}}},
    }
    return {
        "parameters": [_ENCODING],
        "requestBody": {"required": required, "content": content},
        "responses": {"413": too_large},
    }


def gives(
    *models: type[BaseModel],
    protobuf: Sequence[str] = (),
    also: Mapping[int, type[BaseModel]] | None = None,
) -> Answers:
    """A route's ``responses``: where it writes its answer as bytes, one of these models.

    Args:
        models: Of the JSON with status 200; none where the route's own annotation says it.
        protobuf: Messages of ``tinker.proto`` that 200 may carry for whoever accepts them.
        also: Answers with other statuses.
    """
    answers: Answers = {
        status: {"description": _told(model), "model": model}
        for status, model in (also or {}).items()
    }
    if models:
        answers[200] = {"description": "OK", "model": cast(Any, Union)[models]}
    if protobuf:
        answers.setdefault(200, {"description": "OK"})
        answers[200]["content"] = {_PROTOBUF: {"schema": _binary(" or ".join(protobuf))}}
    return answers


def document(app: FastAPI) -> Schema:
    """The document of all routes of an app."""
    whole = get_openapi(
        title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes
    )
    schemas: dict[str, Schema] = whole.setdefault("components", {}).setdefault("schemas", {})
    for operations in whole["paths"].values():
        for operation in operations.values():
            for body in operation.get("requestBody", {}).get("content", {}).values():
                body["schema"] = _hoisted(body["schema"], schemas)
            if "401" not in operation["responses"]:
                operation["security"] = []
    whole["components"]["schemas"] = dict(sorted(schemas.items()))
    whole["components"]["securitySchemes"] = {
        _KEY: {
            "type": "apiKey",
            "in": "header",
            "name": "x-api-key",
            "description": "An API key, or a token that was made from one.",
        },
        _BEARER: {
            "type": "http",
            "scheme": "bearer",
            "description": "The same, as clients of Twinkle send it.",
        },
    }
    whole["security"] = [{_KEY: []}, {_BEARER: []}]
    return whole


_ENCODING: Schema = {
    "name": "Content-Encoding",
    "in": "header",
    "required": False,
    "description": "How the body is compressed.",
    "schema": {"type": "string", "enum": ["", "identity", "zstd"]},
}


def _binary(message: str) -> Schema:
    return {
        "type": "string",
        "format": "binary",
        "contentMediaType": _PROTOBUF,
        "description": f"{message} of tinker.proto.",
    }


def _any_of(schemas: list[Schema]) -> Schema:
    match schemas:
        case []:
            return {"description": "Anything."}
        case [only]:
            return only
        case _:
            return {"anyOf": schemas}


def _told(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").partition("\n")[0]


def _hoisted(schema: Schema, schemas: dict[str, Schema]) -> Schema:
    """Move a body's models to the components; gives what stands in their place.

    Raises:
        ValueError: There is another model of the same name.
    """
    if "anyOf" in schema:
        return {"anyOf": [_hoisted(one, schemas) for one in cast(list[Schema], schema["anyOf"])]}
    if "title" not in schema:
        return schema
    nested: dict[str, Schema] = schema.pop("$defs", {})
    for name, model in {**nested, schema["title"]: schema}.items():
        if schemas.setdefault(name, model) != model:
            raise ValueError(f"Two different bodies or answers are both named {name}.")
    return {"$ref": f"{_SCHEMAS}{schema['title']}"}
