"""Inputs to prompts, and samples to what clients read.

Pairs of an id and a logprob: JSON has no infinity and clients take no null in a pair, so a token
that cannot be is left out.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import (
    Float32Array,
    Int32Array,
    Json,
    SampledSequence,
    SamplePart,
    SampleRequest,
    SampleResult,
    ScoredTokens,
    StopReason,
)
from twinkle_dask_gateway.twinkle.features import Row, rows_of
from twinkle_dask_gateway.twinkle.sampling_params import Wanted

Pair: TypeAlias = tuple[int, float]
#: A continuation's text, and the input with it; nothing without a tokenizer.
Continued: TypeAlias = tuple[str | None, Json | None]

#: What a feature may tell of each token, and what its labels tell as well, or else it is refused.
_SAID_BY_LABELS: Final = frozenset({"completion_mask", "loss_scale", "mm_token_type_ids"})


def prompts_of(features: Sequence[Json]) -> list[Row]:
    """The one row of each feature.

    Raises:
        InvalidRequest: A feature is no single row of tokens.
        NotSupported: It holds more than text.
    """
    prompts: list[Row] = []
    for index, feature in enumerate(features):
        rows = rows_of([feature], first=index)
        if len(rows) != 1:
            raise InvalidRequest(
                f"inputs[{index}] holds {len(rows)} sequences; send one element for each prompt."
            )
        prompts += rows
    return prompts


def request_of(prompt: Row, wanted: Wanted) -> SampleRequest:
    """What to draw after a prompt."""
    return SampleRequest(
        prompt=prompt.tokens,
        params=wanted.params,
        num_samples=1 if wanted.score_only else wanted.num_samples,
        prompt_logprobs=wanted.num_prompt_logprobs is not None or wanted.score_only,
        topk_prompt_logprobs=wanted.num_prompt_logprobs or 0,
        # Of one pair a place, the token that was drawn is the one.
        topk_sample_logprobs=wanted.num_logprobs if wanted.num_logprobs > 1 else 0,
        score_only=wanted.score_only,
    )


def told(result: SampleResult, wanted: Wanted) -> tuple[SampledSequence, ...]:
    """The continuations to tell: of a score as many empty ones as were asked for."""
    if not wanted.score_only:
        return result.sequences
    nothing = SampledSequence(
        tokens=np.empty(0, np.int32),
        logprobs=np.empty(0, np.float32),
        stop_reason=StopReason.LENGTH,
    )
    return (nothing,) * wanted.num_samples


def without_padding(features: Sequence[Json], prompts: Sequence[Row]) -> list[Json]:
    """Features with one flat row of tokens, to which others can be added."""
    flat: list[Json] = []
    for feature, prompt in zip(features, prompts, strict=True):
        labels = None if prompt.labels is None else prompt.labels.tolist()
        own = {key: value for key, value in feature.items() if key not in _SAID_BY_LABELS}
        flat.append({**own, "input_ids": prompt.tokens.tolist(), "labels": labels})
    return flat


def sampled(
    result: SampleResult,
    wanted: Wanted,
    sequences: Sequence[SampledSequence],
    continued: Sequence[Continued],
) -> dict[str, Any]:
    """The continuations of one input.

    Args:
        result: What was drawn.
        wanted: What is to be told.
        sequences: Those to tell.
        continued: Their texts, and the input with each of them.
    """
    return {
        "sequences": [
            {
                "stop_reason": str(sequence.stop_reason),
                "tokens": np.ascontiguousarray(sequence.tokens),
                "logprobs": _logprobs(sequence, wanted),
                "decoded": text,
                "new_input_feature": feature,
            }
            for sequence, (text, feature) in zip(sequences, continued, strict=True)
        ],
        "prompt_logprobs": _nullable(result.prompt_logprobs),
        "topk_prompt_logprobs": _rows(result.topk_prompt_logprobs),
    }


def pairs_of(
    tokens: Int32Array, logprobs: Float32Array, top: ScoredTokens | None, number: int
) -> list[list[Pair]]:
    """At each place the token drawn, then the likeliest others, up to ``number`` pairs."""
    found: list[list[Pair]] = []
    for place, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
        pairs: list[Pair] = [(token, logprob)]
        if top is not None:
            others = zip(top.tokens[place].tolist(), top.logprobs[place].tolist(), strict=True)
            pairs += [(t, lp) for t, lp in others if t != token and math.isfinite(lp)]
        found.append(pairs[:number])
    return found


def line_of(part: SamplePart, wanted: Wanted) -> dict[str, Any]:
    """What was drawn since the last line of a stream."""
    line: dict[str, Any] = {
        "delta": "".join(part.texts),
        "finish_reason": None,
        "index": part.index,
        "tokens": part.tokens.tolist(),
    }
    if wanted.num_logprobs:
        line["logprobs"] = pairs_of(
            part.tokens, part.logprobs, part.topk_logprobs, wanted.num_logprobs
        )
    return line


def num_bytes(results: Sequence[SampleResult], features: Sequence[Json]) -> int:
    """About how much there is to write."""
    size = 0
    for result, feature in zip(results, features, strict=True):
        drawn = [sequence.tokens.size for sequence in result.sequences]
        prompt = len(feature.get("input_ids") or ())
        size += 16 * (prompt * (1 + len(drawn)) + sum(drawn))
        for sequence in result.sequences:
            if sequence.topk_logprobs is not None:
                size += 32 * sequence.topk_logprobs.tokens.size
        if result.topk_prompt_logprobs is not None:
            size += 32 * result.topk_prompt_logprobs.tokens.size
    return size


def _logprobs(sequence: SampledSequence, wanted: Wanted) -> list[list[Pair]] | None:
    if not wanted.num_logprobs:
        return None
    return pairs_of(sequence.tokens, sequence.logprobs, sequence.topk_logprobs, wanted.num_logprobs)


def _nullable(logprobs: Float32Array | None) -> list[float | None] | None:
    if logprobs is None:
        return None
    listed: list[float] = logprobs.tolist()
    return [one if math.isfinite(one) else None for one in listed]


def _rows(scored: ScoredTokens | None) -> list[list[Pair] | None] | None:
    if scored is None:
        return None
    rows: list[list[Pair] | None] = []
    for tokens, logprobs in zip(scored.tokens, scored.logprobs, strict=True):
        pairs = zip(tokens.tolist(), logprobs.tolist(), strict=True)
        finite = [(token, logprob) for token, logprob in pairs if math.isfinite(logprob)]
        rows.append(finite or None)
    return rows
