"""Check 79: chat completions, by plain HTTP and by the ``openai`` package."""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer
from twinkle_client import init_twinkle_client
from twinkle_client.model import MultiLoraTransformersModel

from tests.twinkle.conftest import KEY, MODEL, OTHER_KEY
from tests.twinkle.speaking import row, teach
from twinkle_dask.local import LocalService

ASK: Any = [{"role": "user", "content": "question"}]
SAID = " hello world, this is the answer."
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOLS: Any = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def speaker(service: LocalService, tokenizer: Any) -> str:
    """The address of weights that say ``SAID`` to one question and call a tool at another."""
    rows = []
    for question, answer in (("question", SAID), ("call", CALL)):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        rows.append(row((prompt, False), (tokenizer.encode(answer + "<|im_end|>"), True)))
    connected = init_twinkle_client(base_url=service.url, api_key=KEY)
    address = teach(MultiLoraTransformersModel(MODEL), rows)
    connected.close()
    return address


@pytest.fixture(scope="module")
def chat(service: LocalService) -> Generator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def plain(service: LocalService, **body: Any) -> httpx.Response:
    return httpx.post(
        f"{service.url}/api/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
    )


def answer(chat: openai.OpenAI, **more: Any) -> Any:
    given = {"model": MODEL, "messages": ASK, "temperature": 0, "max_tokens": 60}
    return chat.chat.completions.create(**{**given, **more})


def test_79_a_whole_answer(
    service: LocalService, chat: openai.OpenAI, speaker: str, tokenizer: Any
) -> None:
    body = {"model": MODEL, "messages": ASK, "temperature": 0, "max_tokens": 60}
    told = plain(service, **body, adapter_uri=speaker)
    assert told.status_code == 200, told.text
    first = told.json()["choices"][0]
    assert first["message"] == {"role": "assistant", "content": SAID, "refusal": None}
    assert first["finish_reason"] == "stop"
    by_package = answer(chat, model=speaker)
    assert by_package.choices[0].message.content == SAID
    prompt = tokenizer.apply_chat_template(ASK, add_generation_prompt=True)["input_ids"]
    assert by_package.usage.prompt_tokens == len(prompt)
    assert by_package.usage.completion_tokens == len(tokenizer.encode(SAID)) + 1
    base = answer(chat)
    assert base.choices[0].message.content != SAID
    assert base.choices[0].finish_reason == "length"
    assert base.usage.completion_tokens == 60


def test_79_a_stream(service: LocalService, chat: openai.OpenAI, speaker: str) -> None:
    body = {"model": speaker, "messages": ASK, "temperature": 0, "max_tokens": 60, "stream": True}
    told = plain(service, **body)
    assert told.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in told.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == SAID
    assert len(deltas) > 5
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    stream = answer(chat, model=speaker, stream=True, n=2, stream_options={"include_usage": True})
    texts, usage = {0: "", 1: ""}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: SAID, 1: SAID}
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_79_models(service: LocalService, chat: openai.OpenAI, speaker: str) -> None:
    assert [model.id for model in chat.models.list()] == [MODEL]
    assert chat.models.retrieve(MODEL).id == MODEL
    assert chat.models.retrieve(speaker).id == speaker
    with pytest.raises(openai.NotFoundError):
        chat.models.retrieve("no/such")
    listed = httpx.get(f"{service.url}/api/v1/models", headers={"x-api-key": KEY})
    assert listed.json()["object"] == "list"


@pytest.mark.parametrize("stream", [False, True])
def test_79_stop_texts_are_left_out(chat: openai.OpenAI, speaker: str, stream: bool) -> None:
    told = answer(chat, model=speaker, stop=["nothing", "world, "], stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in told]
        text = "".join(choice.delta.content or "" for choice in choices)
        reason = choices[-1].finish_reason
    else:
        text, reason = told.choices[0].message.content, told.choices[0].finish_reason
    assert (text, reason) == (" hello ", "stop")


def test_79_tool_calls(chat: openai.OpenAI, speaker: str) -> None:
    ask: Any = [{"role": "user", "content": "call"}]
    without = answer(chat, model=speaker, messages=ask)
    assert without.choices[0].message.content == CALL
    # The template of the tests' model knows no tools, and says so instead of leaving them out.
    with pytest.raises(openai.BadRequestError, match="tools"):
        answer(chat, model=speaker, messages=ask, tools=TOOLS)
    none = answer(chat, model=speaker, messages=ask, tools=TOOLS, tool_choice="none")
    assert none.choices[0].message.content == CALL


@pytest.mark.parametrize("stream", [False, True])
def test_79_logprobs(chat: openai.OpenAI, speaker: str, stream: bool) -> None:
    told = answer(chat, model=speaker, logprobs=True, top_logprobs=3, stream=stream)
    choices = [chunk.choices[0] for chunk in told] if stream else told.choices
    content = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
    assert "".join(one.token for one in content) == SAID + "<|im_end|>"
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].token == one.token
        assert one.top_logprobs[0].logprob == one.logprob < 0
        assert bytes(one.bytes).decode() == one.token


def test_79_seeds_repeat_and_samples_differ(chat: openai.OpenAI) -> None:
    def drawn(**more: Any) -> list[str]:
        told = answer(chat, temperature=1, max_completion_tokens=30, max_tokens=None, n=2, **more)
        return [choice.message.content for choice in told.choices]

    assert drawn(seed=5) == drawn(seed=5) != drawn(seed=6)
    first, second = drawn(seed=5)
    assert first != second


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"temperature": -1}, None),
        ({"n": 0}, None),
    ],
)
def test_79_what_is_not_done_is_refused(service: LocalService, wrong: Any, param: Any) -> None:
    told = plain(service, **{"model": MODEL, "messages": ASK, "max_tokens": 1, **wrong})
    assert told.status_code == 400, told.text
    error = told.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


def test_79_defaults_are_no_wishes(service: LocalService) -> None:
    same = {"presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "logit_bias": None}
    told = plain(service, model=MODEL, messages=ASK, max_tokens=1, **same)
    assert told.status_code == 200, told.text


def test_79_unknown_models_and_keys(
    service: LocalService, chat: openai.OpenAI, speaker: str
) -> None:
    with pytest.raises(openai.NotFoundError) as info:
        answer(chat, model="no/such")
    assert info.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        answer(chat, model=speaker + "x")
    url = f"{service.url}/v1"
    with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as wrong:
        with pytest.raises(openai.AuthenticationError) as refused:
            answer(wrong)
        assert refused.value.code == "invalid_api_key"
    other = openai.OpenAI(base_url=url, api_key=OTHER_KEY, max_retries=0)
    with other, pytest.raises(openai.NotFoundError):
        answer(other, model=speaker)
