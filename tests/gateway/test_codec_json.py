import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.arrays import csr_of, matrices
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import (
    ForwardBackwardResult,
)
from twinkle_dask_gateway.reading import check
from twinkle_dask_gateway.tinker import wire
from twinkle_dask_gateway.tinker.codec_json import (
    batch_of,
    forward_backward_json,
)
from twinkle_dask_gateway.tinker.tensors import Array, Growth


def decode(weights: dict[str, Any]) -> Array:
    # SDK 0.16 sends chunks without type and leaves out what is default.
    datum = {
        "model_input": {"chunks": [{"tokens": [1, 2]}, {"tokens": [3]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": [2, 3, 4], "dtype": "int64"},
            "weights": weights,
        },
    }
    body = {"model_id": "m", "forward_input": {"data": [datum], "loss_fn": "cross_entropy"}}
    batch = batch_of(check(wire.Forward, body).batch, backward=False, growth=Growth(2**20))
    assert batch.data[0].tokens.tolist() == [1, 2, 3]
    assert batch.data[0].target_tokens.tolist() == [2, 3, 4]
    return batch.data[0].loss_inputs["weights"]


@given(matrices(), st.booleans())
def test_any_tensor_arrives_as_it_was(array: Array, as_csr: bool) -> None:
    tensor: dict[str, Any] = {
        "dtype": "int64" if array.dtype == np.int64 else "float32",
        "shape": list(array.shape),
    }
    if as_csr:
        values, crow, col = csr_of(array)
        tensor["sparse_crow_indices"] = crow.tolist()
        tensor["sparse_col_indices"] = col.tolist()
        tensor["data"] = values.tolist()
    else:
        tensor["data"] = array.reshape(-1).tolist()
    sent = json.loads(json.dumps(tensor))
    np.testing.assert_array_equal(decode(sent), array.astype(np.float32))


@pytest.mark.parametrize(
    "tensor",
    [
        {"data": ["1", "2", "3"], "dtype": "float32"},
        {"data": [True, False, True], "dtype": "float32"},
        {"data": [[1], [2], [3]], "dtype": "float32"},
        {"data": [1, [2], 3], "dtype": "float32"},
        {"data": [None, 1, 2], "dtype": "float32"},
        {"data": [10**400, 1, 2], "dtype": "int64"},
        {"data": [0.5, 1, 2], "dtype": "int64"},
        {"data": [1] * 2**16 + [0.5], "dtype": "int64"},
        {"data": [1] * 2**16 + [[1]], "dtype": "float32"},
        {"data": [1] * 2**16 + ["1"], "dtype": "float32"},
        {"data": [1] * 2**16 + [None], "dtype": "float32"},
        {"data": [1] * 2**16 + [10**400], "dtype": "int64"},
        {"data": [1, 2, 3] + [1] * 2**16, "dtype": "int64", "shape": [3]},
        {"data": [1, 2, 3], "dtype": "int64", "shape": [2]},
        {"data": [1, 2, 3], "dtype": "bfloat16"},
        {"data": [1, 2, 3], "dtype": "float32", "sparse_col_indices": [1, 2, 3]},
    ],
)
def test_bad_tensors_are_refused(tensor: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        decode(tensor)


def test_results_for_old_clients() -> None:
    logprobs = (np.array([[-1.0], [-2.0]], np.float32), np.array([-3.0], np.float32))
    result = ForwardBackwardResult(logprobs=logprobs, metrics={"loss:sum": 6.0})
    body = json.loads(forward_backward_json(result))
    assert body["metrics"] == {"loss:sum": 6.0}
    assert body["loss_fn_outputs"][0]["logprobs"] == {
        "data": [-1.0, -2.0],
        "dtype": "float32",
        "shape": [2, 1],
    }
