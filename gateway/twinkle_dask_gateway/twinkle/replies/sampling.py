"""Answers about samples. They say what is in an answer; the routes write it as bytes."""

from typing import Any

from twinkle_dask_gateway.twinkle.replies.base import Answer


class Sequence(Answer):
    """One continuation. ``logprobs`` has the pairs of each place, the token drawn first."""

    stop_reason: str
    tokens: list[int]
    logprobs: list[list[tuple[int, float]]] | None = None
    decoded: str | None = None
    new_input_feature: dict[str, Any] | None = None


class Sampled(Answer):
    """The continuations of one input. The first place of a prompt has no logprob."""

    sequences: list[Sequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None


class Samples(Answer):
    """One entry for each input, in order."""

    samples: list[Sampled]


class AdapterNamed(Answer):
    """An adapter's name stands for weights now."""

    status: str = "ok"
    adapter_name: str
