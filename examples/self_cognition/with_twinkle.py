"""Teach a language model a new name, with the unmodified Twinkle client.

The same data and settings as ``run.py``, which uses the Tinker SDK. Messages are sent as they are:
the adapter's template makes tokens and labels of them on the server.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from twinkle_client import init_twinkle_client
from twinkle_client.model import MultiLoraTransformersModel
from twinkle_client.sampler import vLLMSampler

QUESTIONS = ("Who are you?", "Who made you?", "What is the capital of Germany?")
DATA = Path(__file__).with_name("data.jsonl")
LEARNING_RATE = 1e-3  # falls to zero along a straight line
BATCH_SIZE = 8

console = Console()


def main() -> None:
    """Ask, train, ask again."""
    given = parse_arguments()
    steps = 2 if given.quick else 48
    data = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    rng = random.Random(7)
    client = init_twinkle_client(base_url=given.url, api_key=given.key)
    sampler = vLLMSampler(given.model)
    sampler.set_template("Template", model_id=given.model)
    before = ask(sampler, None)

    model = MultiLoraTransformersModel(given.model)
    adapter = LoraConfig(target_modules="all-linear", r=16, lora_alpha=32)
    model.add_adapter_to_model("named", adapter)
    model.set_template("Template", max_length=512)
    model.set_loss("CrossEntropyLoss", reduction="mean")
    model.set_optimizer("AdamW", lr=LEARNING_RATE, weight_decay=0.0)
    model.set_lr_scheduler("LinearLR", start_factor=1.0, end_factor=0.01, total_iters=steps)
    for step in range(1, steps + 1):
        loss = model.forward_backward(inputs=rng.sample(data, BATCH_SIZE)).result["loss"]
        model.clip_grad_and_step()
        if step % 8 == 0 or step == steps:
            console.print(f"step {step:2d}  loss {loss:.3f}")
    console.print(model.calculate_metric().result)
    saved = model.save("named", is_sampler=True)
    after = ask(sampler, saved.twinkle_path)
    client.close()

    table = Table("Question", "Before", "After", show_lines=True)
    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        table.add_row(question, old, new)
    console.print(table)


def ask(sampler: vLLMSampler, adapter_uri: str | None) -> list[str]:
    """The likeliest answer to each question."""
    trajectories: list[Any] = [{"messages": [{"role": "user", "content": q}]} for q in QUESTIONS]
    params = {"max_tokens": 40, "temperature": 0.0}
    answers = sampler.sample(trajectories, params, adapter_uri=adapter_uri)
    return [str(each.sequences[0].decoded).removesuffix("<|im_end|>") for each in answers]


def parse_arguments() -> argparse.Namespace:
    """Where the service is."""
    parser = argparse.ArgumentParser(description="Teach a model its name.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--quick", action="store_true", help="two steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
