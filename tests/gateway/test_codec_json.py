import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.arrays import csr_of, matrices
from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.types import (
    ForwardBackwardResult,
    SampledSequence,
    SampleResult,
    Stop,
    StopReason,
)
from twinkle_dask_gateway.tinker import wire
from twinkle_dask_gateway.tinker.codec_json import (
    batch_of,
    forward_backward_json,
    sample_json,
    sample_request_of,
    stop_of,
    tokens_of,
)
from twinkle_dask_gateway.tinker.reading import check
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
        {"data": [1, 2, 3], "dtype": "int64", "shape": [2]},
        {"data": [1, 2, 3], "dtype": "bfloat16"},
        {"data": [1, 2, 3], "dtype": "float32", "sparse_col_indices": [1, 2, 3]},
    ],
)
def test_bad_tensors_are_refused(tensor: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        decode(tensor)


@pytest.mark.parametrize(
    ("stop", "means"),
    [
        (None, Stop()),
        ([], Stop(end_of_sequence=False)),
        ("\n", Stop(strings=("\n",))),
        (["a", "b"], Stop(strings=("a", "b"))),
        ([7, 8], Stop(tokens=(7, 8))),
    ],
)
def test_stop_keeps_absent_and_empty_apart(stop: Any, means: Stop) -> None:
    assert stop_of(check(wire.SamplingParams, {"stop": stop}).stop) == means


def sample(**fields: Any) -> wire.Sample:
    body = {
        "sampling_session_id": "s:sample:0",
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        "sampling_params": {},
    }
    return check(wire.Sample, body | fields)


def test_sample_defaults_and_folded_seed() -> None:
    request = sample_request_of(sample())
    assert request.prompt.dtype == np.int32
    assert request.params.max_tokens is None
    assert not request.prompt_logprobs
    seeded = sample_request_of(sample(sampling_params={"seed": -1}))
    assert seeded.params.seed == 2**63 - 1


@pytest.mark.parametrize(
    "chunk",
    [
        {"type": "image", "data": "", "format": "png"},
        {"data": "", "format": "png"},
        {"location": "x"},
        {"type": "dmel", "dmel": ""},
        {},
    ],
)
def test_what_is_no_text_is_refused_by_kind(chunk: dict[str, Any]) -> None:
    with pytest.raises(NotSupported, match="The prompt: chunks of kind"):
        sample_request_of(sample(prompt={"chunks": [chunk]}))


@pytest.mark.parametrize("tokens", [None, "12", [1.5], [2**31], [-(2**31) - 1], ["1"], [[1]]])
def test_bad_tokens_are_refused(tokens: Any) -> None:
    chunks = [{"type": "encoded_text", "tokens": tokens}]
    with pytest.raises(InvalidRequest):
        tokens_of(wire.ModelInput(chunks=chunks))


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
    sequence = SampledSequence(
        tokens=np.array([4], np.int32),
        logprobs=np.array([-0.5], np.float32),
        stop_reason=StopReason.LENGTH,
    )
    scores = np.array([np.nan, -0.5], np.float32)
    body = json.loads(sample_json(SampleResult(sequences=(sequence,), prompt_logprobs=scores)))
    assert body["sequences"] == [{"stop_reason": "length", "tokens": [4], "logprobs": [-0.5]}]
    assert body["prompt_logprobs"] == [None, -0.5]
