"""What clients say of drawing: every key is known and honoured, or refused."""

import math
from dataclasses import dataclass
from typing import Any, cast

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import Json, SamplingParams, Stop

_KNOWN = (
    "max_tokens",
    "max_new_tokens",
    "seed",
    "stop",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "logprobs",
    "prompt_logprobs",
    "num_samples",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How to draw, and what to tell.

    Attributes:
        params: How to draw.
        num_samples: Continuations of each input.
        score_only: Draw nothing and tell the prompt's logprobs.
        num_logprobs: Pairs to tell at each place that is drawn; 0 tells none.
        num_prompt_logprobs: The same of the prompt, whose own tokens are told besides; None tells
            nothing, 0 only those.
    """

    params: SamplingParams
    num_samples: int
    score_only: bool
    num_logprobs: int
    num_prompt_logprobs: int | None


def wanted(sent: Json | None, num_samples: int | None) -> Wanted:
    """Read ``sampling_params`` and the ``num_samples`` beside them.

    Raises:
        InvalidRequest: A key is unknown, a value is none of its kind, or both numbers of samples
            are given and differ. Clients send 1 for nothing, so 1 never differs.
    """
    fields = {key: value for key, value in (sent or {}).items() if value is not None}
    for key in fields:
        if key not in _KNOWN:
            raise InvalidRequest(
                f"sampling_params has no {key[:60]!r}. It may have: {', '.join(_KNOWN)}."
            )
    max_tokens = _integer(fields, "max_tokens")
    other = _integer(fields, "max_new_tokens")
    if max_tokens is not None and other is not None and max_tokens != other:
        raise InvalidRequest("max_tokens and max_new_tokens are the same; give one of them.")
    max_tokens = other if max_tokens is None else max_tokens
    if max_tokens is not None and max_tokens < 0:
        raise InvalidRequest(f"max_tokens must be at least 0 (0 scores), not {max_tokens}.")
    temperature = _number(fields, "temperature", 1.0)
    num_logprobs = _count(fields, "logprobs")
    top_k, seed = _integer(fields, "top_k"), _integer(fields, "seed")
    return Wanted(
        params=SamplingParams(
            # A place must be drawn to be refused: it is not told.
            max_tokens=1 if max_tokens == 0 else max_tokens,
            temperature=temperature,
            top_k=-1 if top_k is None else top_k,
            top_p=_number(fields, "top_p", 1.0),
            repetition_penalty=_number(fields, "repetition_penalty", 1.0),
            seed=None if seed is None else seed % 2**63,
            stop=_stop(fields.get("stop")),
        ),
        num_samples=_num_samples(num_samples, _integer(fields, "num_samples")),
        score_only=max_tokens == 0,
        num_logprobs=num_logprobs or 0,
        num_prompt_logprobs=_count(fields, "prompt_logprobs"),
    )


def _num_samples(beside: int | None, within: int | None) -> int:
    for number in (beside, within):
        if number is not None and number < 1:
            raise InvalidRequest(f"num_samples must be at least 1, not {number}.")
    numbers = {number for number in (beside, within) if number is not None and number != 1}
    if len(numbers) > 1:
        raise InvalidRequest(
            f"num_samples is {beside}, and in sampling_params it is {within}; give one of them."
        )
    return numbers.pop() if numbers else 1


def _stop(value: Any) -> Stop:
    if value is None or value == []:
        return Stop()
    if isinstance(value, str):
        return Stop(strings=(value,))
    if isinstance(value, list):
        listed = cast(list[Any], value)
        strings = tuple(one for one in listed if isinstance(one, str))
        tokens = tuple(one for one in listed if isinstance(one, int) and not isinstance(one, bool))
        if len(strings) + len(tokens) == len(listed):
            return Stop(strings=strings, tokens=tokens)
    raise InvalidRequest("stop must be a text, or a list of texts or token ids.")


def _integer(fields: Json, name: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer.")
    return value


def _count(fields: Json, name: str) -> int | None:
    value = _integer(fields, name)
    if value is not None and value < 0:
        raise InvalidRequest(f"{name} must be at least 0, not {value}.")
    return value


def _number(fields: Json, name: str, default: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a number.")
    return float(value)
