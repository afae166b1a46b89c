"""Bodies that make runs, ask for them and step them."""

from typing import Any, cast

from pydantic import field_validator, model_validator

from twinkle_dask_gateway.tinker.wire.base import Asked, Id, RunSeq

_FULL = (
    "training of all parameters is not supported. This server trains LoRA adapters; give a "
    "lora_config with a rank, for example 32."
)


class LoraConfig(Asked):
    """The adapter to make; alpha is not on the wire."""

    rank: int = 32
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    @field_validator("rank", mode="before")
    @classmethod
    def _an_adapter(cls, rank: Any) -> Any:
        if rank is None:
            raise ValueError(_FULL)
        return rank


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
    model_seq_id: RunSeq
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraConfig
    optimizer_config: OptimizerConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_an_adapter(cls, body: Any) -> Any:
        if isinstance(body, dict) and cast(dict[str, Any], body).get("lora_config") is None:
            raise ValueError(_FULL)
        return cast(Any, body)


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
