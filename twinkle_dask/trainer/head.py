"""Output head and loss together, a chunk of positions at a time: full logits never exist.

For each chunk of C positions, with the adapters of ``segments`` on the head as elsewhere,

    logits_CV = hidden_CD @ W_VD.T + bias_V + scale * (hidden_CD @ A_RD.T) @ B_VR.T
    lp_T      = log_softmax(float32(logits_CV))[position_T, token_T]
    grad_CV   = sum_t slope_t * (onehot(token_t) - softmax(logits_CV)),  slope = d loss / d lp

and ``grad_CV`` goes back through the head at once. A temperature divides the logits before all of
that, and where raw scores are wanted lp is the logit itself, without the softmax.

The matrix products see a whole chunk; what is element by element in float32 is done in smaller
blocks that stay in the processor's cache, and ``grad_CV`` takes the memory of ``logits_CV``
(SmolLM2's head in bfloat16 on one core: 425 ms per 1024 positions without blocks, 220 ms with; the
two products alone are 175 ms).

Shapes: P positions, T target tokens (several may belong to one position), C positions of a chunk,
N of a block, M targets to know ahead, D hidden, V vocabulary, R rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from twinkle_dask.model.base import HeadProjection
from twinkle_dask.model.lora import BatchPlan, Segment, add_adapters
from twinkle_dask.trainer.losses import ValueAndSlope
from twinkle_dask.types import Int64Array

LossOfPart: TypeAlias = Callable[[slice, Tensor], ValueAndSlope]
"""Given a range of T and its logprobs: each token's loss, and its derivative by the logprob."""


