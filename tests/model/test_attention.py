"""Packed attention against a dense mask in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from twinkle_dask.model.attention import Rows, attend

LENGTHS = [
    pytest.param((1,), id="one"),
    pytest.param((5, 5, 40, 1, 128), id="mixed"),
    pytest.param((300, 3), id="long"),
    pytest.param((1100, 1100, 2), id="several blocks of a window"),
]


def tensors(
    total: int, heads: int, keys: int, dtype: torch.dtype, value_size: int = 16
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(total)
    sizes = ((heads, 16), (keys, 16), (keys, value_size))
    return [
        torch.randn(total, *size, generator=generator).to(dtype).requires_grad_() for size in sizes
    ]


def dense(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    see_TT = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    start = 0
    for length in lengths:
        stop = start + length
        see_TT[start:stop, start:stop] = torch.ones(length, length, dtype=torch.bool).tril()
        start = stop
    if window is not None:
        see_TT &= torch.ones_like(see_TT).triu(1 - window)
    groups = q.shape[1] // k.shape[1]
    heads = [q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)]
    q, k, v = (x.transpose(0, 1) for x in heads)
    return functional.scaled_dot_product_attention(q, k, v, see_TT, scale=0.3).transpose(0, 1)


# What the inputs' own rounding makes of the result, measured: 3e-7 and 5e-3.
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("keys", [1, 2, 6])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_rows_see_themselves_and_what_came_before(
    lengths: tuple[int, ...], keys: int, window: int | None, dtype: torch.dtype, rel: float
) -> None:
    ours = tensors(sum(lengths), 6, keys, dtype)
    exact = [x.detach().double().requires_grad_() for x in ours]
    rows = Rows.of(lengths, torch.device("cpu"))
    out_THC = attend(ours[0], ours[1], ours[2], rows, 0.3, window)
    expected_THC = dense(exact[0], exact[1], exact[2], lengths, window)
    grad_THC = torch.randn(out_THC.shape, generator=torch.Generator().manual_seed(1))
    torch.autograd.backward([out_THC], [grad_THC.to(dtype)])
    torch.autograd.backward([expected_THC], [grad_THC.double()])
    pairs = [(out_THC, expected_THC), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    for actual, expected in pairs:
        assert actual is not None
        assert expected is not None
        difference = (actual.double() - expected).square().sum().sqrt()
        # A gradient may be 0 but for rounding (one position alone): then the inputs' size counts.
        assert difference <= rel * (expected.square().sum().sqrt() + 0.1)


def test_values_may_have_another_size() -> None:
    q, k, v = tensors(12, 4, 2, torch.float32, value_size=8)
    out_THC = attend(q, k, v, Rows.of([7, 5], torch.device("cpu")), 0.3, None)
    torch.testing.assert_close(out_THC, dense(q, k, v, (7, 5), None))
    out_THC.sum().backward()  # pyright: ignore[reportUnknownMemberType]
    assert v.grad is not None
    assert v.grad.shape == v.shape


def test_a_row_is_the_same_bit_for_bit_wherever_it_lies() -> None:
    q, k, v = tensors(30, 4, 2, torch.float32)
    device = torch.device("cpu")
    whole = attend(q, k, v, Rows.of([8, 8, 14], device), 0.3, None)
    alone = attend(q[8:16], k[8:16], v[8:16], Rows.of([8], device), 0.3, None)
    assert torch.equal(whole[8:16], alone)


def test_rows_are_counted() -> None:
    rows = Rows.of([3, 3, 2, 3], torch.device("cpu"))
    assert [(b.start, b.count, b.length) for b in rows.buckets] == [(0, 2, 3), (6, 1, 2), (8, 1, 3)]
    assert torch.equal(rows.bounds, torch.tensor([0, 3, 6, 8, 11], dtype=torch.int32))
    assert rows.longest == 3
