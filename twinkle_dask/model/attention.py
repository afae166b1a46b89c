"""Causal attention for training: rows lie one after another and see only themselves.

Registered with transformers under ``NAME``, beside its own implementations. Inside of
``packed(rows)`` a sequence of T positions holds several rows, and attention is block-diagonal:
flash attention over variable lengths on a GPU, elsewhere one call for each run of equally long
rows. Outside, it is transformers' ``sdpa``.

On a processor, torch's backward of flash attention is slow in bfloat16 on short rows (4 rows of
128, 9 heads of 64, one core: 10.7 ms, and 0.7 ms forward). There the gradient is computed from
plain products (2.6 ms; its error against float64 is the same 0.5 %), which needs the weights of
one head group in memory, so long rows leave it to torch.

Shapes: T positions, N rows of one length L, H heads, K key and value heads, G = H / K, C head size,
B = N * K, M = G * L.
"""

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.sdpa_attention import (
    sdpa_attention_forward,  # pyright: ignore[reportUnknownVariableType]
)
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    sdpa_mask,  # pyright: ignore[reportUnknownVariableType]
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "twinkle_rows"

# Longest row whose gradient comes from plain products. Measured on one core with AMX, 512 positions
# of 9 heads, ours and torch's, which includes another forward: bfloat16 L = 64 1.3 and 10.5 ms,
# 128 2.6 and 11.4, 256 3.7 and 8.3, 512 9.0 and 12.3; float32 64 2.3 and 3.1, 128 3.9 and 5.0,
# 256 7.2 and 8.5, 512 26 and 16.
_LONGEST_PLAIN = {torch.bfloat16: 512, torch.float16: 512, torch.float32: 256}

_sdpa = cast(Any, sdpa_attention_forward)
_mask = cast(Any, sdpa_mask)


@dataclass(frozen=True, slots=True)
class Bucket:
    """``count`` rows of one ``length``, one after another from position ``start``."""

    start: int
    count: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """How a packed sequence is divided.

    Attributes:
        buckets: In order; together all T positions.
        bounds: int32 (rows + 1,), where each row begins, and T; on the device.
    """

    buckets: tuple[Bucket, ...]
    bounds: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Rows":
        """Rows of these lengths, in this order; none may be 0."""
        buckets: list[Bucket] = []
        bounds = [0]
        for length, group in groupby(lengths):
            start, count = bounds[-1], len(list(group))
            buckets.append(Bucket(start, count, length))
            bounds += [start + (i + 1) * length for i in range(count)]
        return cls(tuple(buckets), torch.tensor(bounds, dtype=torch.int32, device=device))

    @property
    def longest(self) -> int:
        """Positions of the longest row."""
        return max(bucket.length for bucket in self.buckets)


class _Current(threading.local):
    rows: Rows | None = None


_current = _Current()


@contextmanager
def packed(rows: Rows) -> Generator[None]:
    """Attention of this thread takes its sequences apart by ``rows``."""
    before, _current.rows = _current.rows, rows
    try:
        yield
    finally:
        _current.rows = before


def current() -> Rows | None:
    """This thread's rows."""
    return _current.rows


