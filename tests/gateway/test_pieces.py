"""JSON in pieces is the JSON that it is as a whole."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask_gateway.pieces import MAX_LEVELS, load

TEXTS = st.text(st.sampled_from('ab"\\,:[]{} \nü€'), max_size=12)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(-1e9, 1e9) | TEXTS,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=40,
)
SIZES = st.integers(1, 40)


def parsed(document: bytes, piece_bytes: int | None = None) -> Any:
    """What a parser makes of a document; None where it refuses (beside null, which it may be)."""
    try:
        return [orjson.loads(document) if piece_bytes is None else load(document, piece_bytes)]
    except orjson.JSONDecodeError:
        return None


@given(VALUES, SIZES, st.booleans())
def test_pieces_give_what_the_whole_gives(value: Any, piece_bytes: int, indented: bool) -> None:
    document = orjson.dumps(value, option=orjson.OPT_INDENT_2 if indented else None)
    assert load(document, piece_bytes) == orjson.loads(document)


@given(VALUES, SIZES, st.integers(0), st.sampled_from(list('"\\,:[]{} 1')) | st.just(""))
def test_pieces_refuse_what_the_whole_refuses(
    value: Any, piece_bytes: int, place: int, changed: str
) -> None:
    document = orjson.dumps(value)
    place %= len(document)
    document = document[:place] + changed.encode() + document[place + 1 :]
    assert parsed(document, piece_bytes) == parsed(document)


@given(st.text(st.sampled_from('[]{},:"1\\ '), max_size=30), st.integers(1, 8))
def test_any_signs_are_judged_alike(text: str, piece_bytes: int) -> None:
    assert parsed(text.encode(), piece_bytes) == parsed(text.encode())


def test_large_parts_may_not_lie_deep() -> None:
    numbers = orjson.dumps(list(range(100)))
    deepest = b"[" * (MAX_LEVELS - 1) + numbers + b"]" * (MAX_LEVELS - 1)
    assert load(deepest, 100) == orjson.loads(deepest)
    with pytest.raises(orjson.JSONDecodeError, match="levels"):
        load(b"[" + deepest + b"]", 100)


def test_an_error_names_its_place() -> None:
    document = orjson.dumps({"a": list(range(1000)), "b": [1, 2]})
    broken = document[:-3] + b"x" + document[-2:]
    with pytest.raises(orjson.JSONDecodeError) as error:
        load(broken, 64)
    assert error.value.pos == len(document) - 3


@pytest.mark.parametrize("text", ["[   ]", '{\n   "a": [\t\n  ], "b" : {    }}', "[[ \n  ]]"])
def test_nothing_but_spaces_is_an_empty_container(text: str) -> None:
    for piece_bytes in range(1, 6):
        assert load(text.encode(), piece_bytes) == orjson.loads(text)
