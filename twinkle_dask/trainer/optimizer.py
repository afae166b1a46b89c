"""AdamW on one run's flat buffers, with the arithmetic of ``torch.optim.AdamW``.

An adapter's tensors lie one after another in one buffer, so a step is a few calls over contiguous
memory however many layers the model has.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from twinkle_dask.types import AdamParams


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
        return cls(0, torch.zeros_like(weights), torch.zeros_like(weights))


def clip_scale(grad_norm: float, max_norm: float) -> float:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies the gradient with; 0 means no clipping."""
    return min(1.0, max_norm / (grad_norm + 1e-6)) if max_norm > 0 else 1.0


@torch.no_grad()
def adamw_step(weights: Tensor, gradient: Tensor, moments: Moments, adam: AdamParams) -> None:
    """Take one step in place: decoupled weight decay, bias correction, eps outside the root.

    Args:
        weights: float32, as are all the tensors here; one shape for all of them.
        gradient: Already clipped.
        moments: Advanced by one step.
        adam: Settings of this step alone.
    """
    adamw(
        [weights],
        [gradient],
        [moments.exp_avg],
        [moments.exp_avg_sq],
        [],
        [torch.tensor(float(moments.step), device=weights.device)],
        fused=True,  # One pass over memory instead of nine.
        amsgrad=False,
        beta1=adam.beta1,
        beta2=adam.beta2,
        lr=adam.learning_rate,
        weight_decay=adam.weight_decay,
        eps=adam.eps,
        maximize=False,
    )
    moments.step += 1
