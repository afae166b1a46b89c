"""Head and loss by chunks and blocks against full logits and autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinkle_dask.model.base import HeadProjection
from twinkle_dask.model.lora import LoraTensors, Segment
from twinkle_dask.trainer.head import Targets, score
from twinkle_dask.trainer.losses import ValueAndSlope
from twinkle_dask.types import LoraSpec

V, D = 50, 16


def adapter(rank: int, generator: torch.Generator) -> LoraTensors:
    master = {
        "lm_head.lora_A.weight": torch.randn(rank, D, generator=generator) / 4,
        "lm_head.lora_B.weight": torch.randn(V, rank, generator=generator) / 4,
    }
    return LoraTensors(LoraSpec(rank=rank, seed=0, alpha=4.0), master, dtype=torch.float32)


def targets_of(per_position: list[int], generator: torch.Generator) -> Targets:
    first = np.concatenate([[0], np.cumsum(per_position)]).astype(np.int64)
    position_T = torch.tensor(np.repeat(np.arange(len(per_position)), per_position))
    # Few tokens, so that a position often has the same target twice.
    token_T = torch.randint(0, 7, (len(position_T),), generator=generator)
    return Targets(token_T, position_T, first)


def near(actual: Tensor, expected: Tensor) -> None:
    """float32; sums of at most a few hundred terms of order 1."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def full_logits(
    head: HeadProjection,
    hidden_PD: Tensor,
    segments: list[Segment],
    masters: list[dict[str, Tensor]],
) -> Tensor:
    assert head.bias_V is not None
    parts = [hidden_PD @ head.weight_VD.T + head.bias_V]
    for segment, master in zip(segments, masters, strict=True):
        a_RD, b_VR = master["lm_head.lora_A.weight"], master["lm_head.lora_B.weight"]
        inside_P1 = torch.zeros(len(hidden_PD), 1)
        inside_P1[segment.rows] = 1
        parts.append(inside_P1 * segment.adapter.scale * (hidden_PD @ a_RD.T @ b_VR.T))
    return torch.stack(parts).sum(0)


@settings(deadline=None, max_examples=60)
@given(
    per_position=st.one_of(
        st.lists(st.integers(1, 4), min_size=1, max_size=24),
        st.integers(1, 24).map(lambda n: [1] * n),
    ),
    cuts=st.tuples(st.integers(0, 24), st.integers(0, 24)),
    chunk=st.integers(1, 30),
    block=st.integers(1, 30),
    dead=st.floats(0, 1),
    backward=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_autograd(
    per_position: list[int],
    cuts: tuple[int, int],
    chunk: int,
    block: int,
    dead: float,
    backward: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_positions = len(per_position)
    hidden_PD = torch.randn(num_positions, D, generator=generator)
    weight_VD, bias_V = torch.randn(V, D, generator=generator), torch.randn(V, generator=generator)
    head = HeadProjection(weight_VD=weight_VD, bias_V=bias_V, path="lm_head")
    targets = targets_of(per_position, generator)
    weights_T = torch.randn(len(targets.token_T), generator=generator)
    weights_T[torch.rand(len(weights_T), generator=generator) < dead] = 0.0

    # Three runs: two adapt the head, with different ranks; the one between them does not.
    low, high = sorted(min(cut, num_positions) for cut in cuts)
    adapters = [
        adapter(2, generator),
        LoraTensors(LoraSpec(rank=1, seed=0), {}, dtype=torch.float32),
    ]
    adapters.append(adapter(5, generator))
    bounds = [slice(0, low), slice(low, high), slice(high, num_positions)]
    grads: list[dict[str, Tensor]] = [
        {name: torch.zeros_like(value) for name, value in a.master.items()} for a in adapters
    ]
    segments = [Segment(r, a, g) for r, a, g in zip(bounds, adapters, grads, strict=True)]

    def loss(part: slice, lp_T: Tensor) -> ValueAndSlope:
        return -weights_T[part] * lp_T, -weights_T[part]

    scored = score(
        head,
        hidden_PD,
        targets,
        segments,
        loss,
        backward=backward,
        chunk_bytes=chunk * V * 4,
        block_bytes=block * V * 4,
    )

    leaves = [hidden_PD.clone().requires_grad_()]
    masters: list[dict[str, Tensor]] = []
    for a in adapters:
        masters.append({name: value.clone().requires_grad_() for name, value in a.master.items()})
        leaves.extend(masters[-1].values())
    adapting = [0, 2]
    logits_PV = full_logits(
        head, leaves[0], [segments[i] for i in adapting], [masters[i] for i in adapting]
    )
    lp_T = torch.log_softmax(logits_PV, -1)[targets.position_T, targets.token_T]
    value = -(weights_T * lp_T).sum()
    near(scored.logprobs_T, lp_T.detach())
    near(scored.values_T.sum(), value.detach())
    if not backward:
        assert scored.grad_PD is None
        assert not any(bool(g.any()) for run in grads for g in run.values())
        return
    expected = torch.autograd.grad(value, leaves)
    assert scored.grad_PD is not None
    near(scored.grad_PD, expected[0])
    found = [g for run in grads for g in run.values()]
    for actual, reference in zip(found, expected[1:], strict=True):
        near(actual, reference)


def test_positions_without_slope_get_exactly_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    head = HeadProjection(
        weight_VD=torch.randn(V, D, generator=generator), bias_V=None, path="lm_head"
    )
    targets = targets_of([1] * 9, generator)
    slope_T = torch.tensor([0.0, 0, 0, 1, 0, 1, 0, 0, 0])
    scored = score(
        head,
        torch.randn(9, D, generator=generator),
        targets,
        [],
        lambda part, lp_T: (lp_T, slope_T[part]),
        backward=True,
        chunk_bytes=V * 4 * 3,
        block_bytes=V * 4 * 2,
    )
    assert scored.grad_PD is not None
    assert torch.equal(scored.grad_PD.abs().sum(1) != 0, slope_T != 0)


def test_segments_must_be_slices() -> None:
    generator = torch.Generator().manual_seed(0)
    head = HeadProjection(weight_VD=torch.randn(V, D), bias_V=None, path="lm_head")
    segments = [Segment(torch.tensor([0]), adapter(2, generator))]
    with pytest.raises(TypeError, match="slices"):
        score(
            head,
            torch.randn(1, D),
            targets_of([1], generator),
            segments,
            lambda _part, lp_T: (lp_T, lp_T),
            backward=False,
            chunk_bytes=1,
            block_bytes=1,
        )
