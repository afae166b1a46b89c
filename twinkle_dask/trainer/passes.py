"""One pass over the base model: rows of many runs forward, and backward if they learn.

The rows are cut into slices of about equal work, one for each compute lane, and the slices are
computed in parallel; each has gradient buffers of its own, which are added up in the end, in order.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinkle_dask.model.base import BaseModel
from twinkle_dask.trainer.batch import Batch, Part
from twinkle_dask.trainer.embedding import Embeddings
from twinkle_dask.trainer.gradient import PassGradient
from twinkle_dask.trainer.head import LossOfPart, Scored, score
from twinkle_dask.trainer.lanes import NUMBERS_FOR_LANES, Lanes
from twinkle_dask.trainer.mixed_loss import MixedLoss, OfDatum
from twinkle_dask.types import Float32Array

_NOTHING: Float32Array = np.empty(0, np.float32)


class Result(NamedTuple):
    """What a datum gave.

    Attributes:
        logprobs: Of the shape of its targets.
        loss: Summed over them; may be infinite or NaN.
        custom: What else a custom loss said; None for other losses.
        correct: Where the likeliest token is the target, of the shape of the targets, if asked for.
        embedding: Of a row that is embedded, float32 (D,); the others are empty then.
    """

    logprobs: Float32Array
    loss: float
    custom: OfDatum | None = None
    correct: NDArray[np.bool_] | None = None
    embedding: Float32Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PassConfig:
    """How a pass is computed.

    Attributes:
        chunk_bytes: Bound of the logits of one chunk in the base model's dtype, for each lane.
        block_bytes: Bound of one block of logits in float32.
        checkpoint_tokens: Passes of more tokens compute each layer twice to keep less.
    """

    chunk_bytes: int
    block_bytes: int
    checkpoint_tokens: int


def run_pass(
    base: BaseModel, parts: Sequence[Part], lanes: Lanes, config: PassConfig
) -> list[list[Result]]:
    """Forward, losses, and backward, which is added to the parts' ``gradient`` at the very end.

    Raises:
        InvalidRequest: A row is not what the model can read. Whatever is raised, the parts'
            gradients are of no use then: some may have been added to.

    Returns:
        For each part and datum, what it gave.
    """
    rows = [(i, row) for i, part in enumerate(parts) for row in range(len(part.data))]
    lengths = [len(parts[i].data[row].tokens) for i, row in rows]
    # In this thread: the same for every slice, however the rows are cut.
    looks: dict[bytes, Tensor] = {}
    for part in parts:
        looks |= base.look([datum.images for datum in part.data], part.owner)
    shares = [_share(parts, [rows[i] for i in cut]) for cut in lanes.cut(lengths)]
    with ExitStack() as stack:
        if sum(lengths) > config.checkpoint_tokens and base.can_checkpoint:
            stack.enter_context(base.checkpointing())
        done = lanes.run(
            [(_slice, base, [s.part for s in share], looks, config) for share in shares]
        )
    results: list[dict[int, Result]] = [{} for _ in parts]
    found: list[list[PassGradient]] = [[] for _ in parts]
    for share, (of_share, gradients) in zip(shares, done, strict=True):
        for some, of_rows, gradient in zip(share, of_share, gradients, strict=True):
            results[some.index].update(zip(some.rows, of_rows, strict=True))
            if gradient is not None:
                found[some.index].append(gradient)
    adding = [(part, own) for part, own in zip(parts, found, strict=True) if own]
    if sum(gradient.body.numel() for _, own in adding for gradient in own) >= NUMBERS_FOR_LANES:
        lanes.run([(_add, part, own) for part, own in adding])
    else:
        for part, own in adding:
            _add(part, own)
    return [[of_part[row] for row in range(len(of_part))] for of_part in results]


def _add(part: Part, found: Sequence[PassGradient]) -> None:
    for gradient in found:
        if part.gradient is not None:
            part.gradient.add(gradient)


@dataclass(frozen=True, slots=True, eq=False)
class _Some:
    """Some rows of the part at ``index``, as a part."""

    index: int
    rows: Sequence[int]
    part: Part


def _share(parts: Sequence[Part], rows: Sequence[tuple[int, int]]) -> list[_Some]:
    """Some rows, given as parts' and rows' indices, part by part."""
    chosen: dict[int, list[int]] = {}
    for i, row in rows:
        chosen.setdefault(i, []).append(row)
    return [_Some(i, of_part, parts[i].only(of_part)) for i, of_part in chosen.items()]


def _slice(
    base: BaseModel, parts: Sequence[Part], looks: Mapping[bytes, Tensor], config: PassConfig
) -> tuple[list[list[Result]], list[PassGradient | None]]:
    gradients = [
        None if part.gradient is None else part.gradient.of_pass(base.dtype) for part in parts
    ]
    backward = any(gradient is not None for gradient in gradients)
    grads = [None if gradient is None else gradient.views for gradient in gradients]
    batch = Batch.of(parts, grads, base, looks)
    layout = batch.layout
    with torch.set_grad_enabled(backward):
        if layout.rows is not None:
            hidden = base.hidden_packed(layout.tokens, layout.rows, batch.plan, layout.patches)
        else:
            hidden = base.hidden(layout.tokens, batch.plan, patches=layout.patches)
    flat_D = hidden.detach().reshape(-1, hidden.shape[-1])
    embeddings = None if batch.embedded is None else Embeddings.of(flat_D, batch.embedded)
    scored = None
    if batch.place_P is None or len(batch.place_P):
        scored = score(
            base.head,
            flat_D if batch.place_P is None else flat_D[batch.place_P],
            batch.targets,
            batch.segments,
            batch.loss,
            backward=backward,
            chunk_bytes=config.chunk_bytes,
            block_bytes=config.block_bytes,
        )
    if backward:
        grad_D = None if scored is None else scored.grad_PD
        if batch.place_P is not None and grad_D is not None:
            grad_D = torch.zeros_like(flat_D).index_copy_(0, batch.place_P, grad_D)
        if grad_D is None:
            grad_D = torch.zeros_like(flat_D)
        if embeddings is not None:
            embeddings.add_gradient(grad_D)
        _backward(hidden, grad_D.view_as(hidden))
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is for the caller to judge
        return _per_datum(parts, scored, embeddings), gradients


def _backward(hidden: Tensor, grad: Tensor) -> None:
    hidden.backward(grad)  # pyright: ignore[reportUnknownMemberType]


def _custom(loss: LossOfPart) -> Mapping[int, OfDatum]:
    return loss.custom if isinstance(loss, MixedLoss) else {}


def _per_datum(
    parts: Sequence[Part], scored: Scored | None, embeddings: Embeddings | None
) -> list[list[Result]]:
    results: list[list[Result]] = []
    rows = iter(()) if embeddings is None else iter(embeddings.on_host())
    host = _OnHost.of(scored)
    start = 0
    for part in parts:
        if part.loss is None:
            results.append([Result(_NOTHING, 0.0, embedding=next(rows)) for _ in part.data])
            continue
        results.append([])
        for datum in part.data:
            said = host.custom.get(start)
            here = slice(start, start := start + datum.target_tokens.size)
            logprobs = host.logprobs_T[here].reshape(datum.target_tokens.shape).copy()
            loss = float(host.values_T[here].sum(dtype=np.float64)) if said is None else said.loss
            correct = None
            if part.want_correct and host.correct_T is not None:
                correct = host.correct_T[here].reshape(datum.target_tokens.shape).copy()
            results[-1].append(Result(logprobs, loss, said, correct))
    return results


@dataclass(frozen=True, slots=True, eq=False)
class _OnHost:
    """What was scored, copied to the host."""

    logprobs_T: Float32Array
    values_T: Float32Array
    correct_T: NDArray[np.bool_] | None
    custom: Mapping[int, OfDatum]

    @classmethod
    def of(cls, scored: Scored | None) -> "_OnHost":
        if scored is None:
            return cls(_NOTHING, _NOTHING, None, {})
        both = torch.stack((scored.logprobs_T, scored.values_T)).cpu().numpy()
        correct = None if scored.correct_T is None else scored.correct_T.cpu().numpy()
        return cls(both[0], both[1], correct, _custom(scored.loss))
