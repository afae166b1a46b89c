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
from functools import cache
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

# Fewest queries of a block where a window is shorter than the row.
_SHORTEST_BLOCK = 512

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
    length = heads[0].shape[2]
    if window is None or length <= window:
        return _dot_product(heads, None, scale)
    blocks = _blocks(length, window)
    device = heads[0].device
    parts = [_dot_product(block.part(heads), block.see(window, device), scale) for block in blocks]
    return torch.cat(parts, dim=2)


def _dot_product(heads: Heads, see: Tensor | None, scale: float) -> Tensor:
    q_NHLC, k_NKLC, v_NKLC = heads
    return functional.scaled_dot_product_attention(
        q_NHLC,
        k_NKLC,
        v_NKLC,
        attn_mask=see,
        is_causal=see is None,
        scale=scale,
        enable_gqa=q_NHLC.shape[1] != k_NKLC.shape[1],
    )


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries ``start`` to ``stop`` of each row, which see nothing before key ``first``."""

    first: int
    start: int
    stop: int

    def part(self, heads: Heads) -> Heads:
        """Its queries, and the keys and values that they may see; views."""
        q_NHLC, k_NKLC, v_NKLC = heads
        seen = slice(self.first, self.stop)
        return q_NHLC[:, :, self.start : self.stop], k_NKLC[:, :, seen], v_NKLC[:, :, seen]

    def see(self, window: int, device: torch.device) -> Tensor:
        """Which of these keys each query sees; bool (queries, keys)."""
        size = self.stop - self.start, self.stop - self.first
        own = self.start - self.first  # the first query's own key
        see = torch.ones(size, dtype=torch.bool, device=device)
        return see.tril_(own).triu_(own + 1 - window)


def _blocks(length: int, window: int) -> list[_Block]:
    """Queries cut so that masks grow with the row, not with its square.

    A block has at least ``window`` queries, so a key is seen by two blocks at most.
    """
    size = max(window, _SHORTEST_BLOCK)
    return [
        _Block(max(0, start - window + 1), start, min(start + size, length))
        for start in range(0, length, size)
    ]


def _torch_backward(heads: Heads, grad_NHLC: Tensor, scale: float, window: int | None) -> Heads:
    """By autograd, with the forward computed once more."""
    length = grad_NHLC.shape[2]
    if window is None or length <= window:
        return _gradients(heads, None, grad_NHLC, scale)
    grads = grad_q_NHLC, grad_k_NKLC, grad_v_NKLC = (
        torch.empty_like(heads[0]),
        torch.zeros_like(heads[1]),
        torch.zeros_like(heads[2]),
    )
    for block in _blocks(length, window):
        queries, seen = slice(block.start, block.stop), slice(block.first, block.stop)
        see = block.see(window, grad_NHLC.device)
        q, k, v = _gradients(block.part(heads), see, grad_NHLC[:, :, queries], scale)
        grad_q_NHLC[:, :, queries] = q
        grad_k_NKLC[:, :, seen] += k
        grad_v_NKLC[:, :, seen] += v
    return grads


def _gradients(heads: Heads, see: Tensor | None, grad_NHLC: Tensor, scale: float) -> Heads:
    leaves = [x.detach().requires_grad_() for x in heads]
    with torch.enable_grad():
        out_NHLC = _dot_product((leaves[0], leaves[1], leaves[2]), see, scale)
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
    future_ML = _future(q_BMC.dtype, q_BMC.device)[:length, :length].repeat(
        num_heads // num_keys, 1
    )
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


@cache
def _future(dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 for what a position sees, minus infinity after it; (L, L) of the longest plain row."""
    longest = max(_LONGEST_PLAIN.values())
    return torch.full((longest, longest), float("-inf"), dtype=dtype, device=device).triu_(1)
