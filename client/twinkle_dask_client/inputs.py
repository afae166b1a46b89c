"""What is sent: examples, conversations, adapters, sampling settings.

Plain values that an editor completes; pydantic checks them before anything is sent.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

IGNORED = -100
"""A label that is not learned."""


class Body(BaseModel):
    """Base of what is sent: a name that nobody knows is a mistake, found here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def wire(self) -> dict[str, Any]:
        """As JSON values; what was not given is left out."""
        return self.model_dump(mode="json", exclude_none=True)


class Feature(Body):
    """One example as tokens.

    Attributes:
        input_ids: N tokens.
        labels: N tokens; ``labels[i]`` is what should follow ``input_ids[i]``, so labels are
            shifted already; ``IGNORED`` where nothing is to be learned.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    input_ids: list[int] = Field(min_length=1)
    labels: list[int] | None = None

    @classmethod
    def of(cls, prompt: Sequence[int], answer: Sequence[int] = ()) -> "Feature":
        """Learn to give ``answer`` (tokens) after ``prompt`` (tokens)."""
        learned = [*([IGNORED] * len(prompt)), *answer]
        return cls(input_ids=[*prompt, *answer], labels=[*learned[1:], IGNORED])


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Conversation(Body):
    """One example as messages; the service turns it into tokens with the model's chat template."""

    messages: list[Message] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None


Example: TypeAlias = Feature | Conversation | Mapping[str, Any]
"""What a batch consists of; a mapping is sent as it is (rows of a data set)."""


class Lora(Body):
    """The shape of an adapter.

    Attributes:
        alpha: Numerator of its scale ``alpha / rank``.
        targets: Names of the linear modules to adapt, or ``all-linear``.
        rslora: Scale by ``alpha / sqrt(rank)`` instead.
    """

    rank: PositiveInt = 8
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = "all-linear"
    rslora: bool = False

    def peft(self) -> dict[str, Any]:
        """In the words of PEFT's ``LoraConfig``."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": self.targets,
            "use_rslora": self.rslora,
            "_TWINKLE_TYPE_": "LoraConfig",
        }


class SamplingParams(Body):
    """How to draw tokens.

    Attributes:
        max_tokens: 0 only scores the prompt; None goes up to the context length.
        temperature: 0 is greedy.
        top_k: Keep the k likeliest tokens; -1 keeps all.
        seed: Fixes the draws.
        stop: Strings, or token ids, that end a sample.
        logprobs: Name and score so many of the likeliest tokens; 1 scores the drawn one.
    """

    max_tokens: NonNegativeInt | None = None
    temperature: float = Field(default=1.0, ge=0)
    top_k: int = -1
    top_p: float = Field(default=1.0, gt=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    logprobs: NonNegativeInt | None = None
    prompt_logprobs: NonNegativeInt | None = None


class Rows(Body):
    """Which rows of a file or list."""

    start: NonNegativeInt = 0
    stop: NonNegativeInt
    step: PositiveInt = 1

    def wire(self) -> dict[str, Any]:
        """As a range."""
        return {"_slice_type_": "range", **self.model_dump()}


class Source(Body):
    """Where the rows of a data set come from: exactly one of ``path`` and ``rows``.

    Attributes:
        path: A file below the service's data roots, or the id of a data set on a hub if the
            service is allowed to ask it.
        rows: Sent along, a mapping each.
    """

    path: str | None = None
    rows: list[dict[str, Any]] | None = None
    subset: str = "default"
    split: str = "train"
    part: Rows | None = None

    def meta(self) -> str:
        """As the protocol's tagged JSON string.

        Raises:
            ValueError: Not exactly one of ``path`` and ``rows`` was given.
        """
        if (self.path is None) == (self.rows is None):
            raise ValueError("Give either path or rows.")

        return json.dumps(
            {
                "dataset_id": self.path or "",
                "subset_name": self.subset,
                "split": self.split,
                "data_slice": None if self.part is None else self.part.wire(),
                "data": self.rows,
                "_TWINKLE_TYPE_": "DatasetMeta",
            }
        )


def plain(value: Any) -> Any:
    """The value as JSON takes it: arrays become lists, models and mappings dicts, at any depth."""
    match value:
        case Body():
            return value.wire()
        case np.ndarray() | np.generic():
            return cast(Any, value).tolist()
        case Mapping():
            return {str(key): plain(each) for key, each in cast(Mapping[Any, Any], value).items()}
        case list() | tuple():
            return [plain(each) for each in cast(Sequence[Any], value)]
        case _:
            return value
