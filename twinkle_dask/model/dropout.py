"""Dropout of what an adapter reads, by counting instead of drawing.

Whether a number is left out depends on a seed, the row's index in its operation, the token's place
in the row, the module and the number's place in the vector, and on nothing else: not on what shares
the pass, on how it is cut, on the device, or on how often a layer is computed. So nothing has to be
kept for backward, and a replay leaves out the same.

The numbers are those of SplitMix64 (https://doi.org/10.1145/2714064.2660195), 16 bits for each.

Shapes: M positions of one segment, D numbers of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import torch
from torch import Tensor

_BITS = 16
_PER_WORD = 64 // _BITS
# Numbers at a time: each takes some 10 bytes on the way, and a core's cache holds about so many.
_BLOCK = 2**17


def _signed(word: int) -> int:
    return (word & (2**64 - 1)) - (2**64 if word & 2**63 else 0)


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True, eq=False)
class Dropout:
    """What is left out of one segment's inputs.

    Attributes:
        share: Of all numbers, below 1; kept ones are divided by what is left of 1.
        keys_M: int64, a random number for each position of the segment.
    """

    share: float
    keys_M: Tensor

    @classmethod
    def of(
        cls,
        share: float,
        seed: int,
        rows: Sequence[int],
        lengths: Sequence[int],
        device: torch.device,
    ) -> "Dropout":
        """For rows that lie one after another.

        Args:
            share: Of all numbers.
            seed: Of the operation.
            rows: Each one's index in its operation.
            lengths: The positions of each.
            device: Where the segment is.
        """
        keys = [
            torch.arange(length, device=device) * _STEP + _hashed(f"{seed}:{row}")
            for row, length in zip(rows, lengths, strict=True)
        ]
        return cls(share, _mixed(torch.cat(keys)))

    def only(self, positions: slice | Tensor) -> "Dropout":
        """For some of the positions."""
        return Dropout(self.share, self.keys_M[positions])

    def applied(self, x_MD: Tensor, module_path: str) -> Tensor:
        """The inputs of a module's A with some numbers 0; as well a gradient by them."""
        y_MD = x_MD.mul(1 / (1 - self.share))
        width = max(1, x_MD.shape[1])
        step = max(1, (_BLOCK if x_MD.device.type == "cpu" else 64 * _BLOCK) // width)
        for start in range(0, len(x_MD), step):
            here = slice(start, start + step)
            y_MD[here].masked_fill_(~self.only(here).kept(width, module_path), 0)
        return y_MD

    def kept(self, width: int, module_path: str) -> Tensor:
        """Which of the ``width`` numbers of each position a module reads: bool (M, D)."""
        words = torch.arange(-(-width // _PER_WORD), device=self.keys_M.device)
        counters = words * _STEP + _hashed(module_path)
        random = _mixed(self.keys_M[:, None] + counters).view(torch.int16)[:, :width]
        return random >= round(self.share * 2**_BITS) - 2 ** (_BITS - 1)


@lru_cache(maxsize=10_000)
def _hashed(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _mixed(word: Tensor) -> Tensor:
    word = (word ^ _shifted(word, 30)) * _FIRST
    word = (word ^ _shifted(word, 27)) * _SECOND
    return word ^ _shifted(word, 31)


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Without the sign, which torch would fill up with."""
    return (word >> bits) & (2 ** (64 - bits) - 1)
