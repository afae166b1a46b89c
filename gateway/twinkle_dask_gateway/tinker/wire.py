"""The JSON bodies that clients send. What they get back is in ``replies``.

Clients write every field with its default, and newer ones write fields we have never heard of.
So an unknown field is let by as long as it asks for nothing (null, false, 0, empty); one that does
ask for something is refused by name, because ignoring it would answer another question than the
one that was put. Old clients leave the ``type`` tags out: nothing here requires one.
"""

from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from twinkle_dask_gateway.tinker.counting import check_num_data

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


# ---- service and sessions


class CreateSession(Told):
    """``POST create_session``."""

    tags: list[str] | None = None
    user_metadata: dict[str, Any] | None = None
    sdk_version: str | None = None
    project_id: str | None = None
    display_name: str | None = None


class Heartbeat(Told):
    """``POST session_heartbeat``."""

    session_id: Id


class FinishReason(Told):
    """How the client's work ended."""

    type: Literal["success", "errored", "interrupted"]


class FinishSession(Told):
    """``POST sessions/{id}/finish``."""

    reason: FinishReason
    detail: str | None = None


# ---- runs


class LoraConfig(Asked):
    """The adapter to make; alpha is not on the wire."""

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Asked):
    """The optimizer of a run."""

    type: str = "adamw"

    @model_validator(mode="before")
    @classmethod
    def _only_adamw(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body  # pydantic says what is wrong with it
        fields = cast(dict[str, Any], body)
        # Before anything else: the settings of another optimizer are no mistakes of their own.
        if (name := fields.get("type", "adamw")) != "adamw":
            raise ValueError(
                f"optimizer {str(name)[:60]!r} is not supported. This server trains with 'adamw'."
            )
        return fields


class CreateModel(Asked):
    """``POST create_model``."""

    session_id: Id
    model_seq_id: Seq
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig | None = None


class ModelQuery(Asked):
    """``get_info``."""

    model_id: Id


class AdamParams(Asked):
    """Settings of one step; old clients leave out what is default."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(Asked):
    """``POST optim_step``."""

    model_id: Id
    seq_id: RunSeq | None = None
    adam_params: AdamParams


# ---- forward_backward in JSON, as SDKs before 0.25 send it


class TensorData(Asked):
    """Flat numbers with a shape; with indices, the stored values of a CSR matrix."""

    data: list[Any]
    dtype: Literal["int64", "float32"]
    shape: list[int] | None = None
    sparse_crow_indices: list[Any] | None = None
    sparse_col_indices: list[Any] | None = None


class ModelInput(Asked):
    """A prompt in pieces."""

    chunks: list[dict[str, Any]]


class Datum(Asked):
    """Provenance spans are read by no loss here, but RL loops always attach them."""

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData]
    model_input_spans: Any = None
    loss_fn_input_spans: Any = None


class ForwardBackwardInput(Asked):
    """A batch and its loss."""

    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None

    @field_validator("data", mode="before")
    @classmethod
    def _not_too_many(cls, data: Any, info: ValidationInfo) -> Any:
        # Before the data are looked at one by one.
        max_data = cast(dict[str, int | None], info.context or {}).get("max_data")
        if max_data is not None and isinstance(data, list):
            check_num_data(len(cast(list[Any], data)), max_data)
        return cast(Any, data)


class ForwardBackward(Asked):
    """``POST forward_backward``."""

    model_id: Id
    seq_id: RunSeq | None = None
    batch: ForwardBackwardInput = Field(alias="forward_backward_input")
    backward: ClassVar[bool] = True


class Forward(Asked):
    """``POST forward``."""

    model_id: Id
    seq_id: RunSeq | None = None
    batch: ForwardBackwardInput = Field(alias="forward_input")
    backward: ClassVar[bool] = False


# ---- weights


class SaveWeights(Asked):
    """``POST save_weights``."""

    model_id: Id
    path: str
    seq_id: RunSeq | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None


class SaveWeightsForSampler(Asked):
    """``POST save_weights_for_sampler``: under a name, or into a new sampler."""

    model_id: Id
    path: str | None = None
    sampling_session_seq_id: Seq | None = None
    kind: str | None = "snapshot"
    seq_id: RunSeq | None = None
    ttl_seconds: int | None = None
    user_metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_place_for_a_snapshot(self) -> "SaveWeightsForSampler":
        if self.kind not in {None, "snapshot"}:
            raise ValueError(
                "kind: only 'snapshot' is supported. Save again when newer weights are wanted."
            )
        if (self.path is None) == (self.sampling_session_seq_id is None):
            raise ValueError("give either path or sampling_session_seq_id")
        return self


class LoadWeights(Asked):
    """Into a run (``model_id``, ``seq_id``), or into a new one (``session_id``, ...)."""

    model_id: Id | None = None
    seq_id: RunSeq | None = None
    session_id: Id | None = None
    model_seq_id: Seq | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    path: str
    optimizer: bool = False
    optimizer_config: OptimizerConfig | None = None


class WeightsQuery(Asked):
    """``weights_info``."""

    tinker_path: str


class SetTtl(Asked):
    """``PUT .../ttl``; null removes it."""

    ttl_seconds: int | None


# ---- sampling


class CreateSamplingSession(Asked):
    """``POST create_sampling_session``; the checkpoint wins over the model."""

    session_id: Id
    sampling_session_seq_id: Seq
    base_model: str | None = None
    model_path: str | None = None

    @model_validator(mode="after")
    def _something_to_sample_from(self) -> "CreateSamplingSession":
        if self.base_model is None and self.model_path is None:
            raise ValueError("give base_model or model_path")
        return self


class SamplingParams(Asked):
    """How to draw; ``stop`` absent and ``stop`` empty differ."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Sample(Asked):
    """``POST asample``."""

    sampling_session_id: Id
    seq_id: Seq | None = None
    num_samples: int = 1
    prompt: ModelInput
    sampling_params: SamplingParams
    prompt_logprobs: bool | None = None


class TicketQuery(Told):
    """``retrieve_future`` and ``cancel_future``."""

    request_id: Id
