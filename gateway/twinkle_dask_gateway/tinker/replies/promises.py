"""Promises and what they turn into.

``answers`` and the codecs write these as bytes; the models are what the OpenAPI document says of
them, and tests hold what is written against them.
"""

from typing import Annotated, Literal

from pydantic import Field

from twinkle_dask_gateway.tinker.replies.base import Reply


class Promise(Reply):
    """A result to come, and for samples the id of each sequence, in their order."""

    request_id: str
    sample_sequence_ids: list[str] | None = None


class TryAgain(Reply):
    """There is no result yet; ask again."""

    type: Literal["try_again"]
    queue_state: str
    queue_state_reason: str | None


class MetadataOnly(Reply):
    """A large result is there; ask again without ``allow_metadata_only`` to get it."""

    status: Literal["complete_metadata"]
    response_payload_size: int


class FutureFinished(Reply):
    """A request of a sampling session has a result of about so many bytes."""

    state: Literal["finished"] = "finished"
    request_id: str
    response_payload_uncompressed_size: int


class FutureFailed(Reply):
    """A request of a sampling session has failed; its error is fetched like a result."""

    state: Literal["failed"] = "failed"
    request_id: str


class FutureCompletions(Reply):
    """``retrieve_futures``. The next poll asks for what comes after ``cursor``."""

    completions: list[FutureFinished | FutureFailed]
    cursor: int


class FailedResult(Reply):
    """The operation failed. The status is 200, since asking worked."""

    error: str
    category: Literal["user", "server"]


class RunCreatedResult(Reply):
    """Of ``create_model``."""

    type: Literal["create_model"]
    model_id: str


class StepResult(Reply):
    """Of ``optim_step``."""

    type: Literal["optim_step"]
    metrics: dict[str, float]


class SavedResult(Reply):
    """Of ``save_weights``."""

    type: Literal["save_weights"]
    path: str


class SavedForSamplerResult(Reply):
    """Of ``save_weights_for_sampler``: a path or a sampler."""

    type: Literal["save_weights_for_sampler"]
    path: str | None
    sampling_session_id: str | None


class ExportedResult(Reply):
    """Of ``save_weights_external``."""

    type: Literal["save_weights_external"]
    path: str
    size_bytes: int


class UnloadedResult(Reply):
    """Of ``unload_model``."""

    type: Literal["unload_model"]
    model_id: str


class LoadedResult(Reply):
    """Of ``load_weights``."""

    type: Literal["load_weights"]
    path: str
    model_id: str


class TensorReply(Reply):
    """Flat numbers with a shape; null where a number is not finite."""

    data: list[float | None]
    dtype: Literal["float32"]
    shape: list[int]


class TokensReply(Reply):
    """Flat token ids with a shape."""

    data: list[int]
    dtype: Literal["int64"]
    shape: list[int]


class TargetsReply(TensorReply):
    """Dense, or with indices the values of a CSR matrix."""

    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class AlternativesReply(Reply):
    """Drawn tokens and their logprobs."""

    tokens: TokensReply
    logprobs: TensorReply


class BatchResult(Reply):
    """Of ``forward_backward`` and ``forward``; an output for each datum."""

    loss_fn_output_type: Literal["ArrayRecord"]
    loss_fn_outputs: list[dict[str, TensorReply]]
    metrics: dict[str, float | None]


_TokenLogprob = Annotated[
    list[float], Field(description="Token and logprob.", min_length=2, max_length=2)
]


class SequenceReply(Reply):
    """One sample."""

    stop_reason: Literal["stop", "length"]
    tokens: list[int]
    logprobs: list[float | None]
    topk_logprobs: list[list[_TokenLogprob] | None] | None = None


class SampleResult(Reply):
    """Of ``asample``; null where there is no logprob."""

    type: Literal["sample"]
    sequences: list[SequenceReply]
    prompt_logprobs: list[float | None] | None
    topk_prompt_logprobs: list[list[_TokenLogprob] | None] | None = None
    target_prompt_logprobs: TargetsReply | None = None
    prompt_alt_tokens: AlternativesReply | None = None


# What ``retrieve_future`` answers with status 200, where that is JSON.
RESULTS = (
    RunCreatedResult,
    StepResult,
    SavedResult,
    SavedForSamplerResult,
    ExportedResult,
    LoadedResult,
    UnloadedResult,
    BatchResult,
    SampleResult,
    MetadataOnly,
    FailedResult,
)
