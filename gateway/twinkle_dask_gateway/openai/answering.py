"""Answers of chat completions: whole, or in the parts of a stream."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from twinkle_dask.processor.tool_calls import parse_tool_calls, without_tool_calls
from twinkle_dask.types import Json, SamplePart, ScoredTokens


@dataclass(frozen=True, slots=True)
class Heading:
    """What all parts of one answer begin with."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, choices: list[Json], usage: Json) -> Json:
        """A whole answer."""
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }

    def chunk(self, choices: list[Json], usage: Json | None = None) -> Json:
        """A part of an answer."""
        body: Json = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        return body if usage is None else body | {"usage": usage}


def usage_of(prompt_tokens: int, completion_tokens: int) -> Json:
    """What was read and drawn."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def message_of(text: str, *, calls: bool) -> Json:
    """An assistant's message; tool calls are read out of the text if ``calls`` says so."""
    found = parse_tool_calls(text) if calls else []
    if not found:
        return {"role": "assistant", "content": text}
    return {
        "role": "assistant",
        "content": without_tool_calls(text) or None,
        "tool_calls": [
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": orjson.dumps(call["function"]["arguments"]).decode(),
                },
            }
            for call in found
        ],
    }


def delta_of(message: Json) -> Json:
    """A whole message as one part of a stream."""
    calls = message.get("tool_calls")
    if calls is None:
        return {"content": message["content"]}
    return {
        "content": message["content"],
        "tool_calls": [{"index": place, **call} for place, call in enumerate(calls)],
    }


def tokens_in(parts: Sequence[SamplePart]) -> set[int]:
    """All tokens that are named in parts with their logprobs."""
    found: set[int] = set()
    for part in parts:
        found.update(part.tokens.tolist())
        if part.topk_logprobs is not None:
            found.update(part.topk_logprobs.tokens.ravel().tolist())
    return found


def logprobs_of(parts: Sequence[SamplePart], words: Mapping[int, str]) -> Json:
    """The logprobs of what was drawn.

    Args:
        parts: Of one choice, in order.
        words: The text of every token that is named.
    """
    content: list[Json] = []
    for part in parts:
        pairs = zip(part.tokens.tolist(), part.logprobs.tolist(), strict=True)
        for place, (token, logprob) in enumerate(pairs):
            top = _top(part.topk_logprobs, place, words)
            content.append(_scored(words[token], logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _top(top: ScoredTokens | None, place: int, words: Mapping[int, str]) -> list[Json]:
    if top is None:
        return []
    pairs = zip(top.tokens[place].tolist(), top.logprobs[place].tolist(), strict=True)
    return [_scored(words[token], logprob) for token, logprob in pairs]


def _scored(word: str, logprob: float) -> dict[str, Any]:
    # What cannot be at all is told as OpenAI does.
    return {
        "token": word,
        "logprob": max(logprob, -9999.0),
        "bytes": list(word.encode()),
    }
