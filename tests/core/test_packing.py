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
    Datum,
    ForwardBackward,
    LossName,
    LossSpec,
    SampleRequest,
    SamplingParams,
    Stop,
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
        | st.dictionaries(st.text().filter(lambda key: not key.startswith("$")), inner)
    ),
    max_leaves=20,
)
arrays = hnp.arrays(
    st.sampled_from([np.int32, np.int64, np.float32, np.uint8]),
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
    assert back.loss.name is LossName.PPO
    assert back.data[1].target_tokens.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert back.num_tokens == 6


def test_sampling_requests_keep_their_defaults_and_64_bit_seeds() -> None:
    params = SamplingParams(seed=2**63 - 1, stop=Stop(strings=("\n",), end_of_sequence=False))
    request = SampleRequest(prompt=np.array([1], np.int32), params=params)
    assert packing.unpack(packing.pack(request)).params == params


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
