"""What all bodies have in common.

Clients write every field with its default, and newer ones write fields we have never heard of.
So an unknown field is let by as long as it asks for nothing (null, false, 0, empty); one that does
ask for something is refused by name, because ignoring it would answer another question than the
one that was put. Old clients leave the ``type`` tags out: nothing here requires one.
"""

from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

_HINTS = {
    "base_model": "Create a sampling session for the model and sample from that.",
    "model_path": "Create a sampling session for the checkpoint and sample from that.",
    "optimizer_params": "The optimizer is AdamW; send adam_params.",
}

# What an unknown field may be, in the words of JSON schema.
_NOTHING: list[JsonValue] = [None, False, 0, "", [], {}]
MAX_ID_LENGTH = 256
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
Seq = Annotated[int, Field(ge=0, lt=2**63)]
# What the document says of these is held by ``addresses`` and ``operations.validation``.
Address = Annotated[
    str, Field(json_schema_extra={"pattern": "^(tinker|twinkle)://[^/]+/[a-z_]+/[^/]+$"})
]
CheckpointName = Annotated[
    str, Field(json_schema_extra={"pattern": "^[A-Za-z0-9][A-Za-z0-9._-]*$", "maxLength": 128})
]
TtlS = Annotated[int, Field(json_schema_extra={"minimum": 3600, "maximum": 315_360_000})]
# Of what a run is asked for, of the runs of a session and of its samplers: neither protobuf nor the
# columns of the database hold more.
MAX_RUN_SEQ = 2**31 - 1
RunSeq = Annotated[int, Field(ge=0, le=MAX_RUN_SEQ)]


class Told(BaseModel):
    """A message whose unknown fields we may ignore."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), allow_inf_nan=False)


class Asked(Told):
    """A message that asks for something; see the module's first lines."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"enum": _NOTHING}})

    type: Any = None

    @model_validator(mode="before")
    @classmethod
    def _ignore_nothing_with_meaning(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body  # pydantic says what is wrong with it
        fields = cast(dict[str, Any], body)
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in fields.items():
            if value and name not in known:
                hint = _HINTS.get(name, "This server does not know it; leave it out.")
                raise ValueError(f"{name[:60]!r} is not supported. {hint}")
        return fields
