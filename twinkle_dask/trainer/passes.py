"""One pass over the base model: rows of many runs forward, and backward if they learn."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from twinkle_dask.model.base import BaseModel
from twinkle_dask.trainer.batch import Batch, Part
from twinkle_dask.trainer.head import score
from twinkle_dask.types import Float32Array


def run_pass(
    base: BaseModel, parts: Sequence[Part], *, chunk_bytes: int, block_bytes: int
) -> list[list[tuple[Float32Array, float]]]:
    """Forward, losses, and backward into the parts' ``grads``.

    Raises:
        InvalidRequest: A row is not what the model can read. Whatever is raised, ``grads`` may have
            been added to in part.

    Returns:
        For each part and datum: logprobs of the shape of its targets, and its summed loss, which
        may be infinite or NaN.
    """
    backward = any(part.grads is not None for part in parts)
    batch = Batch.of(parts, base.facts.vocab_size, base.device)
    with torch.set_grad_enabled(backward):
        hidden_BLD = base.hidden(batch.tokens_BL, batch.plan)
    flat_D = hidden_BLD.detach().flatten(0, 1)
    scored = score(
        base.head,
        flat_D if batch.place_P is None else flat_D[batch.place_P],
        batch.targets,
        batch.segments,
        batch.loss,
        backward=backward,
        chunk_bytes=chunk_bytes,
        block_bytes=block_bytes,
    )
    if scored.grad_PD is not None:
        grad_D = scored.grad_PD
        if batch.place_P is not None:
            grad_D = torch.zeros_like(flat_D).index_copy_(0, batch.place_P, grad_D)
        _backward(hidden_BLD, grad_D.view_as(hidden_BLD))
    host = torch.stack((scored.logprobs_T, scored.values_T)).cpu().numpy()
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is for the caller to judge
        return _per_datum(parts, *host)


def _backward(hidden_BLD: Tensor, grad_BLD: Tensor) -> None:
    hidden_BLD.backward(grad_BLD)  # pyright: ignore[reportUnknownMemberType]


def _per_datum(
    parts: Sequence[Part], logprobs_T: Float32Array, values_T: Float32Array
) -> list[list[tuple[Float32Array, float]]]:
    results: list[list[tuple[Float32Array, float]]] = []
    start = 0
    for part in parts:
        results.append([])
        for datum in part.data:
            here = slice(start, start := start + datum.target_tokens.size)
            logprobs = logprobs_T[here].reshape(datum.target_tokens.shape).copy()
            results[-1].append((logprobs, float(values_T[here].sum(dtype=np.float64))))
    return results
