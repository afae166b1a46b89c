"""Draws one token per row from logits, each row by its own temperature, top_k, top_p and seed.

What a row draws depends on its own logits and random number alone, never on the other rows: every
operation here works row by row and in vocabulary order, so the same seed gives the same tokens
whatever else is in the batch (for equal logits).

Shapes: N rows, V vocabulary, S the rows that draw at random, C likeliest candidates, K draws.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinkle_dask.types import Float32Array, Int32Array, SamplingParams

# Nearly always the nucleus of top_p lies within so many likeliest tokens; only where it does not,
# the row's whole vocabulary is sorted.
_CANDIDATES = 1024
# Lower ones draw the likeliest token as well, but become 0 in float32.
_LEAST_TEMPERATURE = 1e-30
# A key for each logit, and what topk makes of them, take up to five times their memory.
_LOGITS_PER_PIECE = 8 * 2**20
# Philox makes its numbers four at a time.
_NUMBERS_PER_COUNT = 4


class Uniforms:
    """The random numbers of one sample: the i-th belongs to its i-th drawn token.

    Philox is counter-based: the key (seed, sample) names the stream, so samples of one request and
    requests of one seed never share numbers by accident of order.
    """

    def __init__(self, seed: int | None, sample: int) -> None:
        """``seed`` may be any integer (taken modulo 2**64); None draws a fresh one."""
        word = secrets.randbits(64) if seed is None else seed % 2**64
        key = np.array([word, sample], dtype=np.uint64)
        self._generator = np.random.Generator(np.random.Philox(key=key))
        self._drawn = 0
        self._last = 0.0

    def at(self, index: int) -> float:
        """The number in [0, 1) of the token at ``index``; no earlier one than asked for last."""
        while self._drawn <= index:
            self._last = self._generator.random()
            self._drawn += 1
        return self._last


class PlacedUniforms:
    """The random numbers of a prompt's places, K for each, wherever one begins to read.

    A stream of its own: no sample has its number.
    """

    def __init__(self, seed: int | None, width: int) -> None:
        """``seed`` as in ``Uniforms``; ``width`` is K."""
        word = secrets.randbits(64) if seed is None else seed % 2**64
        self._key = np.array([word, 2**64 - 1], dtype=np.uint64)
        self._width = width

    def at(self, start: int, count: int) -> NDArray[np.float64]:
        """The numbers (count, K) in [0, 1) of neighbouring places from ``start``."""
        counts = -(-self._width // _NUMBERS_PER_COUNT)
        philox = np.random.Philox(key=self._key)
        philox.advance(start * counts)
        numbers = np.random.Generator(philox).random((count, counts * _NUMBERS_PER_COUNT))
        return numbers[:, : self._width]


@dataclass(frozen=True, slots=True, eq=False)
class DrawRules:
    """The settings of N rows as tensors, made once for as long as the batch stays the same.

    Attributes:
        random_rows: Indices of the rows that are not greedy.
        random_S: The same as a tensor.
        greedy: Whether any row is greedy.
        tempered: Whether any temperature is not 1.
        temperature_S1: At least ``_LEAST_TEMPERATURE``.
        limited_L: Positions within S of the rows with a top_k or top_p; None if that is all.
        top_k_L1: V where there is no limit.
        top_p_L1: Infinity where there is no limit.
        nucleus: Whether any row has a top_p and no top_k.
        num_candidates: C, no less than any top_k.
        top_rows: Rows whose likeliest tokens are wanted, with their number.
        penalised_rows: Indices of the rows with a repetition penalty other than 1 (P of them).
        penalty_P1: Theirs.
    """

    random_rows: tuple[int, ...]
    random_S: Tensor
    greedy: bool
    tempered: bool
    temperature_S1: Tensor
    limited_L: Tensor | None
    top_k_L1: Tensor
    top_p_L1: Tensor
    nucleus: bool
    num_candidates: int
    top_rows: tuple[tuple[int, int], ...]
    penalised_rows: tuple[int, ...]
    penalty_P1: Tensor

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        vocab_size: int,
        device: torch.device,
        num_top: Sequence[int] = (),
    ) -> "DrawRules":
        """The rules of the rows, in their order.

        Args:
            params: How to draw each.
            vocab_size: Of the logits.
            device: Theirs.
            num_top: How many of the likeliest tokens each wants to know; empty means none.
        """
        rows = tuple(i for i, p in enumerate(params) if p.temperature > 0)
        random = [params[i] for i in rows]
        limited = [i for i, p in enumerate(random) if 0 < p.top_k < vocab_size or p.top_p < 1]
        top_k = [k if 0 < (k := random[i].top_k) < vocab_size else vocab_size for i in limited]
        top_p = [p if (p := random[i].top_p) < 1 else float("inf") for i in limited]
        largest_k = max((k for k in top_k if k < vocab_size), default=1)
        nucleus = vocab_size in top_k
        candidates = max(largest_k, _CANDIDATES) if nucleus else largest_k
        all_random, all_limited = len(rows) == len(params), len(limited) == len(random)
        penalised = tuple(i for i, p in enumerate(params) if p.repetition_penalty != 1)
        return cls(
            random_rows=rows,
            random_S=torch.tensor(rows, dtype=torch.int64, device=device),
            greedy=not all_random,
            tempered=any(p.temperature != 1 for p in random),
            temperature_S1=_column(
                [max(p.temperature, _LEAST_TEMPERATURE) for p in random], torch.float32, device
            ),
            limited_L=None if all_limited else torch.tensor(limited, device=device).long(),
            top_k_L1=_column(top_k, torch.int64, device),
            top_p_L1=_column(top_p, torch.float32, device),
            nucleus=nucleus,
            num_candidates=min(vocab_size, candidates),
            top_rows=tuple((row, number) for row, number in enumerate(num_top) if number),
            penalised_rows=penalised,
            penalty_P1=_column(
                [params[i].repetition_penalty for i in penalised], torch.float32, device
            ),
        )


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(-1)


class Draws(NamedTuple):
    """What N rows got.

    Attributes:
        tokens: One each.
        logprobs: Their log softmax under the logits as they are (temperature 1, no top_k, no
            top_p); NaN for a row whose logits are not finite.
        top: By row, where they are wanted, the likeliest tokens and their logprobs.
    """

    tokens: list[int]
    logprobs: list[float]
    top: dict[int, tuple[Int32Array, Float32Array]]


def draw(
    logits_NV: Tensor,
    rules: DrawRules,
    numbers: Sequence[float],
    seen_PV: Tensor | None = None,
) -> Draws:
    """Draw a token for each row.

    Args:
        logits_NV: float32; overwritten, since vocabularies are large.
        rules: Of these N rows.
        numbers: Random numbers in [0, 1), one for each of ``rules.random_rows``.
        seen_PV: For each of ``rules.penalised_rows``, whether a token occurred before; needed
            where there are any.
    """
    penalised_PV: Tensor | None = None
    if rules.penalised_rows:
        if seen_PV is None:
            raise ValueError("a repetition penalty needs to know the tokens before")
        penalised_PV = _penalised(logits_NV[list(rules.penalised_rows)], rules.penalty_P1, seen_PV)
    if rules.greedy:
        # Of equal logits, max names the first; it is several times faster than argmax.
        largest_N, tokens_N = logits_NV.max(dim=-1)
    else:
        largest_N, tokens_N = logits_NV.amax(dim=-1), None
    shifted_NV = logits_NV.sub_(largest_N.unsqueeze(-1))
    weights_NV = shifted_NV.exp()
    log_total_N = weights_NV.sum(dim=-1).log()
    drawn_NV = shifted_NV
    if penalised_PV is not None:
        # What is drawn from; the logprobs stay those of the logits as they were.
        rows_P = torch.tensor(rules.penalised_rows, device=logits_NV.device)
        largest_P1, likeliest_P1 = penalised_PV.max(dim=-1, keepdim=True)
        drawn_NV = shifted_NV.index_copy(0, rows_P, penalised_PV - largest_P1)
        weights_NV = drawn_NV.exp()
        if tokens_N is not None:
            tokens_N[rows_P] = likeliest_P1.squeeze(-1)
    if tokens_N is None:
        tokens_N = _draw_at_random(drawn_NV, weights_NV, rules, numbers)
    elif rules.random_rows:
        chosen = rules.random_S
        tokens_N[chosen] = _draw_at_random(drawn_NV[chosen], weights_NV[chosen], rules, numbers)
    logprobs_N = shifted_NV.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1) - log_total_N
    tokens: list[int] = cast("Any", tokens_N).tolist()  # torch leaves tolist untyped
    logprobs: list[float] = cast("Any", logprobs_N).tolist()
    top = _top(shifted_NV, log_total_N, rules.top_rows) if rules.top_rows else {}
    return Draws(tokens, logprobs, top)


def _penalised(logits_PV: Tensor, penalty_P1: Tensor, seen_PV: Tensor) -> Tensor:
    changed_PV = torch.where(logits_PV > 0, logits_PV / penalty_P1, logits_PV * penalty_P1)
    return torch.where(seen_PV, changed_PV, logits_PV)


def draw_many(logits_NV: Tensor, temperature: float, numbers_NK: NDArray[np.float64]) -> Tensor:
    """Draw K tokens (N, K) from each row, independently, at a temperature and nothing else."""
    if temperature == 0:
        return logits_NV.max(dim=-1, keepdim=True).indices.expand(numbers_NK.shape)
    weights_NV = logits_NV - logits_NV.amax(dim=-1, keepdim=True)
    weights_NV.div_(max(temperature, _LEAST_TEMPERATURE)).exp_()
    return invert_cdf(weights_NV, torch.as_tensor(numbers_NK).to(weights_NV.device))


def likeliest(logits_NV: Tensor, number: int) -> Tensor:
    """The ``number`` likeliest tokens (N, number) of each row; of equal logits the lower id first.

    ``topk`` by itself says nothing about equals, of which bfloat16 makes many. So it gets keys of
    which no two are equal: the logit's bits as an integer that grows with it, then the token.
    """
    # Adding 0 makes the two zeros one. Negative floats grow downwards in their lower 31 bits.
    bits_NV = (logits_NV + 0.0).view(torch.int32)
    keys_NV = (bits_NV ^ ((bits_NV >> 31) & 0x7FFFFFFF)).long() << 32
    vocab_size = logits_NV.shape[-1]
    keys_NV |= torch.arange(vocab_size - 1, -1, -1, device=logits_NV.device)
    return keys_NV.topk(number, dim=-1).indices


def _top(
    shifted_NV: Tensor, log_total_N: Tensor, top_rows: Sequence[tuple[int, int]]
) -> dict[int, tuple[Int32Array, Float32Array]]:
    wanted = torch.tensor([row for row, _ in top_rows], device=shifted_NV.device)
    shifted_PV = shifted_NV[wanted]
    most, size = max(k for _, k in top_rows), max(1, _LOGITS_PER_PIECE // shifted_PV.shape[-1])
    pieces = [shifted_PV[at : at + size] for at in range(0, len(top_rows), size)]
    tokens_PK = torch.cat([likeliest(piece_PV, most) for piece_PV in pieces])
    logprobs_PK = shifted_PV.gather(-1, tokens_PK) - log_total_N[wanted].unsqueeze(-1)
    tokens: Int32Array = tokens_PK.to("cpu", torch.int32).numpy()
    logprobs: Float32Array = logprobs_PK.cpu().numpy()
    return {
        row: (tokens[place, :number], logprobs[place, :number])
        for place, (row, number) in enumerate(top_rows)
    }


def _draw_at_random(
    shifted_SV: Tensor, weights_SV: Tensor, rules: DrawRules, numbers: Sequence[float]
) -> Tensor:
    if rules.tempered:
        # Shifted logits are at most 0, so that tiny temperatures cannot overflow.
        weights_SV = shifted_SV.div(rules.temperature_S1).exp_()
    if rules.limited_L is None:
        weights_SV = weights_SV * _kept(shifted_SV, weights_SV, rules)
    elif rules.limited_L.numel():
        chosen = rules.limited_L
        weights_LV = weights_SV[chosen]
        kept_LV = _kept(shifted_SV[chosen], weights_LV, rules)
        weights_SV = weights_SV.index_copy(0, chosen, weights_LV * kept_LV)
    uniform_S1 = torch.tensor(list(numbers), device=weights_SV.device).unsqueeze(-1)
    return invert_cdf(weights_SV, uniform_S1).squeeze(-1)


def invert_cdf(weights_SV: Tensor, uniform_SK: Tensor) -> Tensor:
    """The first tokens (S, K) at which cumulated weights exceed ``uniform`` times their sum.

    Weights need not be normalised. A token of weight zero is never returned.
    """
    # The sum is the last cumulated weight, not sum(), which may split a long row between threads
    # and so depend on how many rows there are.
    cdf_SV = weights_SV.cumsum(dim=-1)
    total_S1 = cdf_SV[:, -1:]
    # Rounding could carry uniform * total up to the total, which no token exceeds.
    below_S1 = torch.nextafter(total_S1, torch.zeros_like(total_S1))
    wanted_SK = torch.minimum(uniform_SK.to(cdf_SV.dtype) * total_S1, below_S1)
    token_SK = torch.searchsorted(cdf_SV, wanted_SK, right=True)
    token_SK.clamp_(max=cdf_SV.shape[-1] - 1)  # rows of NaN, whose caller sees the NaN
    if weights_SV.is_cuda:
        # A parallel scan may fall by a rounding error, which could let a weight of zero through.
        likeliest_S1 = weights_SV.argmax(dim=-1, keepdim=True)
        token_SK = torch.where(weights_SV.gather(-1, token_SK) > 0, token_SK, likeliest_S1)
    return token_SK


def _kept(logits_LV: Tensor, weights_LV: Tensor, rules: DrawRules) -> Tensor:
    """Which tokens top_k and then top_p leave; among equal logits the lower token id goes first."""
    top_k_L1, top_p_L1, width = rules.top_k_L1, rules.top_p_L1, rules.num_candidates
    # What all tokens weigh matters only to a top_p without a top_k.
    total_L1 = weights_LV.cumsum(dim=-1)[:, -1:] if rules.nucleus else torch.ones_like(top_p_L1)
    threshold_L1, count_L1, enough_L = _cut(
        logits_LV, weights_LV, total_L1, top_k_L1, top_p_L1, width
    )
    if not bool(enough_L.all()):
        rows = (~enough_L).nonzero().squeeze(-1)
        threshold_L1[rows], count_L1[rows], _ = _cut(
            logits_LV[rows],
            weights_LV[rows],
            total_L1[rows],
            top_k_L1[rows],
            top_p_L1[rows],
            logits_LV.shape[-1],
        )
    kept_LV = logits_LV >= threshold_L1
    rows = (kept_LV.sum(dim=-1, keepdim=True) > count_L1).squeeze(-1).nonzero().squeeze(-1)
    if rows.numel():
        equal_LV = logits_LV[rows] == threshold_L1[rows]
        above_LV = kept_LV[rows] & ~equal_LV
        equal_to_keep_L1 = count_L1[rows] - above_LV.sum(dim=-1, keepdim=True)
        kept_LV[rows] = above_LV | (equal_LV & (equal_LV.cumsum(dim=-1) <= equal_to_keep_L1))
    return kept_LV


def _cut(
    logits_LV: Tensor,
    weights_LV: Tensor,
    total_L1: Tensor,
    top_k_L1: Tensor,
    top_p_L1: Tensor,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """How far down the list of likeliest tokens to go, looking at the first ``width``.

    Returns:
        The lowest logit that is kept (L, 1), how many tokens are kept (L, 1), and for which rows
        (L,) ``width`` was enough to tell. All of them depend on the sorted values alone, not on
        the order in which ``topk`` lists equal ones.
    """
    values_LC, tokens_LC = logits_LV.topk(width, dim=-1)
    reached_LC = weights_LV.gather(-1, tokens_LC).cumsum(dim=-1)
    limit_L1 = top_k_L1.clamp(max=width)
    # top_p is a share of what top_k leaves, and of everything where there is no top_k.
    left_L1 = reached_LC.gather(-1, limit_L1 - 1)
    left_L1 = torch.where(top_k_L1 < logits_LV.shape[-1], left_L1, total_L1)
    short_LC = reached_LC < top_p_L1 * left_L1
    count_L1 = torch.minimum(short_LC.sum(dim=-1, keepdim=True) + 1, limit_L1)
    enough_L = (top_k_L1 <= width).squeeze(-1) | ~short_LC[:, -1]
    return values_LC.gather(-1, count_L1 - 1), count_L1, enough_L