def register() -> None:
    """Make ``attn_implementation=NAME`` known to transformers; again is no harm."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)  # pyright: ignore[reportUnknownMemberType]
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask_if_packed)  # pyright: ignore[reportUnknownMemberType]


def _no_mask_if_packed(*args: Any, **kwargs: Any) -> Tensor | None:
    return _mask(*args, **kwargs) if _current.rows is None else None


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query (1, H, T, C), key and value (1, K, T, C)."""
    rows = _current.rows
    if rows is None:
        return _sdpa(
            module, query, key, value, attention_mask, scaling=scaling,
            sliding_window=sliding_window, **others,
        )  # fmt: skip
    if others.get("softcap") is not None or others.get("s_aux") is not None:
        raise NotImplementedError("Attention with soft caps or sinks cannot be packed.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_THC, k_TKC, v_TKC = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q_THC, k_TKC, v_TKC, rows, scale, sliding_window)[None], None


def attend(
    q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, rows: Rows, scale: float, window: int | None
) -> Tensor:
    """Causal attention within each row; with a window, to the last so many positions only.

    Returns:
        (T, H, size of the values).
    """
    if q_THC.is_cuda and q_THC.dtype in _HALF:
        return _varlen(q_THC, k_TKC, v_TKC, rows, scale, window)
    return cast(Tensor, _apply(q_THC, k_TKC, v_TKC, rows, scale, window))


_HALF = {torch.bfloat16, torch.float16}


def _varlen(
    q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, rows: Rows, scale: float, window: int | None
) -> Tensor:
    # Here, since it needs a GPU build of torch.
    from torch.nn.attention.varlen import varlen_attn

    longest = rows.longest
    return cast(
        Tensor,
        varlen_attn(
            q_THC,
            k_TKC,
            v_TKC,
            rows.bounds,
            rows.bounds,
            longest,
            longest,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=q_THC.shape[1] != k_TKC.shape[1],
        ),
    )


Heads: TypeAlias = tuple[Tensor, Tensor, Tensor]


class _RowAttention(torch.autograd.Function):
    """Block-diagonal causal attention; saves its inputs, and nothing of the size of L x L."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THC: Tensor,
        k_TKC: Tensor,
        v_TKC: Tensor,
        rows: Rows,
        scale: float,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(q_THC, k_TKC, v_TKC)
        ctx.rows, ctx.scale, ctx.window = rows, scale, window
        out_THC = q_THC.new_empty(*q_THC.shape[:2], v_TKC.shape[-1])
        for bucket in rows.buckets:
            heads = _heads(bucket, q_THC, k_TKC, v_TKC)
            _put(out_THC, bucket, _forward(heads, scale, window))
        return out_THC

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's decorator
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        for bucket in ctx.rows.buckets:
            heads = _heads(bucket, *inputs)
            (grad_NHLC,) = _views(bucket, grad_outputs[0])
            plain = (
                not grad_NHLC.is_cuda
                and bucket.length <= _LONGEST_PLAIN.get(grad_NHLC.dtype, 0)
                and (ctx.window is None or bucket.length <= ctx.window)
            )
            of_heads = (_plain_backward if plain else _torch_backward)(
                heads, grad_NHLC, ctx.scale, ctx.window
            )
            for grad, of_head in zip(grads, of_heads, strict=True):
                _put(grad, bucket, of_head)
        return *grads, None, None, None


_apply = cast(Any, _RowAttention.apply)  # pyright: ignore[reportUnknownMemberType]


def _views(bucket: Bucket, *of_T: Tensor) -> tuple[Tensor, ...]:
    """A bucket's part of (T, H, C) tensors as (N, H, L, C), without copying."""
    stop = bucket.start + bucket.count * bucket.length
    return tuple(
        x[bucket.start : stop].view(bucket.count, bucket.length, *x.shape[1:]).transpose(1, 2)
        for x in of_T
    )


def _heads(bucket: Bucket, q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor) -> Heads:
    q, k, v = _views(bucket, q_THC, k_TKC, v_TKC)
    return q, k, v


def _put(out_THC: Tensor, bucket: Bucket, part_NHLC: Tensor) -> None:
    _views(bucket, out_THC)[0].copy_(part_NHLC)


def _forward(heads: Heads, scale: float, window: int | None) -> Tensor:
    q_NHLC, k_NKLC, v_NKLC = heads
    length = q_NHLC.shape[2]
    banded = window is not None and length > window
    return functional.scaled_dot_product_attention(
        q_NHLC,
        k_NKLC,
        v_NKLC,
        attn_mask=_band(length, window, q_NHLC.device) if banded else None,
        is_causal=not banded,
        scale=scale,
        enable_gqa=q_NHLC.shape[1] != k_NKLC.shape[1],
    )


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """Who sees whom: the last ``window`` positions up to one's own; bool (L, L)."""
    see_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return see_LL if window is None else see_LL.triu_(1 - window)


def _torch_backward(heads: Heads, grad_NHLC: Tensor, scale: float, window: int | None) -> Heads:
    """By autograd, with the forward computed once more."""
    leaves = [x.detach().requires_grad_() for x in heads]
    with torch.enable_grad():
        out_NHLC = _forward((leaves[0], leaves[1], leaves[2]), scale, window)
    q, k, v = torch.autograd.grad(out_NHLC, leaves, grad_NHLC)
    return q, k, v


def _plain_backward(heads: Heads, grad_NHLC: Tensor, scale: float, _: int | None) -> Heads:
    """By hand.

    With P the weights and dO the gradient of the output: dV = P^T dO, dP = dO V^T,
    dS = P (dP - sum(P dP)), dQ = scale dS K, dK = scale dS^T Q. The query heads of one key head
    are one matrix, so sums over them come with the products.
    """
    q_NHLC, k_NKLC, v_NKLC = heads
    rows, num_heads, length, _ = q_NHLC.shape
    num_keys = k_NKLC.shape[1]
    queries = num_heads // num_keys * length

    def grouped(x: Tensor, of_group: int) -> Tensor:
        return x.reshape(rows * num_keys, of_group, x.shape[-1])

    q_BMC, grad_BMC = grouped(q_NHLC, queries), grouped(grad_NHLC, queries)
    k_BLC, v_BLC = grouped(k_NKLC * scale, length), grouped(v_NKLC, length)
    future_ML = _future(length, num_heads // num_keys, q_BMC.dtype, q_BMC.device)
    p_BML = torch.baddbmm(future_ML, q_BMC, k_BLC.mT).softmax(-1)
    grad_v_BLC = p_BML.mT @ grad_BMC
    grad_p_BML = grad_BMC @ v_BLC.mT
    grad_s_BML = torch.ops.aten._softmax_backward_data(grad_p_BML, p_BML, -1, p_BML.dtype)
    grad_q_BMC = grad_s_BML @ k_BLC
    grad_k_BLC = (grad_s_BML.mT @ q_BMC).mul_(scale)
    return (
        grad_q_BMC.view(q_NHLC.shape),
        grad_k_BLC.view(k_NKLC.shape),
        grad_v_BLC.view(v_NKLC.shape),
    )


@lru_cache(maxsize=64)
def _future(length: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 for what a position sees, minus infinity after it; (G * L, L)."""
    ones_LL = torch.full((length, length), float("-inf"), dtype=dtype, device=device)
    return ones_LL.triu_(1).repeat(groups, 1)
