"""Adapters and batches that several test files need."""

from typing import Any

from peft import LoraConfig
from twinkle_client.model import MultiLoraTransformersModel


def lora(rank: int = 4, alpha: int = 8, **more: Any) -> LoraConfig:
    return LoraConfig(target_modules="all-linear", r=rank, lora_alpha=alpha, **more)


def feature(*tokens: int) -> dict[str, Any]:
    """A row that learns all of its tokens; labels are shifted by who encodes."""
    return {"input_ids": list(tokens), "labels": [*tokens[1:], -100]}


BATCH = [feature(3, 4, 5, 6, 7, 8), feature(9, 8, 7, 6, 5)]


def trained(
    model: MultiLoraTransformersModel,
    name: str = "main",
    *,
    steps: int = 2,
    rank: int = 4,
    alpha: int = 8,
) -> MultiLoraTransformersModel:
    """An adapter that has learned a little, with an optimizer and a schedule."""
    model.add_adapter_to_model(name, lora(rank, alpha))
    model.set_loss("CrossEntropyLoss")
    model.set_optimizer("AdamW", lr=1e-2)
    model.set_lr_scheduler("LinearLR", start_factor=1.0, end_factor=0.1, total_iters=10)
    step(model, steps)
    return model


def step(model: MultiLoraTransformersModel, steps: int = 1) -> list[float]:
    """Train so many steps; gives the losses."""
    losses: list[float] = []
    for _ in range(steps):
        losses.append(model.forward_backward(inputs=BATCH).result["loss"])
        model.clip_grad_and_step()
    return losses


def logps(model: MultiLoraTransformersModel) -> Any:
    return model.forward_only(inputs=BATCH).result["logps"]
