"""Arrays for property tests."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from twinkle_dask_gateway.tinker.tensors import Array

_FLOATS = st.floats(width=32, allow_nan=False)
_INTS = st.integers(-(2**63), 2**63 - 1)


def matrices() -> st.SearchStrategy[Array]:
    """Matrices of either dtype, many of their cells 0, also with no rows or columns."""
    shapes = array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=6)
    return st.one_of(
        arrays(np.int64, shapes, elements=st.one_of(st.just(0), _INTS)),
        arrays(np.float32, shapes, elements=st.one_of(st.just(0.0), _FLOATS)),
    )


def csr_of(matrix: NDArray[Any]) -> tuple[Any, NDArray[np.int64], NDArray[np.int64]]:
    """Values, row pointers and column indices."""
    rows, cols = np.nonzero(matrix)
    counts = np.bincount(rows, minlength=matrix.shape[0])
    crow = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return matrix[rows, cols], crow, cols.astype(np.int64)
