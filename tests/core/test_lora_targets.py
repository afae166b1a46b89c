"""Names of target modules as PEFT takes them, and patterns against ``re``."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.lora_targets import matching, named

PATHS = (
    *(
        f"model.layers.{layer}.{name}"
        for layer in range(12)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ),
    "lm_head",
)


def test_a_name_is_the_end_of_a_path() -> None:
    assert named(("q_proj",), PATHS) == tuple(p for p in PATHS if p.endswith(".q_proj"))
    assert named(("mlp.down_proj", "lm_head"), PATHS)[-1] == "lm_head"
    assert named(("layers.1.self_attn.v_proj",), PATHS) == ("model.layers.1.self_attn.v_proj",)
    assert named(("model.layers.11.mlp.down_proj",), PATHS) == (PATHS[-2],)


@pytest.mark.parametrize("name", ["proj", "_proj", "k_proj", "", "self_attn", "q_proj ", ".q_proj"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="down_proj, lm_head, q_proj, v_proj"):
        named(("q_proj", name), PATHS)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*",
        r".*\.q_proj",
        r".*(q|v)_proj$",
        r"^model\.layers\.(1|2|3)\.self_attn\.[qv]_proj",
        r"model\.layers\.\d+\.mlp\..*",
        r"model\.layers\.1?\d\..*_proj",
        r"model\.layers\.\d{2}\..*",
        r"model\.layers\.[2-5]\.(?:self_attn|mlp)\.\w+",
        r"(.*\.)?(lm_head|v_proj)",
        r"model\.layers\.[^01]\.mlp\.down_proj",
        r".*?down.*?",
        r"(model|lm)\S{5,40}",
    ],
)
def test_patterns_match_as_re_does(pattern: str) -> None:
    expected = tuple(path for path in PATHS if re.fullmatch(pattern, path))
    assert expected
    assert matching(pattern, PATHS) == expected


pieces = st.recursive(
    st.sampled_from(["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", "1", "[a-b1]"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda p: f"({'|'.join(p)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,}"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(pattern=pieces, text=st.text("ab.1", max_size=6))
def test_any_pattern_matches_as_re_does(pattern: str, text: str) -> None:
    assert (matching(f"({pattern})|x", (text, "x"))[0] == text) == (
        re.fullmatch(pattern, text) is not None
    )


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$b",
        r"(?=a)a",
        r"(?P<n>a)",
        r"a**",
        r"*a",
        r"a{2,1}",
        r"a{x}",
        r"(a",
        r"a)",
        r"[a",
        r"[b-a]",
        r"\b",
        r"a\1",
        "a\\",
        "(" * 30 + ")" * 30,
        "((((((){900}){900}){900}){900}){900})",
        "(((a{900}){900}){900})",
        "a" * 501,
        r"no_such_.*",
    ],
)
def test_what_is_not_taken_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequest):
        matching(pattern, PATHS)


@pytest.mark.parametrize("pattern", [r"((a|a)*)*", r"(.*)*x", r"(a?){40}a{40}"])
def test_no_pattern_takes_long(pattern: str) -> None:
    """Each of them would keep ``re`` busy for ages: done at all is what is tested."""
    text = "a" * 60
    assert matching(f"({pattern})|x", (text, "x"))[-1] == "x"
