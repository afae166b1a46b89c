import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.gateway.arrays import csr_of, matrices
from twinkle_dask.errors import InvalidRequest
from twinkle_dask_gateway.tinker.tensors import Array, Growth, datum_of, dense, sparse

MEGABYTE = 2**20


@given(matrices())
def test_csr_of_any_matrix_fills_back_in(matrix: Array) -> None:
    values, crow, col = csr_of(matrix)
    out = sparse(values, crow, col, matrix.shape, Growth(MEGABYTE))
    assert out.dtype == matrix.dtype
    np.testing.assert_array_equal(out, matrix)


@given(matrices())
def test_dense_takes_its_shape_and_no_other(matrix: Array) -> None:
    flat = matrix.reshape(-1)
    np.testing.assert_array_equal(dense(flat, matrix.shape), matrix)
    with pytest.raises(InvalidRequest, match="does not fit"):
        dense(flat, [matrix.size + 1])
    with pytest.raises(InvalidRequest, match="does not fit"):
        dense(flat, [-1, *matrix.shape])


def test_dense_without_shape_is_flat() -> None:
    values = np.arange(3, dtype=np.int64)
    assert dense(values, None).shape == (3,)
    assert dense(values, []).shape == (3,)


@pytest.mark.parametrize(
    ("crow", "col", "shape"),
    [
        ([0, 1, 2], [0], [2, 3]),  # an index short
        ([0, 1], [0, 1], [2, 3]),  # a row short
        ([1, 1, 2], [0, 1], [2, 3]),  # does not start at 0
        ([0, 1, 3], [0, 1], [2, 3]),  # does not end at the number of values
        ([0, 3, 2], [0, 1], [2, 3]),  # goes back
        ([0, -1, 2], [0, 1], [2, 3]),
        ([0, 1, 2], [0, 3], [2, 3]),  # outside
        ([0, 1, 2], [-1, 1], [2, 3]),
        ([0, 2, 2], [1, 1], [2, 3]),  # one cell twice
        ([0, 2, 2], [1, 0], [2, 3]),  # out of order
        ([0, 1, 2], [0, 1], [6]),
        ([0, 1, 2], [0, 1], None),
        ([0, 1, 2], [0, 1], [2, -3]),
    ],
)
def test_contradictory_csr_is_refused(
    crow: list[int], col: list[int], shape: list[int] | None
) -> None:
    values = np.array([5, 6], np.int64)
    with pytest.raises(InvalidRequest):
        sparse(values, np.array(crow), np.array(col), shape, Growth(MEGABYTE))


def test_growth_is_one_allowance_for_all_tensors_of_a_request() -> None:
    growth = Growth(1000)
    values, crow, col = csr_of(np.eye(10, dtype=np.float32))  # 400 bytes filled in
    for _ in range(2):
        sparse(values, crow, col, [10, 10], growth)
    with pytest.raises(InvalidRequest, match="grow"):
        sparse(values, crow, col, [10, 10], growth)


@given(st.integers(2**20, 2**62))
def test_a_huge_shape_costs_nothing(num_cols: int) -> None:
    nothing: NDArray[np.int64] = np.empty(0, np.int64)
    with pytest.raises(InvalidRequest, match="grow"):
        sparse(nothing, np.zeros(3, np.int64), nothing, [2, num_cols], Growth(MEGABYTE))


def test_datum_needs_integer_targets_and_widens_the_rest() -> None:
    tokens = np.arange(2, dtype=np.int32)
    targets = np.array([1, 2], np.int64)
    datum = datum_of(tokens, {"target_tokens": targets, "weights": np.array([0, 1], np.int64)})
    assert datum.loss_inputs["weights"].dtype == np.float32
    with pytest.raises(InvalidRequest, match="target_tokens"):
        datum_of(tokens, {"weights": np.ones(2, np.float32)})
    with pytest.raises(InvalidRequest, match="integers"):
        datum_of(tokens, {"target_tokens": np.ones(2, np.float32)})
