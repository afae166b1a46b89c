"""AdamW on one run's flat buffers, with the arithmetic of ``torch.optim.AdamW``.

An adapter's tensors lie one after another in one buffer, so a step is a few calls over contiguous
memory however many layers the model has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from twinkle_dask.trainer import pages
from twinkle_dask.types import AdamParams

# Weights are updated a piece at a time, so that what the update changed can be measured without
# a second copy of all weights, and while the piece is still in the cache. The CPU kernel wants
# pieces of whole vectors, lest the last weights of a piece be rounded by other instructions.
# Cost: 2.8 million weights, not in the cache, on one core of a Xeon take 3.2 ms in one call and
# no measuring, 6.9 ms so; with a copy of all weights it would be more.
_PIECE_ON_CPU = 1 << 16  # for each thread
_PIECE = 1 << 23

# What torch.optim.AdamW(fused=True) ends in: one pass over memory instead of nine. The function
# that torch documents takes 0.1 ms to get there, which is much for each piece.
_fused_adamw: Callable[..., None] = torch.ops.aten._fused_adamw_.default  # pyright: ignore[reportUnknownMemberType, reportPrivateUsage]


@dataclass(slots=True)
class Moments:
    """AdamW's memory; float32 of the weights' shape.

    Attributes:
        step: Steps taken.
    """

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def fresh(cls, weights: Tensor) -> "Moments":
        """Moments before the first step."""
        return cls(0, *(pages.zeros(len(weights), weights.device) for _ in range(2)))


@dataclass(frozen=True, slots=True)
class StepNorms:
    """L2 norms over all weights: of what a step changed, and of what came out."""

    update: float
    weight: float


def norm(flat: Tensor, of: float = 2.0) -> Tensor:
    """L2 norm or another, at least the first, float32, on the device."""
    if of in (1.0, 2.0, inf):
        return torch.linalg.vector_norm(flat, of)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    # High powers soon leave what floats can hold, so those of shares of the largest are summed.
    largest = flat.abs().max().clamp(min=torch.finfo(flat.dtype).tiny)
    return torch.linalg.vector_norm(flat / largest, of) * largest  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def clip_scale(grad_norm: float, max_norm: float) -> float:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies the gradient with; 0 means no clipping.

    Args:
        grad_norm: A float32 number; what follows is rounded to float32 as there.
        max_norm: As ``AdamParams.grad_clip_norm``.
    """
    if max_norm <= 0:
        return 1.0
    return float((max_norm / (torch.tensor(grad_norm) + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def adamw_step(weights: Tensor, gradient: Tensor, moments: Moments, adam: AdamParams) -> StepNorms:
    """Take one step in place: decoupled weight decay, bias correction, eps outside the root.

    Args:
        weights: float32, as are all the tensors here; one flat shape for all of them.
        gradient: Already clipped.
        moments: Advanced by one step.
        adam: Settings of this step alone.
    """
    moments.step += 1
    on_cpu = weights.device.type == "cpu"
    size = _PIECE_ON_CPU * torch.get_num_threads() if on_cpu else _PIECE
    before = torch.empty_like(weights[:size])
    step = torch.tensor(float(moments.step), device=weights.device)
    squares: list[Tensor] = []
    buffers = (weights, gradient, moments.exp_avg, moments.exp_avg_sq)
    for new, grad, exp_avg, exp_avg_sq in zip(
        *(torch.split(b, size) for b in buffers), strict=True
    ):
        old = before[: len(new)].copy_(new)
        _fused_adamw(
            [new],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step],
            amsgrad=False,
            lr=adam.learning_rate,
            beta1=adam.beta1,
            beta2=adam.beta2,
            weight_decay=adam.weight_decay,
            eps=adam.eps,
            maximize=False,
        )
        change = old.sub_(new)
        squares += [torch.dot(change, change), torch.dot(new, new)]
    sums = torch.stack(squares).view(-1, 2).double().sum(0).sqrt()
    return StepNorms(update=float(sums[0]), weight=float(sums[1]))
