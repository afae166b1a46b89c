"""Logprobs of a prompt's tokens, in pieces: logits of all positions are never there at once.

Shapes: N positions, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from twinkle_dask.model.base import HeadProjection
from twinkle_dask.model.lora import BatchPlan
from twinkle_dask.types import Float32Array

_LOGITS_PER_PIECE = 8 * 2**20  # 32 MiB of float32


def score(
    head: HeadProjection, hidden_ND: Tensor, targets: Sequence[int], plan: BatchPlan
) -> Float32Array:
    """Log softmax, float32 (N,), of the token that follows each position.

    Args:
        head: The base model's.
        hidden_ND: Of consecutive positions of one row.
        targets: N token ids.
        plan: The adapter of this one row.
    """
    targets_N = torch.tensor(targets, dtype=torch.int64, device=hidden_ND.device)
    size = max(1, _LOGITS_PER_PIECE // head.weight_VD.shape[0])
    pieces: list[Tensor] = []
    for start in range(0, len(targets), size):
        here = slice(start, start + size)
        logits_NV = head.logits(hidden_ND[here].unsqueeze(0), plan)[0]
        wanted_N = logits_NV.gather(-1, targets_N[here].unsqueeze(-1)).squeeze(-1)
        pieces.append(wanted_N - logits_NV.logsumexp(dim=-1))
    scores: Float32Array = torch.cat(pieces).cpu().numpy()
    return scores
