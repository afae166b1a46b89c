"""Inputs of the Twinkle protocol as rows."""

import contextlib
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask.errors import InvalidRequest, NotSupported, RequestError
from twinkle_dask_gateway.twinkle.features import IGNORED, elements, padded, rows_of
from twinkle_dask_gateway.twinkle.passes import PassArguments, batch_of


def test_a_plain_feature_is_one_row() -> None:
    (row,) = rows_of([{"input_ids": [3, 4, 5], "labels": [4, 5, IGNORED], "messages": []}])
    assert row.tokens.dtype == np.int32
    assert row.labels is not None
    assert row.labels.tolist() == [4, 5, IGNORED]
    assert (row.start, row.length, row.group) == (0, 3, None)


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=2, max_size=6), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 3),
)
def test_padding_and_packing_give_the_rows_that_they_were_made_of(
    sequences: list[list[int]], left: bool, more: int
) -> None:
    plain = rows_of([{"input_ids": one, "labels": one} for one in sequences])
    width = max(len(one) for one in sequences) + more

    def pad(values: list[int], filler: int) -> list[int]:
        filling = [filler] * (width - len(values))
        return filling + values if left else values + filling

    batch = {
        "input_ids": [pad(one, 0) for one in sequences],
        "labels": [pad(one, IGNORED) for one in sequences],
        "attention_mask": [pad([1] * len(one), 0) for one in sequences],
        "position_ids": [pad(list(range(len(one))), -1) for one in sequences],
    }
    packed = {
        "input_ids": [list(chain.from_iterable(sequences))],
        "labels": [list(chain.from_iterable(sequences))],
        "position_ids": [[at for one in sequences for at in range(len(one))]],
    }
    whole = rows_of([batch])
    for made in (whole, rows_of([packed])):
        assert [row.tokens.tolist() for row in made] == [row.tokens.tolist() for row in plain]
        assert [row.labels is not None and row.labels.tolist() for row in made] == sequences
    # Answers stand where the tokens stood.
    values = padded(whole, [row.tokens for row in whole])
    assert values.tolist() == [pad(one, 0) for one in sequences]


@pytest.mark.parametrize("labels", [1, [1], [[1]]])
def test_one_label_for_a_row(labels: Any) -> None:
    (row,) = rows_of([{"input_ids": [3, 4, 5], "labels": labels}])
    assert (row.labels, row.group) == (None, 1)
    embeds = PassArguments.of({"task": "embedding"})
    assert batch_of([row], embeds).labels[0].tolist() == [1]
    with pytest.raises(InvalidRequest, match="one for each token"):
        batch_of([row], PassArguments.of({}))


@pytest.mark.parametrize(
    ("feature", "error"),
    [
        ({"input_ids": []}, InvalidRequest),
        ({"input_ids": [[1, 2], [3]]}, InvalidRequest),
        ({"input_ids": [1.5, 2.0]}, InvalidRequest),
        ({"input_ids": [-1]}, InvalidRequest),
        ({"input_ids": [2**31]}, InvalidRequest),
        ({"input_ids": [2**70]}, InvalidRequest),
        ({"input_ids": [True, False]}, InvalidRequest),
        ({"input_ids": [5, True]}, InvalidRequest),
        ({"input_ids": [[5, 6], [7, True]]}, InvalidRequest),
        ({"input_ids": [1, 2], "labels": [2**63, 2**64 - 100]}, InvalidRequest),
        ({"input_ids": [1, 2], "attention_mask": [1, float("nan")]}, InvalidRequest),
        ({"input_ids": [[[1]]]}, InvalidRequest),
        ({"input_ids": [1, 2], "labels": [1, 2, 3]}, InvalidRequest),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, InvalidRequest),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, NotSupported),
        ({"input_ids": [1, 2, 3], "position_ids": [0, 1, 3]}, NotSupported),
        ({"input_ids": [1, 2], "position_ids": [[[0, 1]], [[0, 2]]]}, NotSupported),
        ({"input_ids": [1, 2], "pixel_values": [1.0]}, NotSupported),
        ({"input_ids": [1, 2], "inputs_embeds": [[1.0]]}, NotSupported),
        ({"input_ids": [1, 2], "labels": [1, 2], "completion_mask": [1, 0]}, NotSupported),
    ],
)
def test_what_is_refused(feature: Any, error: type[RequestError]) -> None:
    with pytest.raises(error, match=r"inputs\[0\]"):
        rows_of([feature])


def test_what_says_nothing_more_is_let_be() -> None:
    feature = {
        "input_ids": [1, 2],
        "labels": [2, IGNORED],
        "attention_mask": [1, 1],
        "position_ids": [[[0, 1]], [[0, 1]], [[0, 1]]],
        "completion_mask": [True, False],
        "mm_token_type_ids": [0, 0],
        "loss_scale": [1.0, 1.0],
        "pixel_values": None,
        "images": [],
        "length": 2,
    }
    assert len(rows_of([feature])) == 1


@pytest.mark.parametrize("inputs", [None, "text", 3, [], [[1, 2]], [None]])
def test_inputs_are_objects(inputs: Any) -> None:
    with pytest.raises(InvalidRequest, match="inputs"):
        elements(inputs)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(["input_ids", "labels", "attention_mask", "position_ids", "loss_scale"]),
)
def test_anything_else_is_refused_with_a_sentence(value: Any, name: str) -> None:
    with contextlib.suppress(RequestError):
        rows_of([{"input_ids": [1, 2, 3], name: value}])


@pytest.mark.parametrize(
    "extra",
    [
        {"task": "something"},
        {"temperature": 0},
        {"temperature": "hot"},
        {"return_logits": 1},
        {"disable_lora": True},
        {"gradient_accumulation_steps": 0},
        {"task": "fused_lm_ce"},
        {"router_replay_action": "record"},
    ],
)
def test_arguments_that_are_refused(extra: Any) -> None:
    with pytest.raises(RequestError):
        PassArguments.of(extra)


def test_the_rest_is_the_losss() -> None:
    given_arguments = PassArguments.of(
        {"advantages": [1.0], "temperature": 2, "gradient_accumulation_steps": 3, "task": None}
    )
    assert given_arguments.loss == {"advantages": [1.0]}
    assert (given_arguments.temperature, given_arguments.accumulation) == (2.0, 3)
