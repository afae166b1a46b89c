"""Tensors as the wire carries them, dense or CSR, to numpy, with every claim checked.

N tokens of a datum, K targets per token.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import Datum, Int32Array

# int64 or float32, whatever the sender's width was.
Array: TypeAlias = NDArray[np.int64 | np.float32]


class Growth:
    """How many bytes the sparse tensors of one request may still grow to.

    A CSR matrix of a few bytes can claim any shape, so a request has one allowance for all.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left = self._max = max_bytes

    def take(self, num_bytes: int) -> None:
        """Spend some of it.

        Raises:
            InvalidRequest: There is not that much left.
        """
        if num_bytes > self._left:
            raise InvalidRequest(
                f"The sparse tensors of this request grow to more than {self._max >> 20} MiB; "
                "send fewer data at a time"
            )
        self._left -= num_bytes


def dense(values: Array, shape: Sequence[int] | None) -> Array:
    """Give flat values their shape; None or () means one dimension.

    Raises:
        InvalidRequest: The shape is for another number of values.
    """
    if not shape:
        return values
    if min(shape) < 0 or math.prod(shape) != len(values):
        raise InvalidRequest(f"shape {_short(shape)} does not fit {len(values)} values")
    return values.reshape(shape)


def sparse(
    values: Array,
    crow: NDArray[np.int64],
    col: NDArray[np.int64],
    shape: Sequence[int] | None,
    growth: Growth,
) -> Array:
    """Fill a CSR matrix into a dense one; cells that are not listed are 0.

    Raises:
        InvalidRequest: The indices contradict each other or the shape, or list a cell twice.
    """
    if shape is None or len(shape) != 2 or min(shape) < 0:
        raise InvalidRequest(f"a sparse tensor needs a shape of two dimensions, not {shape}")
    num_rows, num_cols = shape
    stored = len(values)
    if len(col) != stored:
        raise InvalidRequest(f"{stored} sparse values have {len(col)} column indices")
    if len(crow) != num_rows + 1 or crow[0] != 0 or crow[-1] != stored:
        raise InvalidRequest(
            f"the row pointers of a sparse tensor of {num_rows} rows and {stored} values must be "
            f"{num_rows + 1} numbers from 0 to {stored}"
        )
    if crow.min() < 0 or crow.max() > stored or (np.diff(crow) < 0).any():
        raise InvalidRequest("the row pointers of a sparse tensor must not decrease")
    if stored and (col.min() < 0 or col.max() >= num_cols):
        raise InvalidRequest(f"a sparse column index is not within 0..{num_cols - 1}")
    growth.take(num_rows * num_cols * values.itemsize)
    cells = np.repeat(np.arange(num_rows, dtype=np.int64), np.diff(crow)) * num_cols + col
    if (np.diff(cells) <= 0).any():
        raise InvalidRequest("the columns within a sparse row must increase")
    out = np.zeros(num_rows * num_cols, values.dtype)
    out[cells] = values
    return out.reshape(num_rows, num_cols)


def datum_of(tokens: Int32Array, inputs: Mapping[str, Array]) -> Datum:
    """Sort the tensors of a datum into targets and the rest.

    Raises:
        InvalidRequest: There are no targets, or they are not integers.
    """
    targets = inputs.get("target_tokens")
    if targets is None:
        raise InvalidRequest("loss_fn_inputs has no 'target_tokens'")
    if targets.dtype != np.int64:
        raise InvalidRequest("'target_tokens' must be integers")
    return Datum(
        tokens=tokens,
        target_tokens=targets.astype(np.int64, copy=False),
        # Weights sent as integers are exact in float32 up to 2**24.
        loss_inputs={
            name: array.astype(np.float32, copy=False)
            for name, array in inputs.items()
            if name != "target_tokens"
        },
    )


def _short(shape: Sequence[int]) -> str:
    return str(list(shape[:4]))[:60]
