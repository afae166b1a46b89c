"""From conversations to what the SDK trains on: tokens, shifted targets, weights."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from tinker import types


class Message(TypedDict):
    """One turn; ``role`` is ``user`` or ``assistant``."""

    role: str
    content: str


def read(path: Path) -> list[list[Message]]:
    """The conversations of a JSONL file, one per line as ``{"messages": [...]}``."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def prompt_text(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text that the model continues with the assistant's next turn."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def to_datum(tokenizer: Any, messages: Sequence[Message]) -> types.Datum:
    """One conversation as a training example.

    Only what the assistant says counts, with the token that ends its turn: everything else has
    weight 0. Position i predicts token i + 1, so targets and weights are shifted by one.
    """
    tokens: list[int] = []
    weights: list[float] = []
    done = 0  # characters of the conversation that are tokens already
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = prompt_text(tokenizer, messages[:turn])
        reply = message["content"] + tokenizer.eos_token
        for text, weight in ((prompt[done:], 0.0), (reply, 1.0)):
            piece: list[int] = tokenizer.encode(text, add_special_tokens=False)
            tokens += piece
            weights += [weight] * len(piece)
        done = len(prompt) + len(reply)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64"),
            "weights": types.TensorData(data=weights[1:], dtype="float32"),
        },
    )


def batches(data: Sequence[types.Datum], size: int, seed: int) -> Iterator[list[types.Datum]]:
    """Batches without end: every pass over the data is shuffled anew, the same for a seed."""
    rng = random.Random(seed)
    waiting: list[types.Datum] = []
    while True:
        while len(waiting) < size:
            waiting += rng.sample(data, len(data))
        yield waiting[:size]
        waiting = waiting[size:]
