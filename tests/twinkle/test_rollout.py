"""Check 78: the client's own rollout of several turns with a tool."""

from pathlib import Path
from typing import Any

import pytest
from twinkle.data_format.sampling import SamplingParams
from twinkle.template import Template
from twinkle_agentic.rollout.bridge import extend_with_bridge
from twinkle_client.model import MultiLoraTransformersModel
from twinkle_client.rollout import ClientMultiTurnRollout
from twinkle_client.sampler import vLLMSampler

from tests.twinkle.conftest import MODEL
from tests.twinkle.speaking import teach

SAYS = [
    '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"a": 2}}</tool_call>',
    "done",
]
RESULTS = {1: "one", 2: "two"}


def tool(call: dict[str, Any]) -> str:
    assert call["function"]["name"] == "f"
    return RESULTS[call["function"]["arguments"]["a"]]


@pytest.fixture(scope="module")
def template(model_folder: Path) -> Template:
    return Template(model_id=str(model_folder))


def conversation(template: Template) -> dict[str, Any]:
    """The rows that a rollout of ``SAYS`` makes, with the labels of what is said."""
    asked = [{"role": "user", "content": "go"}]
    row = dict(template.encode({"messages": asked}, add_generation_prompt=True))
    tokens, labels = list(map(int, row["input_ids"])), [-100] * len(row["input_ids"])
    for says, result in zip(SAYS, [*RESULTS.values(), None], strict=True):
        said = template.tokenizer.encode(says + "<|im_end|>", add_special_tokens=False)
        tokens, labels = tokens + said, labels[:-1] + said + [-100]
        if result is not None:
            at = {"input_ids": tokens, "labels": labels, "messages": asked}
            at = extend_with_bridge(at, [{"role": "tool", "content": result}], template)
            assert at is not None
            tokens, labels = list(map(int, at["input_ids"])), list(map(int, at["labels"]))
    return {"input_ids": tokens, "labels": labels}


class Speaker(vLLMSampler):
    """The client's sampler with weights: its rollout itself names none."""

    uri = ""

    def sample(self, *inputs: Any, **named: Any) -> Any:
        return super().sample(*inputs, **named, adapter_uri=self.uri)


def test_78_three_turns_with_a_tool(model: MultiLoraTransformersModel, template: Template) -> None:
    sampler = Speaker(MODEL)
    sampler.uri = teach(model, [conversation(template)])
    rollout = ClientMultiTurnRollout(
        sampler,
        template,
        tool_manager=tool,
        sampling_params=SamplingParams(temperature=0.0, max_tokens=64, logprobs=1),
    )
    asked = {"messages": [{"role": "user", "content": "go"}]}
    found = rollout([asked, asked])
    for one in found:
        assert one["turns"] == 3
        assert one["stop_reason"] == "stop"
        assert not one["truncated"]
        roles = [message["role"] for message in one["messages"]]
        assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
        assert [m["content"] for m in one["messages"] if m["role"] == "tool"] == ["one", "two"]
        assert one["messages"][-1]["content"] == "done"
        learned = [label for label in one["labels"] if label != -100]
        assert [pairs[0][0] for pairs in one["logprobs"]] == learned
    keys = ("input_ids", "labels")
    result = model.forward_backward(inputs=[{key: one[key] for key in keys} for one in found])
    assert result.result["loss"] < 1.0
