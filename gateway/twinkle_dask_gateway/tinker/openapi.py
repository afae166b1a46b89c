"""What routes that read their body themselves tell the OpenAPI document about it."""

from typing import Any

from pydantic import BaseModel

_REF = "#/components/schemas/{model}"


def takes(*models: type[BaseModel]) -> dict[str, Any]:
    """A route's ``openapi_extra``: its JSON body is one of these models."""
    schemas = [model.model_json_schema(ref_template=_REF) for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def gives(*models: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """A route's ``responses``, where it writes its answer as bytes: one of these models."""
    schemas = [model.model_json_schema(ref_template=_REF) for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {200: {"description": "OK", "content": {"application/json": {"schema": schema}}}}
