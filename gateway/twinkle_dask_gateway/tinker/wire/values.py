"""Values that stand in several bodies: tensors and prompts."""

from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, WithJsonSchema

from twinkle_dask_gateway.tinker.wire.base import Asked

# What numpy looks at as a whole is not looked at one by one before.
Numbers = Annotated[list[Any], WithJsonSchema({"type": "array", "items": {"type": "number"}})]
Integers = Annotated[list[Any], WithJsonSchema({"type": "array", "items": {"type": "integer"}})]
# Old clients leave out the type, which the other fields tell.
_TEXT = {
    "type": "object",
    "properties": {
        "type": {"const": "encoded_text"},
        "tokens": {
            "type": "array",
            "items": {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
        },
    },
    "required": ["tokens"],
}
_IMAGE = {
    "type": "object",
    "properties": {
        "type": {"const": "image"},
        "data": {"type": "string", "contentEncoding": "base64"},
        "format": {"enum": ["png", "jpeg"]},
        "expected_tokens": {"type": ["integer", "null"]},
    },
    "required": ["data", "format"],
}
Chunks = Annotated[
    list[dict[str, Any]],
    # A report on each of a million wrong items would take the interpreter's lock for seconds.
    FailFast(),
    WithJsonSchema({"type": "array", "items": {"anyOf": [_TEXT, _IMAGE]}}),
]


class TensorData(Asked):
    """Flat numbers with a shape; with indices, the stored values of a CSR matrix."""

    data: Numbers
    dtype: Literal["int64", "float32"]
    shape: Annotated[list[int], Field(max_length=64)] | None = None
    sparse_crow_indices: Integers | None = None
    sparse_col_indices: Integers | None = None


class ModelInput(Asked):
    """A prompt in pieces."""

    chunks: Chunks
