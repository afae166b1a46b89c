"""Adapters that have learned by heart what to say, so that a random model says something."""

import uuid
from typing import Any

from peft import LoraConfig
from twinkle_client.model import MultiLoraTransformersModel


def row(*spans: tuple[list[int], bool]) -> dict[str, Any]:
    """A row of spans of tokens, each learned or not."""
    tokens = [token for span, _ in spans for token in span]
    known = [token if learned else -100 for span, learned in spans for token in span]
    return {"input_ids": tokens, "labels": [*known[1:], -100]}


def teach(model: MultiLoraTransformersModel, rows: list[dict[str, Any]]) -> str:
    """Learn rows by heart under a new adapter; gives the address of its weights for sampling."""
    # The head as well: hidden states alone cannot make a random model's small embeddings decide.
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj", "lm_head"], r=16)
    model.add_adapter_to_model(f"a{uuid.uuid4().hex[:8]}", config)
    model.set_loss("CrossEntropyLoss")
    model.set_optimizer("Adam", lr=1e-2)
    for _ in range(250):
        loss = model.forward_backward(inputs=rows).result["loss"]
        if loss < 0.1:
            break
        model.clip_grad_and_step()
    else:
        raise AssertionError(f"It has not learned: {loss}.")
    return model.save("spoken", is_sampler=True).twinkle_path
