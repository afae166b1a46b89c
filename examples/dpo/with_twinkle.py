"""Preferences with DPO: short answers are preferred to long ones, with the Twinkle client.

Each pair is a question with two answers of the model's own making up: a short one (chosen) and a
wordy one (rejected). The reference is the base model: ``forward_only(disable_lora=True)``.
"""

import argparse
import random
from typing import Any

from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from twinkle_client import init_twinkle_client
from twinkle_client.model import MultiLoraTransformersModel
from twinkle_client.sampler import vLLMSampler

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Norway": "Oslo",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Austria": "Vienna",
    "Greece": "Athens",
}
HELD_OUT = "Germany"

console = Console()


def main() -> None:
    """Train on pairs, show margins and an answer before and after."""
    given = parse_arguments()
    steps, pairs = (2, 2) if given.quick else (20, 4)
    rng = random.Random(0)
    client = init_twinkle_client(base_url=given.url, api_key=given.key)
    sampler = vLLMSampler(given.model)
    sampler.set_template("Template", model_id=given.model)
    before = ask(sampler, None)

    model = MultiLoraTransformersModel(given.model)
    adapter = LoraConfig(target_modules="all-linear", r=16, lora_alpha=32)
    model.add_adapter_to_model("brief", adapter)
    model.set_template("Template", max_length=512)
    model.set_loss("DPOLoss", beta=0.1)
    model.add_metric("DPOMetric", is_training=True, beta=0.1)
    model.set_optimizer("AdamW", lr=2e-4, weight_decay=0.0)
    table = Table("step", "loss", "margin", "accuracy")
    for step in range(1, steps + 1):
        batch = [
            answer
            for country in rng.sample(sorted(CAPITALS), pairs)
            for answer in pair(country, CAPITALS[country])
        ]
        reference = model.forward_only(inputs=batch, disable_lora=True).result
        loss = model.forward_backward(
            inputs=batch, ref_outputs={"logps": reference["logps"]}
        ).result["loss"]
        model.clip_grad_and_step()
        told = model.calculate_metric(is_training=True).result
        if step % 4 == 0 or step == steps:
            margin, accuracy = told["rewards/margins"], told["rewards/accuracies"]
            table.add_row(str(step), f"{loss:.4f}", str(margin), str(accuracy))
    console.print(table)
    after = ask(sampler, model.save("brief", is_sampler=True).twinkle_path)
    client.close()
    console.print(f"[bold]Before[/] {before}\n[bold]After[/]  {after}")


def pair(country: str, capital: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Chosen and rejected; rows of a batch go in this order."""
    wordy = (
        f"That is a great question! The capital of {country}, which is a very interesting country "
        f"with a long history, is the beautiful city of {capital}. Let me know if you need more!"
    )
    return conversation(country, f"{capital}."), conversation(country, wordy)


def conversation(country: str, answer: str) -> dict[str, Any]:
    """A trajectory with one question and its answer."""
    question = {"role": "user", "content": f"What is the capital of {country}?"}
    return {"messages": [question, {"role": "assistant", "content": answer}]}


def ask(sampler: vLLMSampler, adapter_uri: str | None) -> str:
    """The likeliest answer to a question that is not among the pairs."""
    question = {"messages": conversation(HELD_OUT, "")["messages"][:1]}
    params = {"max_tokens": 40, "temperature": 0.0}
    (answer,) = sampler.sample([question], params, adapter_uri=adapter_uri)
    return str(answer.sequences[0].decoded)


def parse_arguments() -> argparse.Namespace:
    """Where the service is."""
    parser = argparse.ArgumentParser(description="DPO with the Twinkle client.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--quick", action="store_true", help="two steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
