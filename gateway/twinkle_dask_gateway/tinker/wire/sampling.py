"""Bodies that make samplers and draw from them."""

from typing import Annotated, TypeVar

from pydantic import Field, model_validator

from twinkle_dask_gateway.tinker.wire.base import Address, Asked, Id, RunSeq, Seq
from twinkle_dask_gateway.tinker.wire.values import ModelInput, TensorData

_T = TypeVar("_T")
# More than may be served; what is longer is not looked at one by one.
_Stops = Annotated[list[_T], Field(max_length=1024)]


class CreateSamplingSession(Asked):
    """``POST create_sampling_session``; the checkpoint wins over the model."""

    session_id: Id
    sampling_session_seq_id: RunSeq
    base_model: str | None = None
    model_path: Address | None = None

    @model_validator(mode="after")
    def _something_to_sample_from(self) -> "CreateSamplingSession":
        if self.base_model is None and self.model_path is None:
            raise ValueError("give base_model or model_path")
        return self


class JoinSamplingSession(Asked):
    """``POST join_sampling_session``."""

    sampling_session_id: Id


class SamplingParams(Asked):
    """How to draw; ``stop`` absent and ``stop`` empty differ."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | _Stops[str] | _Stops[int] | None = None
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
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int | None = 0
    topk_sample_logprobs: int | None = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: int | None = 0
    record_stability_info: bool | None = False
