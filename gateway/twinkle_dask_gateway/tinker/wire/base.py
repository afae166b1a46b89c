"""What all bodies have in common.

Clients write every field with its default, and newer ones write fields we have never heard of.
So an unknown field is let by as long as it asks for nothing (null, false, 0, empty); one that does
ask for something is refused by name, because ignoring it would answer another question than the
one that was put. Old clients leave the ``type`` tags out: nothing here requires one.
"""

from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

_HINTS = {
    "topk_prompt_logprobs": "Leave it 0; prompt_logprobs scores the prompt's own tokens.",
    "topk_sample_logprobs": "Leave it 0; sampled tokens carry their own logprob.",
    "target_prompt_logprobs": "Leave it out; a forward pass with these target_tokens scores them.",
    "prompt_alt_tokens_k": "Leave it 0.",
    "prompt_logprobs_last_n": "Leave it out and cut the answer on your side.",
    "record_stability_info": "Leave it false; stable_reinforce takes the sampled logprobs here.",
    "base_model": "Create a sampling session for the model and sample from that.",
    "model_path": "Create a sampling session for the checkpoint and sample from that.",
    "optimizer_params": "The optimizer is AdamW; send adam_params.",
    "weights_access_token": "Use the key of the tenant that owns the weights.",
    "age_encryption_recipients": "Leave it out.",
}

MAX_ID_LENGTH = 256
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
Seq = Annotated[int, Field(ge=0, lt=2**63)]
MAX_RUN_SEQ = 2**31 - 1  # protobuf has no more
RunSeq = Annotated[int, Field(ge=0, le=MAX_RUN_SEQ)]


class Told(BaseModel):
    """A message whose unknown fields we may ignore."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), allow_inf_nan=False)


class Asked(Told):
    """A message that asks for something; see the module's first lines."""

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
