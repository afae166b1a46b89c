"""Tensors as the wire carries them, dense or CSR, to numpy, with every claim checked.

N tokens of a datum, K targets per token.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import CustomLoss, Datum, Image, Int32Array

# int64 or float32, whatever the sender's width was.
Array: TypeAlias = NDArray[np.int64 | np.float32]

_MAX_DIMENSION = 2**62
_MAX_CELLS = 2**40
_PIECE = 2**16  # numbers, some 3 ms


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
    # Numpy minds a large dimension even where there are no values.
    too_large = math.prod(size for size in shape if size) > _MAX_CELLS
    if min(shape) < 0 or math.prod(shape) != len(values) or too_large:
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
    num_rows, num_cols = check_csr(len(values), crow, col, shape)
    growth.take(num_rows * num_cols * values.itemsize)
    cells = np.repeat(np.arange(num_rows, dtype=np.int64), np.diff(crow)) * num_cols + col
    out = np.zeros(num_rows * num_cols, values.dtype)
    out[cells] = values
    return out.reshape(num_rows, num_cols)


def check_csr(
    stored: int, crow: NDArray[np.int64], col: NDArray[np.int64], shape: Sequence[int] | None
) -> tuple[int, int]:
    """The shape of a CSR matrix of so many values, if its indices agree with it.

    Raises:
        InvalidRequest: The indices contradict each other or the shape, or list a cell twice.
    """
    if shape is None or len(shape) != 2 or min(shape) < 0 or max(shape) > _MAX_DIMENSION:
        what = None if shape is None else _short(shape)
        raise InvalidRequest(f"a sparse tensor needs a shape of two dimensions, not {what}")
    num_rows, num_cols = shape
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
    # A column may be smaller than the one before it only where a row begins.
    if not np.isin(np.flatnonzero(np.diff(col) <= 0) + 1, crow).all():
        raise InvalidRequest("the columns within a sparse row must increase")
    return num_rows, num_cols


def integers(values: Any, what: str) -> NDArray[np.int64]:
    """A list of a JSON body as integers.

    Raises:
        InvalidRequest: It is no flat list of integers of 64 bits.
    """
    array = numbers(values, what)
    if array.dtype != np.int64 and array.size:
        raise InvalidRequest(f"{what} must be a flat list of integers of 64 bits")
    return array.astype(np.int64, copy=False)


def numbers(values: Any, what: str) -> NDArray[Any]:
    """A list of a JSON body as numbers of whatever kind they are.

    Raises:
        InvalidRequest: It is no flat list of numbers.
    """
    # Without a dtype numpy tells us what it found, where with one it would read "7" as 7.
    try:
        array = _array(values)
    except (ValueError, OverflowError):  # ragged, or larger than any number
        array = np.empty((), object)
    if array.ndim != 1 or array.dtype.kind not in "if":
        raise InvalidRequest(f"{what} must be a flat list of numbers")
    return array


def _array(values: Any) -> NDArray[Any]:
    """As ``np.asarray``, which keeps the interpreter's lock; so a long list goes in pieces."""
    many = cast(list[Any], values)
    if not isinstance(values, list) or len(many) <= _PIECE:
        return np.asarray(many)
    pieces = range(0, len(many), _PIECE)
    return np.concatenate([np.asarray(many[start : start + _PIECE]) for start in pieces])


def datum_of(
    tokens: Int32Array,
    inputs: Mapping[str, Array],
    images: tuple[Image, ...] = (),
    custom: CustomLoss | None = None,
) -> Datum:
    """Sort the tensors of a datum into targets and the rest.

    Of a custom loss's data only what it reads is kept, as it was sent.

    Raises:
        InvalidRequest: There are no targets, or they are not integers.
    """
    targets = inputs.get("target_tokens")
    if targets is None:
        raise InvalidRequest("loss_fn_inputs has no 'target_tokens'")
    if targets.dtype != np.int64:
        raise InvalidRequest("'target_tokens' must be integers")
    if custom is not None:
        return Datum(
            tokens=tokens,
            target_tokens=targets.astype(np.int64, copy=False),
            loss_inputs={},
            custom_inputs=_read_by(custom, inputs),
            images=images,
        )
    return Datum(
        tokens=tokens,
        target_tokens=targets.astype(np.int64, copy=False),
        # Weights sent as integers are exact in float32 up to 2**24.
        loss_inputs={
            name: array.astype(np.float32, copy=False)
            for name, array in inputs.items()
            if name != "target_tokens"
        },
        images=images,
    )


def _read_by(custom: CustomLoss, inputs: Mapping[str, Array]) -> dict[str, Any]:
    """What a custom loss reads; a scalar has no shape on the wire."""
    read = {name: inputs[name] for name in custom.inputs if name in inputs}
    return {
        name: array.reshape(()) if custom.ranks[name] == 0 and array.size == 1 else array
        for name, array in read.items()
    }


def _short(shape: Sequence[int]) -> str:
    return str(list(shape[:4]))[:60]
