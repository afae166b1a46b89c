"""Our templates against Twinkle's own on the same tokenizer: tokens, labels, what comes after."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from twinkle.template import Template

from twinkle_dask.processor import templates
from twinkle_dask.processor.templates import TemplateSpec, Truncation

# As Qwen3's: an answer's thinking is written in the last turn only; tools, calls and answers.
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages and messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or message.reasoning_content) %}
            {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + {"name": call.function.name,
                "arguments": call.function.arguments} | tojson + '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
MARKED = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

ONE_TURN = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Où est le café ? ☕"},
        {"role": "assistant", "content": "À gauche."},
    ]
}
TURNS = {
    "messages": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
        {"role": "assistant", "content": "4, of course."},
    ],
    "source": "a column of its own",
}
UNANSWERED = {"messages": [{"role": "user", "content": "Anybody there?"}]}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
WITH_TOOL = {
    "messages": [
        {"role": "user", "content": "Add 1 and 2."},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "A sum.",
            "tool_calls": [CALL],
        },
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "description": "Adds."}}],
}
THINKING = {
    "messages": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n2"},
    ]
}
FIELDS = ("input_ids", "labels", "attention_mask", "position_ids", "length")


@pytest.fixture(scope="session")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model's folder with one chat template or another."""
    found = {"chatml": model_folder}
    for name, template in (("qwen3", QWEN3), ("marked", MARKED)):
        folder = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / "chat_template.jinja").write_text(template)
        found[name] = folder
    return found


def both(folder: Path, **settings: Any) -> tuple[Template, Any, TemplateSpec]:
    return Template(str(folder), **settings), AutoTokenizer.from_pretrained(folder), spec(settings)


def spec(settings: dict[str, Any]) -> TemplateSpec:
    return templates.template_spec("Template", settings, base_model="any")


def fields(feature: Any) -> dict[str, Any]:
    return {n: v.tolist() if hasattr(v := feature[n], "tolist") else v for n in FIELDS}


@pytest.mark.parametrize(
    ("name", "trajectory", "settings"),
    [
        ("chatml", ONE_TURN, {}),
        ("chatml", TURNS, {}),
        ("chatml", TURNS, {"default_system": "You are Tindra."}),
        ("chatml", UNANSWERED, {}),
        ("chatml", TURNS, {"truncation_strategy": "right", "max_length": 30}),
        ("chatml", TURNS, {"truncation_strategy": "split", "max_length": 16}),
        ("chatml", TURNS, {"truncation_strategy": "delete", "max_length": 16}),
        ("chatml", UNANSWERED, {"truncation_strategy": "left", "max_length": 8}),
        ("qwen3", ONE_TURN, {}),
        ("qwen3", ONE_TURN, {"enable_thinking": False}),
        ("qwen3", WITH_TOOL, {}),
        ("qwen3", THINKING, {}),
    ],
)
def test_tokens_and_labels_agree(
    folders: dict[str, Path], name: str, trajectory: dict[str, Any], settings: dict[str, Any]
) -> None:
    theirs, tokenizer, ours = both(folders[name], **settings)
    copy = json.loads(json.dumps(trajectory))
    wanted = [fields(feature) for feature in theirs.batch_encode([copy])]
    if settings.get("truncation_strategy") == "split":
        for feature in wanted:  # theirs goes on with the piece's own first label
            feature["labels"][-1] = -100
    features = templates.encode(tokenizer, ours, [trajectory])
    assert [fields(feature) for feature in features] == wanted
    assert all(feature.get("source") == trajectory.get("source") for feature in features)


@pytest.mark.parametrize("name", ["chatml", "marked", "qwen3"])
@pytest.mark.parametrize("thinking", [True, False])
def test_prompts_and_what_follows_them_agree(
    folders: dict[str, Path], name: str, thinking: bool
) -> None:
    theirs, tokenizer, ours = both(folders[name], enable_thinking=thinking)
    copy = json.loads(json.dumps(UNANSWERED))
    wanted = theirs.batch_encode([copy], add_generation_prompt=True)[0]
    (feature,) = templates.encode(tokenizer, ours, [UNANSWERED], add_generation_prompt=True)
    assert fields(feature) == fields(wanted)
    text = 'I ask.\n<tool_call>\n{"name": "look", "arguments": {"where": "here"}}\n</tool_call>'
    sampled = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    after = theirs.concat_input_feature(wanted, sampled)
    decoded, new = templates.continued(tokenizer, feature, sampled)
    assert fields(new) == fields(after)
    assert decoded == theirs.decode(sampled)
    assert new["messages"][-1] == after["messages"][-1]
    assert new["messages"][-1]["tool_calls"][0]["function"]["arguments"] == {"where": "here"}


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        'a <tool_call>{"name": "f"}</tool_call> b <tool_call>{"name": "g", "arguments": {}}',
        "<tool_call><function=f><parameter=a>1</parameter><parameter=b>x y</parameter>"
        "</function></tool_call>",
        "<tool_call>{broken</tool_call> still here",
        "nothing",
    ],
)
def test_tool_calls_are_read_alike(folders: dict[str, Path], text: str) -> None:
    theirs = Template(str(folders["chatml"]))
    assert templates.parse_tool_calls(text) == theirs.parse_tool_call(text)
    if "<tool_call>" in text:
        assert templates.without_tool_calls(text) == theirs.clean_tool_call(text)


def learnt(tokenizer: Any, feature: dict[str, Any]) -> str:
    return tokenizer.decode([label for label in feature["labels"] if label != -100])


def test_earlier_turns_are_found_where_a_template_writes_them_otherwise(
    folders: dict[str, Path],
) -> None:
    """Twinkle's labels begin too late there and run into the next message."""
    theirs, tokenizer, ours = both(folders["qwen3"])
    (feature,) = templates.encode(tokenizer, ours, [TURNS])
    assert learnt(tokenizer, feature) == (
        "2<|im_end|>\n<think>\n\n</think>\n\n4, of course.<|im_end|>\n"
    )
    wrong = fields(theirs.batch_encode([json.loads(json.dumps(TURNS))])[0])
    assert "user" in learnt(tokenizer, wrong)
    quiet = TemplateSpec(enable_thinking=False)
    (feature,) = templates.encode(tokenizer, quiet, [TURNS])
    assert learnt(tokenizer, feature) == "2<|im_end|>\n4, of course.<|im_end|>\n"


def test_marks_of_what_is_generated_are_used(folders: dict[str, Path]) -> None:
    """Twinkle looks for them too, and with this transformers does not see what it finds."""
    _, tokenizer, ours = both(folders["marked"])
    (feature,) = templates.encode(tokenizer, ours, [TURNS])
    assert learnt(tokenizer, feature) == "2<|im_end|>4, of course.<|im_end|>"


def test_a_row_cut_on_the_left_ends_with_nothing_to_predict(folders: dict[str, Path]) -> None:
    """Twinkle's has the first label there."""
    _, tokenizer, _ = both(folders["chatml"])
    cut = TemplateSpec(truncation_strategy=Truncation.LEFT, max_length=4)
    (feature,) = templates.encode(tokenizer, cut, [TURNS])
    assert feature["labels"] == [*feature["input_ids"][1:], -100]
