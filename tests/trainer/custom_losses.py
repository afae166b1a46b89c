"""Losses as clients write them, traced and sent by the SDK's own code."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from tinker.lib.public_interfaces import (  # pyright: ignore[reportMissingTypeStubs]
    custom_loss as sdk,
)
from torch import Tensor

from twinkle_dask.custom_losses import Node, checked_graph
from twinkle_dask.types import CustomLoss

Returned = tuple[Tensor, Mapping[str, Tensor]]
LossFunction = Callable[..., Returned]

_sdk: Any = sdk


def handle_of(function: LossFunction, ranks: Mapping[str, int]) -> Any:
    """What the SDK evaluates on the client's side."""
    return _sdk.trace_loss(function, ranks, "session")


def nodes_of(handle: Any) -> list[Node]:
    """What the SDK sends."""
    return [Node(**node.model_dump()) for node in _sdk.encode_graph(handle).nodes]


def custom(function: LossFunction, ranks: Mapping[str, int]) -> CustomLoss:
    """The loss as a batch carries it."""
    graph = checked_graph(list(ranks.items()), nodes_of(handle_of(function, ranks)))
    return CustomLoss(id="loss", name=function.__name__, ranks=ranks, graph=graph)


def weighted(logprobs: Tensor, weights: Tensor) -> Returned:
    loss = -(logprobs * weights).sum()
    return loss, {"custom/neg_ll:sum": loss, "custom/mean_lp:mean": logprobs.mean()}


def clipped(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Returned:
    """PPO, and how often it clips."""
    ratio = torch.exp(logprobs - old)
    limited = torch.clamp(ratio, min=0.8, max=1.2)
    loss = -(torch.minimum(ratio * advantages, limited * advantages) * mask).sum()
    outside = ((ratio < 0.8) | (ratio > 1.2)).float() * mask
    return loss, {"custom/clip_fraction:mean": outside.sum() / mask.sum().clamp(min=1.0)}


def marked(logprobs: Tensor, mask: Tensor) -> Returned:
    """Only what a mask picks, which has a shape that nobody knows before."""
    chosen = logprobs[mask > 0]
    return chosen.square().mean(), {"custom/chosen:sum": (mask > 0).sum()}


def pairwise(logprobs: Tensor, scores: Tensor) -> Returned:
    """A ranking of all pairs: T x T."""
    better = (scores[:, None] > scores[None, :]).to(torch.float32)
    margins = logprobs.unsqueeze(1) - logprobs.unsqueeze(0)
    return (F.softplus(-margins) * better).sum() / logprobs.shape[0], {}


def sequence(logprobs: Tensor, old: Tensor, advantage: Tensor) -> Returned:
    """A ratio of the whole sequence, and a scalar input."""
    log_ratio = (logprobs - old).sum() / logprobs.size(0)
    loss = -advantage * F.logsigmoid(2.5 * log_ratio)
    return loss, {"custom/ratio:mean": log_ratio.exp().detach()}


def distribution(logprobs: Tensor, teacher: Tensor) -> Returned:
    """(T, K) targets: a divergence over the K, with shapes of all kinds."""
    student = torch.log_softmax(logprobs, dim=-1)
    wanted = F.softmax(teacher, dim=1)
    terms = (wanted * (torch.log(wanted + 1e-6) - student)).sum(dim=-1, keepdim=True)
    best = teacher.max(dim=-1)[0] - teacher.min(-1)[0]
    weights = torch.where(best > 1.0, best, torch.ones_like(best)).reshape(-1, 1)
    return (terms * weights).mean(), {"custom/kl:mean": terms.mean(), "custom/n:sum": best.sum()}


def positions(logprobs: Tensor, labels: Tensor) -> Returned:
    """Integers, ranges, gathering, joining, dividing, and Python's numbers."""
    length = logprobs.shape[0]
    decay = torch.pow(0.9, torch.arange(length, dtype=torch.float32))
    halves = torch.cat([logprobs[: length // 2] * 2, logprobs[length // 2 :]])
    turned = torch.gather(halves, 0, labels % length)
    both = torch.stack([turned, logprobs.flip(0)], dim=1)
    smooth = both.std(dim=0, unbiased=False).sum() + cast(Any, both).norm()
    return (both.mean(1) * decay).sum() + smooth, {"custom/last:sum": logprobs[-1]}


Case = tuple[LossFunction, Mapping[str, int]]
CASES: Sequence[Case] = (
    (weighted, {"logprobs": 1, "weights": 1}),
    (clipped, {"logprobs": 1, "old": 1, "advantages": 1, "mask": 1}),
    (marked, {"logprobs": 1, "mask": 1}),
    (pairwise, {"logprobs": 1, "scores": 1}),
    (sequence, {"logprobs": 1, "old": 1, "advantage": 0}),
    (distribution, {"logprobs": 2, "teacher": 2}),
    (positions, {"logprobs": 1, "labels": 1}),
)


def inputs_for(ranks: Mapping[str, int], length: int, seed: int) -> list[Tensor]:
    """Values that these losses make sense of."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[int, tuple[int, ...]] = {0: (), 1: (length,), 2: (length, 3)}
    values: list[Tensor] = []
    for name, rank in ranks.items():
        value = torch.randn(shapes[rank], generator=generator)
        match name:
            case "logprobs" | "old":
                value = -5 + value / 3
            case "mask":
                value = (value > -0.5).float().index_fill(0, torch.tensor([0]), 1.0)
            case "labels":
                value = torch.randint(0, 100, shapes[rank], generator=generator)
            case _:
                pass
        values.append(value)
    return values
