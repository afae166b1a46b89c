"""What goes through a buffer comes out the same, and nothing else comes out."""

import struct
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from twinkle_dask import packing
from twinkle_dask.types import (
    CsrLayout,
    CustomLoss,
    Datum,
    ForwardBackward,
    LossName,
    LossSpec,
    SampledSequence,
    SampleRequest,
    SampleResult,
    SamplingParams,
    ScoredTokens,
    Stop,
    StopReason,
    TargetLogprobs,
    TargetTokens,
)

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text()
    | st.binary()
    | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.sampled_from(["$t", "$a", "$b", "$f", "$$t"]), inner)
    ),
    max_leaves=20,
)
arrays = hnp.arrays(
    st.sampled_from([np.int32, np.int64, np.float32, np.uint8, np.bool_]),
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=0),
)


@given(plain)
def test_plain_values_come_back(value: object) -> None:
    assert packing.unpack(packing.pack(value)) == value


@given(st.lists(arrays, max_size=5))
def test_arrays_come_back_bit_for_bit(values: list[np.ndarray]) -> None:
    back = packing.unpack(packing.pack(values))
    assert len(back) == len(values)
    for one, other in zip(values, back, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()


def test_values_come_back_as_their_classes() -> None:
    datum = Datum(
        tokens=np.arange(3, dtype=np.int32),
        target_tokens=np.arange(6).reshape(3, 2),
        loss_inputs={"weights": np.ones((3, 2), np.float32)},
    )
    loss = LossSpec(name=LossName.PPO, config={"clip_low_threshold": 0.5})
    back = packing.unpack(packing.pack(ForwardBackward(data=(datum, datum), loss=loss)))
    assert isinstance(back, ForwardBackward)
    assert back.loss == loss
    assert back.data[1].target_tokens.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert back.num_tokens == 6


def test_a_batch_carries_its_custom_loss() -> None:
    """So that a replay needs nothing else; integers and scalars stay what they are."""
    datum = Datum(
        tokens=np.arange(3, dtype=np.int32),
        target_tokens=np.arange(3),
        loss_inputs={},
        custom_inputs={"labels": np.arange(3), "scale": np.array(0.5, np.float32)},
    )
    ranks = {"logprobs": 1, "labels": 1, "scale": 0}
    loss = CustomLoss(id="x", name="mine", ranks=ranks, graph='{"$t": "Datum"}')
    back = packing.unpack(packing.pack(ForwardBackward(data=(datum,), loss=loss)))
    assert isinstance(back, ForwardBackward)
    assert back.loss == loss
    (found,) = back.data
    assert found.custom_inputs["labels"].dtype == np.int64
    assert found.custom_inputs["scale"].shape == ()
    assert float(found.custom_inputs["scale"]) == 0.5


def test_sampling_requests_keep_their_defaults_and_64_bit_seeds() -> None:
    params = SamplingParams(seed=2**63 - 1, stop=Stop(strings=("\n",), end_of_sequence=False))
    request = SampleRequest(prompt=np.array([1], np.int32), params=params)
    assert packing.unpack(packing.pack(request)).params == params


def test_questions_about_a_prompt_and_their_answers_travel() -> None:
    layout = CsrLayout(crow=np.array([0, 1]), col=np.array([4]), num_columns=2**40)
    scored = ScoredTokens(
        tokens=np.array([[1, 2]], np.int32), logprobs=np.array([[np.nan, -1]], np.float32)
    )
    request = SampleRequest(
        prompt=np.array([1, 2], np.int32),
        params=SamplingParams(),
        prompt_logprobs=True,
        prompt_logprobs_last_n=1,
        topk_prompt_logprobs=2,
        topk_sample_logprobs=3,
        target_prompt_logprobs=TargetTokens(tokens=np.array([7]), layout=layout),
        prompt_alt_tokens_k=4,
    )
    sequence = SampledSequence(
        tokens=np.array([1], np.int32),
        logprobs=np.array([-1], np.float32),
        stop_reason=StopReason.STOP,
        topk_logprobs=scored,
    )
    result = SampleResult(
        sequences=(sequence,),
        topk_prompt_logprobs=scored,
        target_prompt_logprobs=TargetLogprobs(logprobs=np.array([-2], np.float32), layout=layout),
        prompt_alt_tokens=scored,
    )
    for value in (request, result):
        packed = packing.pack(value)
        again = packing.unpack(packed)
        assert packing.pack(again) == packed
        assert repr(again) == repr(value)


def test_infinities_travel() -> None:
    back = packing.unpack(packing.pack({"a": float("inf"), "b": float("nan")}))
    assert back["a"] == float("inf")
    assert back["b"] != back["b"]


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(packing.UnreadableBuffer):
        packing.unpack(data)


@given(st.integers(0, 400))
def test_truncation_is_refused(size: int) -> None:
    whole = packing.pack({"a": np.arange(100)})
    if size < len(whole):
        with pytest.raises(packing.UnreadableBuffer):
            packing.unpack(whole[:size])


def test_an_unknown_version_is_refused() -> None:
    whole = bytearray(packing.pack(1))
    struct.pack_into("<H", whole, 4, packing.VERSION + 1)
    with pytest.raises(packing.UnreadableBuffer, match="version"):
        packing.unpack(whole)


def test_only_registered_classes_are_built() -> None:
    @dataclass(frozen=True)
    class Stranger:
        a: int

    with pytest.raises(TypeError, match="register"):
        packing.pack(Stranger(a=1))
    forged = packing.pack({"x": 1}).replace(b'{"x":1}', b'{"$t":"Popen"}'[:7])
    with pytest.raises(packing.UnreadableBuffer):
        packing.unpack(forged)


def test_float64_does_not_travel() -> None:
    with pytest.raises(TypeError, match="float64"):
        packing.pack(np.zeros(3))
