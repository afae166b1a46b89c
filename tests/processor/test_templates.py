"""What templates refuse, and what of Twinkle's is made right; the rest: tests/twinkle."""

from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from tests.models import tiny_qwen3
from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.processor.templates import (
    TemplateSpec,
    Truncation,
    continued,
    decode,
    encode,
    template_spec,
    truncated,
)
from twinkle_dask.processor.tool_calls import parse_tool_calls, without_tool_calls
from twinkle_dask.types import Json

SPEC = TemplateSpec()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_qwen3(tmp_path_factory.mktemp("model") / "tiny")
    load: Any = transformers.AutoTokenizer
    return load.from_pretrained(folder)


def conversation(*texts: str) -> Json:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


@pytest.mark.parametrize(
    ("cls", "arguments", "told"),
    [
        ("Nothing", {}, "no template 'Nothing'.*Template, Qwen3_5Template"),
        ("DeepseekV4Template", {}, "not supported"),
        ("Template", {"trust_remote_code": True}, "take no 'trust_remote_code'"),
        ("Template", {"max_length": 0}, "at least 1"),
        ("Template", {"max_length": True}, "max_length cannot be"),
        ("Template", {"truncation_strategy": "middle"}, "no truncation_strategy 'middle'"),
        ("Template", {"enable_thinking": "no"}, "enable_thinking cannot be"),
        ("Template", {"model_id": "other/model"}, "that model's tokenizer"),
    ],
)
def test_wrong_settings_are_named(cls: str, arguments: Json, told: str) -> None:
    with pytest.raises((InvalidRequest, NotSupported), match=told):
        template_spec(cls, arguments, base_model="my/model")


def test_settings_are_taken() -> None:
    given = {"model_id": "ms://my/model", "truncation_strategy": "left", "max_length": None}
    assert template_spec("Qwen3_5Template", given, base_model="my/model") == TemplateSpec(
        cls="Qwen3_5Template", truncation_strategy=Truncation.LEFT, max_length=None
    )


IMAGE = [{"type": "image", "url": "file:///etc/passwd"}]


@pytest.mark.parametrize(
    ("trajectory", "told"),
    [
        ({}, "no messages"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role is one of"),
        ({"messages": [{"role": "user", "content": 3}]}, "string or a list"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "text only"),
        (conversation("x") | {"images": ["a.png"]}, "text only"),
        (conversation("x") | {"tools": [{"type": "function"}]}, "does not take tools"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
            "does not write tool_calls",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": "["}]}, "no JSON"),
        (conversation("x" * 400), "max_length of 64"),
    ],
)
def test_trajectories_that_cannot_be_encoded_are_told_of(
    tokenizer: Any, trajectory: Json, told: str
) -> None:
    spec = TemplateSpec(max_length=64)
    with pytest.raises((InvalidRequest, NotSupported), match=rf"Trajectory 1: .*{told}"):
        encode(tokenizer, spec, [conversation("fine", "yes"), trajectory])


def test_thinking_is_not_lost_where_the_chat_template_does_not_know_it(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "Easy."},
    ]
    (feature,) = encode(tokenizer, SPEC, [{"messages": messages}])
    learnt = tokenizer.decode([label for label in feature["labels"] if label != -100])
    assert learnt == "<think>\nEasy.\n</think>\n\n2<|im_end|>\n"


def test_one_of_the_turns_is_picked(tokenizer: Any) -> None:
    """Messages are counted as the client sent them, whatever is put before them."""
    trajectory = conversation("a?", "first", "b?", "second")
    trajectory["user_data"] = [["key_rounds", "[3]"]]
    (feature,) = encode(tokenizer, TemplateSpec(default_system="Hm."), [trajectory])
    learnt = tokenizer.decode([label for label in feature["labels"] if label != -100])
    assert learnt == "second<|im_end|>\n"


def test_text_blocks_are_joined_and_nested_rows_encoded(tokenizer: Any) -> None:
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chosen = {"messages": [{"role": "user", "content": blocks}]}
    row: Json = {"chosen": chosen, "rejected": conversation("ab")}
    (feature,) = encode(tokenizer, SPEC, [row | {"id": 7}])
    assert feature["chosen"]["input_ids"] == feature["rejected"]["input_ids"]
    assert feature["id"] == 7
    short = TemplateSpec(max_length=1, truncation_strategy=Truncation.DELETE)
    assert encode(tokenizer, short, [row]) == []


def test_without_a_chat_template_all_of_a_text_is_learnt(tokenizer: Any) -> None:
    plain = TemplateSpec(use_chat_template=False)
    (feature,) = encode(tokenizer, plain, [conversation("some text")])
    assert feature["labels"] == [*feature["input_ids"][1:], -100]
    with pytest.raises(InvalidRequest, match="one message of a user"):
        encode(tokenizer, plain, [conversation("a", "b")])


@given(st.lists(st.integers(0, 300), min_size=1), st.lists(st.integers(0, 300)), st.data())
def test_what_is_sampled_is_labelled_one_to_one(
    prompt: list[int], sampled: list[int], data: st.DataObject
) -> None:
    """Over any number of turns, with what a client has put between them."""
    kept = data.draw(st.lists(st.booleans(), min_size=len(prompt) - 1, max_size=len(prompt) - 1))
    pairs = zip(prompt[1:], kept, strict=True)
    labels = [*(token if keep else -100 for token, keep in pairs), -100]

    class Words:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return " ".join(map(str, tokens))

    feature: Json = {"input_ids": prompt, "labels": labels, "messages": [], "extra": (1,)}
    text, new = continued(Words(), feature, sampled)
    assert text == " ".join(map(str, sampled))
    assert new["input_ids"] == [*prompt, *sampled]
    assert len(new["labels"]) == new["length"] == len(new["input_ids"])
    assert new["labels"][-1] == -100
    new_labels = sum(label != -100 for label in new["labels"])
    assert new_labels == sum(label != -100 for label in labels) + len(sampled)
    places = [i for i, label in enumerate(new["labels"]) if label != -100]
    assert all(new["labels"][i] == new["input_ids"][i + 1] for i in places)
    assert new["messages"] == [{"role": "assistant", "content": text}]
    assert new["extra"] == [1]


@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([*Truncation]))
def test_truncation_keeps_what_it_says(length: int, most: int, strategy: Truncation) -> None:
    spec = TemplateSpec(max_length=most, truncation_strategy=strategy)
    tokens, labels = list(range(length)), list(range(100, 100 + length))
    if length > most and strategy is Truncation.RAISE:
        with pytest.raises(InvalidRequest, match=f"{length} tokens"):
            truncated(spec, tokens, labels)
        return
    pieces = truncated(spec, tokens, labels)
    assert all([t + 100 for t in ids] == marks and len(ids) <= most for ids, marks in pieces)
    joined = [token for ids, _ in pieces for token in ids]
    match strategy:
        case Truncation.LEFT:
            assert joined == tokens[-most:]
        case Truncation.RIGHT:
            assert joined == tokens[:most]
        case Truncation.DELETE:
            assert joined == (tokens if length <= most else [])
        case _:
            assert joined == tokens


@given(st.text(alphabet='<tool_cal>/{}":,nameargusfnctio=p '))
def test_any_text_is_read_for_calls(text: str) -> None:
    assert all(call["function"]["name"] for call in parse_tool_calls(text))
    assert len(without_tool_calls(text)) <= len(text)


def test_numbers_that_are_no_tokens_are_refused(tokenizer: Any) -> None:
    with pytest.raises(InvalidRequest, match="integers from 0"):
        decode(tokenizer, [[-1]])