@runtime_checkable
class LooksAhead(Protocol):
    """A loss whose slopes need some logprobs before any slope is asked for (GSPO, custom losses).

    Positions are taken a chunk at a time, so these few are scored twice: first forward only, then
    with everything else.
    """

    @property
    def ahead_M(self) -> Int64Array:
        """Indices of T, increasing; may be empty."""
        ...

    def __call__(self, part: slice, lp_T: Tensor, /) -> ValueAndSlope:
        """As ``LossOfPart``."""
        ...

    def knowing(self, lp_M: Tensor, *, backward: bool) -> LossOfPart:
        """The loss to go on with, once the logprobs of ``ahead_M`` are known.

        Called once, with ``backward`` as given to ``score``.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What is predicted where.

    Attributes:
        token_T: int64, on the device.
        position_T: int64, not decreasing, on the device.
        first: Index of each position's first target, and T at the end; int64 (P + 1,), on the host.
        temperature_P: Float32, what logits are divided by; None if that is 1 everywhere.
        raw_P: Where the scores are logits; None if nowhere.
        judged_P: Where to tell whether the target is the likeliest token; None if nowhere.
    """

    token_T: Tensor
    position_T: Tensor
    first: Int64Array
    temperature_P: Tensor | None = None
    raw_P: Tensor | None = None
    judged_P: Tensor | None = None

    @property
    def one_each(self) -> bool:
        """Whether T is P."""
        return len(self.token_T) == len(self.first) - 1

    def at(self, index_M: Tensor, place_M: Tensor, first: Int64Array, chosen: Tensor) -> "Targets":
        """Some targets alone, at the ``chosen`` positions; nothing is judged.

        Args:
            index_M: Their indices in T.
            place_M: The place of each one's position among the chosen ones.
            first: As above, of what is left.
            chosen: Indices of positions, increasing.
        """
        temperature = None if self.temperature_P is None else self.temperature_P[chosen]
        raw = None if self.raw_P is None else self.raw_P[chosen]
        return Targets(self.token_T[index_M], place_M, first, temperature, raw)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What came out.

    Attributes:
        logprobs_T: float32; log softmax of the logits at the targets, or the logits themselves.
        values_T: float32; each token's loss.
        grad_PD: Derivative of the summed loss by the hidden states, in their dtype, or None.
        loss: What gave the values; knows what it looked ahead for.
        correct_T: Whether a judged target is the likeliest token, the first of several; False where
            nothing is judged, None if that is everywhere.
    """

    logprobs_T: Tensor
    values_T: Tensor
    grad_PD: Tensor | None
    loss: LossOfPart
    correct_T: Tensor | None = None


@torch.no_grad()
def score(
    head: HeadProjection,
    hidden_PD: Tensor,
    targets: Targets,
    segments: Sequence[Segment],
    loss: LossOfPart,
    *,
    backward: bool,
    chunk_bytes: int,
    block_bytes: int,
) -> Scored:
    """Logprobs and losses of all targets, and with ``backward`` the gradients.

    Positions whose slopes are all exactly 0 (mostly prompts) take no part in backward products. If
    the loss ``LooksAhead``, what it needs to know is scored before.

    Args:
        head: The output head.
        hidden_PD: Final hidden states of the positions, in the base model's dtype.
        targets: What to look up; every position has at least one.
        segments: ``rows`` are slices of positions, in order. The head's gradients are added to
            ``grads`` if the adapter adapts the head.
        loss: Called once for each part of T, in order.
        backward: Whether to compute gradients.
        chunk_bytes: Bound of one chunk's logits in the base model's dtype.
        block_bytes: Bound of one block's logits in float32.
    """
    if isinstance(loss, LooksAhead) and len(ahead_M := loss.ahead_M):
        first = _only(ahead_M, head, hidden_PD, targets, segments, chunk_bytes, block_bytes)
        loss = loss.knowing(first, backward=backward)
    vocab_size = head.weight_VD.shape[0]
    chunk = max(1, chunk_bytes // (vocab_size * hidden_PD.element_size()))
    block = max(1, block_bytes // (vocab_size * 4))
    logprobs_T = hidden_PD.new_empty(len(targets.token_T), dtype=torch.float32)
    grad_PD = torch.zeros_like(hidden_PD) if backward else None
    correct_T = None
    if targets.judged_P is not None:
        correct_T = torch.zeros_like(logprobs_T, dtype=torch.bool)
    scored = Scored(logprobs_T, torch.empty_like(logprobs_T), grad_PD, loss, correct_T)
    for start in range(0, len(hidden_PD), chunk):
        hidden_CD = hidden_PD[start : start + chunk]
        local = _within(segments, start, start + len(hidden_CD))
        logits_CV = functional.linear(hidden_CD, head.weight_VD, head.bias_V)
        add_adapters(hidden_CD, logits_CV, head.path, BatchPlan(tuple(local)))
        live_C = _losses(logits_CV, start, block, targets, loss, scored)
        live = int(live_C.sum())
        if grad_PD is None or not live:
            continue
        if live == len(hidden_CD):
            grad_PD[start : start + live] = _through_head(head, hidden_CD, logits_CV, local)
        else:
            near = _of_live(local, live_C.cpu().numpy())
            grad_ND = _through_head(head, hidden_CD[live_C], logits_CV[:live], near)
            grad_PD[start : start + len(hidden_CD)][live_C] = grad_ND
    return scored


def _only(
    ahead_M: Int64Array,
    head: HeadProjection,
    hidden_PD: Tensor,
    targets: Targets,
    segments: Sequence[Segment],
    chunk_bytes: int,
    block_bytes: int,
) -> Tensor:
    """Logprobs of these targets alone; the other positions are left out of the products."""
    position_M = np.searchsorted(targets.first, ahead_M, side="right") - 1
    live_P = np.zeros(len(hidden_PD), np.bool_)
    live_P[position_M] = True
    position_P = np.flatnonzero(live_P)
    place_M = np.searchsorted(position_P, position_M)
    first = np.append(np.searchsorted(position_M, position_P), len(position_M))

    def there(array: Int64Array) -> Tensor:
        return torch.from_numpy(array).to(hidden_PD.device)  # pyright: ignore[reportUnknownMemberType]

    chosen = there(position_P)
    scored = score(
        head,
        hidden_PD[chosen],
        targets.at(there(ahead_M), there(place_M), first, chosen),
        _of_live(segments, live_P),
        lambda _, lp_T: (lp_T, lp_T),
        backward=False,
        chunk_bytes=chunk_bytes,
        block_bytes=block_bytes,
    )
    return scored.logprobs_T


def _losses(
    logits_CV: Tensor, start: int, block: int, targets: Targets, loss: LossOfPart, scored: Scored
) -> Tensor:
    """Fill in what is scored in the chunk at ``start``, block by block.

    Returns:
        Which positions are live: bool (C,), all False without backward. The derivatives by their
        logits stand at the front of ``logits_CV``, in order; the rest of it is spent.
    """
    vocab_size = logits_CV.shape[1]
    live_C = torch.zeros(len(logits_CV), dtype=torch.bool, device=logits_CV.device)
    written = 0
    room_NV = logits_CV.new_empty(min(block, len(logits_CV)), vocab_size, dtype=torch.float32)
    for row in range(0, len(logits_CV), block):
        rows, begin = min(block, len(logits_CV) - row), start + row
        # By hand and in one place: log_softmax takes each exponential, which is most of the cost,
        # and the gradient would take it again (512 x 49152, bfloat16, one core: 46 ms, here 31).
        exp_NV = room_NV[:rows].copy_(logits_CV[row : row + rows])
        here = slice(begin, begin + rows)
        if targets.temperature_P is not None:
            exp_NV.div_(targets.temperature_P[here, None])
        part = slice(int(targets.first[begin]), int(targets.first[begin + rows]))
        row_T = targets.position_T[part] - begin
        place_T = row_T * vocab_size + targets.token_T[part]  # in the flattened block
        top_N1 = exp_NV.amax(-1, keepdim=True)
        logit_T = exp_NV.view(-1)[place_T]
        below_T = logit_T - top_N1[row_T, 0]
        if targets.judged_P is not None and scored.correct_T is not None:
            scored.correct_T[part] = _correct(
                exp_NV, below_T, row_T, targets.token_T[part], targets.judged_P[here]
            )
        sum_N = exp_NV.sub_(top_N1).exp_().sum(-1)
        lp_T = below_T - sum_N.log()[row_T]
        if targets.raw_P is not None:
            lp_T = torch.where(targets.raw_P[here][row_T], logit_T, lp_T)
        scored.logprobs_T[part] = lp_T
        scored.values_T[part], slope_T = loss(part, lp_T)
        if scored.grad_PD is None:
            continue
        if targets.one_each:
            slope_N, live_N = slope_T, slope_T != 0
        else:
            slope_N = _sum_by_row(slope_T, row_T, rows)
            live_N = _sum_by_row((slope_T != 0).float(), row_T, rows) > 0
        if targets.raw_P is not None:  # a logit does not depend on the others
            slope_N = slope_N.masked_fill(targets.raw_P[here], 0)
        if targets.temperature_P is not None:
            slope_N = slope_N / targets.temperature_P[here]
            slope_T = slope_T / targets.temperature_P[here][row_T]
        if live := int(live_N.sum()):
            grad_NV = exp_NV.mul_((-slope_N / sum_N)[:, None])
            grad_NV.view(-1).index_add_(0, place_T, slope_T)
            # Never ahead of what was read: rows close ranks towards the front.
            logits_CV[written : written + live] = grad_NV if live == rows else grad_NV[live_N]
            live_C[row : row + rows] = live_N
            written += live
    return live_C


def _correct(
    logits_NV: Tensor, below_T: Tensor, row_T: Tensor, token_T: Tensor, judged_N: Tensor
) -> Tensor:
    """Whether targets are the likeliest tokens; looks again only where a target is at the top."""
    at_top_T = (below_T == 0) & judged_N[row_T]
    # Logits in bfloat16 are often equal; then it is the first, as for argmax.
    first_N = logits_NV[row_T[at_top_T]].argmax(-1)
    at_top_T[at_top_T.clone()] = first_N == token_T[at_top_T]
    return at_top_T


def _sum_by_row(value_T: Tensor, row_T: Tensor, num_rows: int) -> Tensor:
    return value_T.new_zeros(num_rows).index_add_(0, row_T, value_T)


def _through_head(
    head: HeadProjection, hidden_CD: Tensor, grad_CV: Tensor, segments: Sequence[Segment]
) -> Tensor:
    """Gradient of the hidden states; the head's adapters' gradients are added on the way."""
    grad_CD = grad_CV @ head.weight_VD
    for segment in segments:
        pair = segment.adapter.pair(head.path)
        if pair is None:
            continue
        a_RD, b_VR = pair
        scale = segment.adapter.scale
        part_CV = grad_CV[segment.rows]
        part_CD = hidden_CD[segment.rows]
        part_CR = part_CV @ b_VR
        if segment.dropout is None:
            grad_CD[segment.rows].addmm_(part_CR, a_RD, alpha=scale)
        else:
            back_CD = segment.dropout.applied(part_CR @ a_RD, head.path)
            grad_CD[segment.rows].add_(back_CD, alpha=scale)
            part_CD = segment.dropout.applied(part_CD, head.path)
        if segment.grads is not None:
            grad_a_RD = part_CR.T @ part_CD
            grad_b_VR = part_CV.T @ (part_CD @ a_RD.T)
            segment.grads[f"{head.path}.lora_A.weight"].add_(grad_a_RD, alpha=scale)
            segment.grads[f"{head.path}.lora_B.weight"].add_(grad_b_VR, alpha=scale)
    return grad_CD


def _bounds(segment: Segment) -> tuple[int, int]:
    if not isinstance(segment.rows, slice):
        raise TypeError("the head takes slices of positions")
    return segment.rows.start, segment.rows.stop


def _within(segments: Sequence[Segment], start: int, stop: int) -> list[Segment]:
    """The segments' parts in a chunk, counted from its start."""
    parts: list[Segment] = []
    for segment in segments:
        begin, end = _bounds(segment)
        if begin < stop and start < end:
            rows = slice(max(begin, start) - start, min(end, stop) - start)
            dropout = segment.dropout
            if dropout is not None:
                dropout = dropout.only(slice(max(begin, start) - begin, min(end, stop) - begin))
            parts.append(Segment(rows, segment.adapter, segment.grads, dropout))
    return parts


def _of_live(segments: Sequence[Segment], live_C: NDArray[np.bool_]) -> list[Segment]:
    """The same segments after all but the live positions are taken out."""
    before = np.pad(live_C.cumsum(), (1, 0))
    parts: list[Segment] = []
    for segment in segments:
        start, stop = _bounds(segment)
        begin, end = int(before[start]), int(before[stop])
        if begin < end:
            dropout = segment.dropout
            if dropout is not None:
                there = torch.from_numpy(np.flatnonzero(live_C[start:stop]))  # pyright: ignore[reportUnknownMemberType]
                dropout = dropout.only(there.to(dropout.keys_M.device))
            parts.append(Segment(slice(begin, end), segment.adapter, segment.grads, dropout))
    return parts
