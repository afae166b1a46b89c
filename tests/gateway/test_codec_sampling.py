"""Requests for samples as clients write them, and answers as the SDK and old SDKs read them."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tinker import types
from tinker.proto.response_conv import deserialize_sample_response
from tinker.types._pydantic_types.tensor_data import TensorData as SentTensor

from tests.gateway.arrays import csr_of, matrices
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import (
    CsrLayout,
    SampledSequence,
    SampleResult,
    ScoredTokens,
    Stop,
    StopReason,
    TargetLogprobs,
)
from twinkle_dask_gateway.reading import check
from twinkle_dask_gateway.tinker import replies, wire
from twinkle_dask_gateway.tinker.codec_sampling import (
    num_bytes,
    sample_bytes,
    sample_json,
    sample_request_of,
    stop_of,
)
from twinkle_dask_gateway.tinker.tensors import Array

SEQUENCE = SampledSequence(
    tokens=np.array([4], np.int32),
    logprobs=np.array([-0.5], np.float32),
    stop_reason=StopReason.LENGTH,
)
TOP = ScoredTokens(
    tokens=np.array([[0, 0], [7, 0], [0, 3]], np.int32),
    logprobs=np.array([[np.nan, np.nan], [-0.5, -1.5], [0, -np.inf]], np.float32),
)
LAYOUT = CsrLayout(crow=np.array([0, 2, 2]), col=np.array([1, 5]), num_columns=6)
SPARSE = TargetLogprobs(logprobs=np.array([-1, 0], np.float32), layout=LAYOUT)
DENSE = TargetLogprobs(logprobs=np.array([[-1, 0], [0, -2]], np.float32))


def sample(**fields: Any) -> wire.Sample:
    body = {
        "sampling_session_id": "s:sample:0",
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        "sampling_params": {},
    }
    return check(wire.Sample, body | fields)


# ---- requests


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


def test_sample_defaults_and_folded_seed() -> None:
    # Old SDKs leave out what is default, or write null.
    for unset in ({}, dict.fromkeys(("topk_prompt_logprobs", "topk_sample_logprobs"))):
        request = sample_request_of(sample(**unset))
        assert request.prompt.dtype == np.int32
        assert request.params.max_tokens is None
        assert not request.prompt_logprobs
        assert request.prompt_logprobs_last_n is None
        assert request.topk_prompt_logprobs == request.topk_sample_logprobs == 0
        assert request.target_prompt_logprobs is None
        assert request.prompt_alt_tokens_k == 0
    seeded = sample_request_of(sample(sampling_params={"seed": -1}))
    assert seeded.params.seed == 2**63 - 1


def test_questions_about_the_prompt_arrive() -> None:
    request = sample_request_of(
        sample(
            prompt_logprobs=True,
            prompt_logprobs_last_n=1,
            topk_prompt_logprobs=2,
            topk_sample_logprobs=3,
            prompt_alt_tokens_k=4,
        )
    )
    assert (request.prompt_logprobs, request.prompt_logprobs_last_n) == (True, 1)
    assert (request.topk_prompt_logprobs, request.topk_sample_logprobs) == (2, 3)
    assert request.prompt_alt_tokens_k == 4


@given(matrices(), st.booleans())
def test_any_targets_arrive_in_their_layout(array: Array, as_csr: bool) -> None:
    array = array.astype(np.int64) if array.dtype == np.int64 else np.sign(array).astype(np.int64)
    tensor: dict[str, Any] = {"dtype": "int64", "shape": list(array.shape)}
    if as_csr:
        values, crow, col = csr_of(array)
        tensor |= {"sparse_crow_indices": crow.tolist(), "sparse_col_indices": col.tolist()}
        tensor["data"] = values.tolist()
    else:
        tensor["data"] = array.reshape(-1).tolist()
    sent = json.loads(json.dumps(tensor))
    targets = sample_request_of(sample(target_prompt_logprobs=sent)).target_prompt_logprobs
    assert targets is not None
    if as_csr:
        values, crow, col = csr_of(array)
        assert targets.layout is not None
        assert np.array_equal(targets.tokens, values)
        assert np.array_equal(targets.layout.crow, crow)
        assert np.array_equal(targets.layout.col, col)
        assert targets.layout.num_columns == array.shape[1]
    else:
        assert targets.layout is None
        assert np.array_equal(targets.tokens, array)


def test_long_lists_arrive_whole() -> None:
    tokens = list(range(200_000))
    sent = {"data": tokens, "dtype": "int64", "shape": [100_000, 2]}
    targets = sample_request_of(sample(target_prompt_logprobs=sent)).target_prompt_logprobs
    assert targets is not None
    assert targets.tokens.dtype == np.int64
    assert targets.tokens.reshape(-1).tolist() == tokens


def test_a_sparse_tensor_of_the_sdk_arrives() -> None:
    sent = types.TensorData(
        data=[5, -1, 6],
        dtype="int64",
        shape=[3, 10**6],
        sparse_crow_indices=[0, 2, 2, 3],
        sparse_col_indices=[0, 999_999, 4],
    )
    fields = {name: getattr(sent, name) for name in SentTensor.model_fields}
    targets = sample_request_of(sample(target_prompt_logprobs=fields)).target_prompt_logprobs
    assert targets is not None
    assert targets.layout is not None
    assert targets.tokens.tolist() == [5, -1, 6]
    assert targets.layout.num_columns == 10**6


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"data": [1, 2.5]},
        {"data": [1, "2"]},
        {"shape": [3, 1]},
        {"shape": [-2, -1]},
        {"data": [], "shape": [0, 10**30]},
        {"data": [], "shape": [0, 2**31, 2**31, 2**31]},
        {"sparse_col_indices": [0, 1]},
        {"sparse_crow_indices": [0, 1, 2], "sparse_col_indices": [0, 1], "shape": None},
        {"sparse_crow_indices": [0, 1, 2], "sparse_col_indices": [0, 1], "shape": [2, 10**30]},
        {"sparse_crow_indices": [0, 1, 2], "sparse_col_indices": [0, 2], "shape": [2, 2]},
        {"sparse_crow_indices": [0, 2, 2], "sparse_col_indices": [1, 1], "shape": [2, 2]},
        {"sparse_crow_indices": [0, 2, 2], "sparse_col_indices": [1, 0], "shape": [2, 2]},
        {"sparse_crow_indices": [0, 3, 2], "sparse_col_indices": [0, 1], "shape": [2, 2]},
        {"sparse_crow_indices": [0, -1, 2], "sparse_col_indices": [0, 1], "shape": [2, 2]},
    ],
    ids=str,
)
def test_targets_that_contradict_themselves_are_refused(change: dict[str, Any]) -> None:
    tensor = {"data": [1, 2], "dtype": "int64", "shape": [2, 1]} | change
    with pytest.raises(InvalidRequest, match=r"^target_prompt_logprobs: .*\.$"):
        sample_request_of(sample(target_prompt_logprobs=tensor))


# ---- protobuf


def test_the_sdk_reads_our_samples() -> None:
    sequences = tuple(
        SampledSequence(
            tokens=np.arange(1, n + 1, dtype=np.int32),
            logprobs=np.linspace(-1, 0, n, dtype=np.float32),
            stop_reason=reason,
        )
        for n, reason in [(3, StopReason.STOP), (1, StopReason.LENGTH)]
    )
    scores = np.array([np.nan, -0.5], np.float32)
    read = deserialize_sample_response(
        sample_bytes(SampleResult(sequences=sequences, prompt_logprobs=scores))
    )
    assert [s.stop_reason for s in read.sequences] == ["stop", "length"]
    assert read.sequences[0].tokens == [1, 2, 3]
    assert read.sequences[0].logprobs == [-1.0, -0.5, 0.0]
    assert read.prompt_logprobs == [None, -0.5]
    without = deserialize_sample_response(sample_bytes(SampleResult(sequences=sequences)))
    assert without.prompt_logprobs is None
    assert without.topk_prompt_logprobs is None
    assert without.target_prompt_logprobs is None
    assert without.prompt_alt_tokens is None
    assert without.prompt_cache_hit_tokens == 0
    assert without.sequences[0].topk_logprobs is None


def test_the_sdk_reads_the_likeliest_tokens() -> None:
    sequence = SampledSequence(
        tokens=np.array([7, 0], np.int32),
        logprobs=np.array([-0.5, 0], np.float32),
        stop_reason=StopReason.STOP,
        topk_logprobs=ScoredTokens(tokens=TOP.tokens[1:], logprobs=TOP.logprobs[1:]),
    )
    result = SampleResult(sequences=(sequence,), topk_prompt_logprobs=TOP)
    read = deserialize_sample_response(sample_bytes(result))
    rows = [[(7, -0.5), (0, -1.5)], [(0, 0.0), (3, -np.inf)]]
    assert read.topk_prompt_logprobs == [None, *rows]
    assert read.sequences[0].topk_logprobs == rows


@pytest.mark.parametrize("shape", [(2, 3), (3, 1), (0, 4)])
def test_the_sdk_reads_dense_targets_and_alternatives(shape: tuple[int, int]) -> None:
    logprobs = np.linspace(-3, 0, shape[0] * shape[1], dtype=np.float32).reshape(shape)
    tokens = np.arange(logprobs.size, dtype=np.int32).reshape(shape)
    result = SampleResult(
        sequences=(SEQUENCE,),
        target_prompt_logprobs=TargetLogprobs(logprobs=logprobs),
        prompt_alt_tokens=ScoredTokens(tokens=tokens, logprobs=logprobs),
    )
    read = deserialize_sample_response(sample_bytes(result))
    assert read.target_prompt_logprobs is not None
    assert read.prompt_alt_tokens is not None
    for tensor in (read.target_prompt_logprobs, read.prompt_alt_tokens.logprobs):
        assert tensor.dtype == "float32"
        assert tensor.shape == list(shape)
        assert np.array_equal(tensor.to_numpy(), logprobs)
    assert read.prompt_alt_tokens.tokens.dtype == "int64"
    assert np.array_equal(read.prompt_alt_tokens.tokens.to_numpy(), tokens)


def test_the_sdk_reads_sparse_targets_as_sparse() -> None:
    result = SampleResult(sequences=(SEQUENCE,), target_prompt_logprobs=SPARSE)
    read = deserialize_sample_response(sample_bytes(result)).target_prompt_logprobs
    assert read is not None
    assert (read.shape, read.data) == ([2, 6], [-1.0, 0.0])
    assert read.sparse_crow_indices == [0, 2, 2]
    assert read.sparse_col_indices == [1, 5]
    assert read.to_numpy().tolist() == [[0, -1, 0, 0, 0, 0], [0] * 6]


# ---- JSON


def test_old_sdks_read_our_samples() -> None:
    scores = np.array([np.nan, -0.5], np.float32)
    body = json.loads(sample_json(SampleResult(sequences=(SEQUENCE,), prompt_logprobs=scores)))
    assert body == {
        "type": "sample",
        "sequences": [{"stop_reason": "length", "tokens": [4], "logprobs": [-0.5]}],
        "prompt_logprobs": [None, -0.5],
        "topk_prompt_logprobs": None,
    }
    body = json.loads(sample_json(SampleResult(sequences=(SEQUENCE,), topk_prompt_logprobs=TOP)))
    assert body["topk_prompt_logprobs"] == [None, [[7, -0.5], [0, -1.5]], [[0, 0], [3, -99999]]]
    assert body["prompt_logprobs"] is None


def test_newer_answers_as_json() -> None:
    sequence = SampledSequence(
        tokens=np.array([7], np.int32),
        logprobs=np.array([-0.5], np.float32),
        stop_reason=StopReason.STOP,
        topk_logprobs=ScoredTokens(tokens=TOP.tokens[1:2], logprobs=TOP.logprobs[1:2]),
    )
    result = SampleResult(
        sequences=(sequence,),
        target_prompt_logprobs=SPARSE,
        prompt_alt_tokens=ScoredTokens(tokens=TOP.tokens[1:2], logprobs=TOP.logprobs[1:2]),
    )
    body = json.loads(sample_json(result))
    assert body["sequences"][0]["topk_logprobs"] == [[[7, -0.5], [0, -1.5]]]
    assert body["target_prompt_logprobs"] == {
        "data": [-1, 0],
        "dtype": "float32",
        "shape": [2, 6],
        "sparse_crow_indices": [0, 2, 2],
        "sparse_col_indices": [1, 5],
    }
    assert body["prompt_alt_tokens"] == {
        "tokens": {"data": [7, 0], "dtype": "int64", "shape": [1, 2]},
        "logprobs": {"data": [-0.5, -1.5], "dtype": "float32", "shape": [1, 2]},
    }


def test_all_of_it_is_as_the_document_tells() -> None:
    sequence = replace(SEQUENCE, topk_logprobs=TOP)
    everything = SampleResult(
        sequences=(sequence,),
        prompt_logprobs=np.array([np.nan, -1], np.float32),
        topk_prompt_logprobs=TOP,
        target_prompt_logprobs=SPARSE,
        prompt_alt_tokens=TOP,
    )
    for result in (everything, replace(everything, target_prompt_logprobs=DENSE)):
        written = sample_json(result)
        told = replies.SampleResult.model_validate_json(written, strict=True)
        assert told.model_dump(exclude_unset=True) == json.loads(written)


def test_all_that_is_encoded_counts() -> None:
    plain = SampleResult(sequences=(SEQUENCE,) * 3)
    assert num_bytes(plain) == 3 * 8
    everything = SampleResult(
        sequences=(SEQUENCE,) * 3,
        prompt_logprobs=np.zeros(5, np.float32),
        topk_prompt_logprobs=TOP,
        target_prompt_logprobs=SPARSE,
        prompt_alt_tokens=TOP,
    )
    assert num_bytes(everything) == 3 * 8 + 5 * 8 + 2 * 6 * 8 + 2 * 8
