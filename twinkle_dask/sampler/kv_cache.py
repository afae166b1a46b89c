"""Keys and values of many sequences: one slot each, of different lengths, in one tensor per layer.

The layout is [S, C, H, Dh], position before head: a slot's first tokens are one contiguous piece,
so sharing a prefix or moving a slot is a plain copy, and a pass writes one row per new token
whatever the number of heads. Attention reads the slots of a pass in place, as a view.

What a slot holds beyond its sequence's length must be finite: attention multiplies it by zero, and
zero times NaN would carry one tenant's broken adapter into another's tokens. So slots are made of
zeros and cleared when they are left.

Shapes: S slots, C capacity in tokens, B rows of a pass, L new tokens of each, H heads, Dh per head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# CUDA's masked attention kernels want lengths that are multiples of 8; 16 costs nothing.
ALIGNMENT = 16


def aligned(num_tokens: int) -> int:
    """``num_tokens`` rounded up to the alignment."""
    return -(-num_tokens // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class KvLayout:
    """What one token takes: (heads, size per head) of keys and of values, layer by layer."""

    keys: tuple[tuple[int, int], ...]
    values: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        numbers = sum(heads * size for heads, size in (*self.keys, *self.values))
        return numbers * self.dtype.itemsize


@dataclass(slots=True)
class _Pass:
    """What the layers need to know about the pass that is going on.

    Attributes:
        rows: The slots of the pass's rows.
        num_keys: How many positions attention sees.
        past: Tokens in each row before the pass, where they are all the same.
        places: Index of each new token in a flat [S * C] view, row by row.
    """

    rows: slice
    num_keys: int
    past: int
    places: Tensor


class SlotCache(Cache):
    """A cache for ``BaseModel.hidden``; every decoder of Transformers that takes one can use it.

    Before a pass say what it is about with ``begin_chunk`` or ``begin_decode``; ``hidden`` then
    writes the new keys and values into the slots.
    """

    def __init__(self, layout: KvLayout, *, slots: int, capacity: int) -> None:
        self._layout = layout
        self._pass = _Pass(slice(0, 0), 0, 0, torch.empty(0, dtype=torch.int64))
        self._slot_layers = [
            _SlotLayer(keys, values, layout, self._pass)
            for keys, values in zip(layout.keys, layout.values, strict=True)
        ]
        self.slots = self.capacity = 0
        super().__init__(layers=list(self._slot_layers))
        self.reshape(slots=slots, capacity=capacity)

    @property
    def num_tokens(self) -> int:
        """Tokens that there is memory for."""
        return self.slots * self.capacity

    def begin_chunk(self, *, rows: int, past: int, length: int) -> None:
        """The next pass adds ``length`` tokens to each of the first ``rows`` slots.

        All of them hold ``past`` tokens. Needs no attention mask: Transformers makes the right one.
        """
        device = self._layout.device
        starts_B1 = torch.arange(rows, device=device).unsqueeze(1) * self.capacity + past
        places_BL = starts_B1 + torch.arange(length, device=device)
        self._set(slice(0, rows), past + length, past, places_BL.view(-1))

    def begin_decode(self, rows: slice, positions_B: Tensor, *, longest: int) -> int:
        """The next pass adds one token to each of ``rows``, at its own position.

        Args:
            rows: Neighbouring slots.
            positions_B: int64, how many tokens each of them holds.
            longest: Largest position, plus one.

        Returns:
            How many positions attention will see; the mask must hide those a row does not have.
        """
        num_keys = min(aligned(longest), self.capacity)
        slots_B = torch.arange(rows.start, rows.stop, device=positions_B.device)
        self._set(rows, num_keys, 0, slots_B * self.capacity + positions_B)
        return num_keys

    def _set(self, rows: slice, num_keys: int, past: int, places: Tensor) -> None:
        now = self._pass
        now.rows, now.num_keys, now.past, now.places = rows, num_keys, past, places

    def reshape(self, *, slots: int, capacity: int, rows: int = 0, length: int = 0) -> None:
        """Change the number of slots and their size.

        Keeps the first ``length`` tokens of the first ``rows`` slots. Done layer by layer, so that
        the memory of both shapes is never needed at once.
        """
        for layer in self._slot_layers:
            layer.reshape(slots, capacity, rows, length)
        self.slots, self.capacity = slots, capacity

    def copy(self, source: "SlotCache", source_row: int, rows: slice, length: int) -> None:
        """Copy the first ``length`` tokens of another cache's slot into each of ``rows``."""
        for mine, theirs in zip(self._tensors(), source._tensors(), strict=True):
            mine[rows, :length] = theirs[source_row, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Move ``length`` tokens from one slot to another, which is clear; the first is cleared."""
        for tensor in self._tensors():
            tensor[target, :length] = tensor[source, :length]
            tensor[source, :length] = 0

    def clear(self, row: int, length: int) -> None:
        """Zero the first ``length`` tokens of a slot."""
        for tensor in self._tensors():
            tensor[row, :length] = 0

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self._slot_layers:
            yield layer.keys_SCHD
            yield layer.values_SCHD


class _SlotLayer(CacheLayerMixin):
    """One layer of a ``SlotCache``, with what Transformers asks of a layer."""

    is_sliding = False  # windows are a matter of the mask; all positions are kept

    def __init__(
        self, keys: tuple[int, int], values: tuple[int, int], layout: KvLayout, now: _Pass
    ) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType] - untyped
        self.is_initialized = True
        self._now = now
        self.keys_SCHD = _zeros(0, 0, keys, layout)
        self.values_SCHD = _zeros(0, 0, values, layout)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new (B, H, L, Dh) and return all that attention sees, (B, H, K, Dh)."""
        now = self._now
        return (
            _write(self.keys_SCHD, key_states, now),
            _write(self.values_SCHD, value_states, now),
        )

    def reshape(self, slots: int, capacity: int, rows: int, length: int) -> None:
        """See ``SlotCache.reshape``."""
        self.keys_SCHD = _reshaped(self.keys_SCHD, slots, capacity, rows, length)
        self.values_SCHD = _reshaped(self.values_SCHD, slots, capacity, rows, length)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is lazy here."""

    def get_seq_length(self) -> int:
        """Tokens before the pass; asked for only where all rows hold the same number."""
        return self._now.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of positions that attention sees, and the first of them."""
        return self._now.num_keys, 0

    def get_max_length(self) -> int:
        """Capacity of a slot."""
        return self.keys_SCHD.shape[1]


def _zeros(slots: int, capacity: int, heads: Sequence[int], layout: KvLayout) -> Tensor:
    return torch.zeros((slots, capacity, *heads), dtype=layout.dtype, device=layout.device)


def _write(slots_SCHD: Tensor, new_BHLD: Tensor, now: _Pass) -> Tensor:
    flat_PHD = slots_SCHD.view(-1, *slots_SCHD.shape[2:])
    flat_PHD.index_copy_(0, now.places, new_BHLD.transpose(1, 2).reshape(-1, *flat_PHD.shape[1:]))
    return slots_SCHD[now.rows, : now.num_keys].transpose(1, 2)


def _reshaped(old_SCHD: Tensor, slots: int, capacity: int, rows: int, length: int) -> Tensor:
    new_SCHD = old_SCHD.new_zeros((slots, capacity, *old_SCHD.shape[2:]))
    new_SCHD[:rows, :length] = old_SCHD[:rows, :length]
    return new_SCHD
