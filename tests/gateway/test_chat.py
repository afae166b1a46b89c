"""The face of chat completions by its parts: cutting at stop texts, tool calls, failures."""

import pickle

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.test_errors import ours
from twinkle_dask import errors
from twinkle_dask_gateway.openai.answering import delta_of, message_of
from twinkle_dask_gateway.openai.cutting import Cut
from twinkle_dask_gateway.openai.errors import SHOWN, WrongField, body_of

_REPEATED = {408, 409, 429, 500, 502, 503, 504}


@given(
    st.lists(st.text("ab<", max_size=4), max_size=12),
    st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_however_it_comes(
    pieces: list[str], stops: list[str]
) -> None:
    """As drawing does, which ends at the first piece with which a stop text is complete."""
    cut, told, seen = Cut(stops), "", ""
    for piece in pieces:
        told += cut.add(piece)
        seen += piece
        assert seen.startswith(told)
        if any(stop in seen for stop in stops):
            break
    told += cut.rest()
    ends = [seen.index(stop) for stop in stops if stop in seen]
    assert told == (seen[: min(ends)] if ends else seen)
    assert cut.ended == bool(ends)


def test_tool_calls_are_read_out_of_the_text() -> None:
    text = 'Let me see. <tool_call>{"name": "f", "arguments": {"a": [1]}}</tool_call>'
    assert message_of(text, calls=False) == {"role": "assistant", "content": text}
    message = message_of(text, calls=True)
    assert message["content"] == "Let me see."
    (call,) = message["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "f"
    assert orjson.loads(call["function"]["arguments"]) == {"a": [1]}
    assert delta_of(message)["tool_calls"] == [{"index": 0, **call}]
    alone = message_of(text.removeprefix("Let me see. "), calls=True)
    assert alone["content"] is None
    assert delta_of(message_of("words", calls=True)) == {"content": "words"}


@pytest.mark.parametrize("leaf", ours, ids=lambda leaf: leaf.__name__)
def test_every_failure_is_shown(leaf: type[errors.TwinkleDaskError]) -> None:
    shown = SHOWN[leaf]
    error = body_of(leaf("what happened"))["error"]
    assert error["message"].startswith("what happened")
    assert (error["type"], error["code"]) == (shown.type, shown.code)
    if issubclass(leaf, errors.RequestError) and leaf is not errors.SessionEnded:
        assert shown.status not in _REPEATED


def test_the_table_has_no_row_too_many() -> None:
    assert set(SHOWN) == set(ours)


def test_a_wrong_field_pickles() -> None:
    again = pickle.loads(pickle.dumps(WrongField("what", "which")))
    assert (again.message, again.param) == ("what", "which")
