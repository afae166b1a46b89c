"""What a sample request may ask beside its tokens, and how large the answer may become.

Checked before anything is stored: all of it is in memory at once, on the host and again here.
"""

from twinkle_dask.config import LimitConfig
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.values import ServedModel
from twinkle_dask.types import SampleRequest, TargetTokens

_BYTES_PER_SCORED_TOKEN = 8  # an id and a logprob


def check(request: SampleRequest, model: ServedModel, limits: LimitConfig) -> None:
    """Widths within bounds, targets that fit the prompt, and an answer that fits in memory.

    Raises:
        InvalidRequest: With the field, what is wrong and what would be right.
    """
    _widths(request, model, limits)
    _last_n(request)
    if (targets := request.target_prompt_logprobs) is not None:
        _targets(targets, len(request.prompt), model)
    num_bytes = _answer_bytes(request, model)
    if num_bytes > limits.max_answer_bytes:
        raise InvalidRequest(
            f"The logprobs that this request asks for may take {num_bytes / 2**20:.1f} MiB; at "
            f"most {limits.max_answer_bytes / 2**20:.1f} MiB are possible. Ask for fewer at each "
            "place, fewer samples, or a smaller max_tokens."
        )


def _widths(request: SampleRequest, model: ServedModel, limits: LimitConfig) -> None:
    most = min(limits.max_alternatives, model.facts.vocab_size)
    widths = {
        "topk_prompt_logprobs": request.topk_prompt_logprobs,
        "topk_sample_logprobs": request.topk_sample_logprobs,
        "prompt_alt_tokens_k": request.prompt_alt_tokens_k,
    }
    for name, width in widths.items():
        if not 0 <= width <= most:
            raise InvalidRequest(f"{name} must be from 0 to {most}, not {width}.")


def _last_n(request: SampleRequest) -> None:
    last_n, length = request.prompt_logprobs_last_n, len(request.prompt)
    if last_n is None:
        return
    if not request.prompt_logprobs:
        raise InvalidRequest("prompt_logprobs_last_n needs prompt_logprobs; ask for both.")
    if not 1 <= last_n < length:
        can = f"from 1 to {length - 1}" if length > 1 else "left out for a prompt of one token"
        raise InvalidRequest(
            f"prompt_logprobs_last_n must be {can}, not {last_n}: the first token has no logprob."
        )


def _targets(targets: TargetTokens, length: int, model: ServedModel) -> None:
    tokens, layout = targets.tokens, targets.layout
    shape = tokens.shape if layout is None else (len(layout.crow) - 1, layout.num_columns)
    if len(shape) != 2 or shape[0] != length - 1:
        raise InvalidRequest(
            f"target_prompt_logprobs has shape {list(shape)}, but a prompt of {length} tokens "
            f"takes [{length - 1}, K]: row i is scored where the prompt has token i + 1."
        )
    low, high = int(tokens.min(initial=0)), int(tokens.max(initial=-1))
    if low < -1 or high >= model.facts.vocab_size:
        raise InvalidRequest(
            f"target_prompt_logprobs has token {low if low < -1 else high}, but the vocabulary of "
            f"{model.name!r} runs from 0 to {model.facts.vocab_size - 1}; -1 asks for nothing."
        )
    if high < 0:
        raise InvalidRequest("target_prompt_logprobs names no token; leave it out, or name one.")


def _answer_bytes(request: SampleRequest, model: ServedModel) -> int:
    """As many as it can become, plain tokens and logprobs aside."""
    length = len(request.prompt)
    scored = length * (request.topk_prompt_logprobs + request.prompt_alt_tokens_k)
    if request.topk_sample_logprobs:
        room = model.facts.context_length - length
        drawn = room if (most := request.params.max_tokens) is None else min(room, most)
        scored += request.num_samples * drawn * request.topk_sample_logprobs
    num_bytes = scored * _BYTES_PER_SCORED_TOKEN
    if (targets := request.target_prompt_logprobs) is not None:
        num_bytes += targets.tokens.size * 4
        if targets.layout is not None:
            num_bytes += targets.layout.crow.nbytes + targets.layout.col.nbytes
    return num_bytes
