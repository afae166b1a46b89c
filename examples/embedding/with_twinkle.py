"""Contrastive training of embeddings (InfoNCE): sentences that mean the same move together.

Rows of a batch go anchor, positive, anchor, positive; the one label of a row says which it is (1
for an anchor). Tokens are made on the server, by a data set with a template.
"""

import argparse
import random
from typing import Any

from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from twinkle.dataset import DatasetMeta
from twinkle_client import init_twinkle_client
from twinkle_client.dataset import Dataset
from twinkle_client.model import MultiLoraTransformersModel

PAIRS = (
    ("How do I bake bread?", "What is the way to make a loaf at home?"),
    ("The train was late.", "Our rail connection did not arrive on time."),
    ("She plays the violin.", "A woman is making music on a string instrument."),
    ("It will rain tomorrow.", "The forecast for the next day is wet."),
    ("My computer is slow.", "The laptop takes ages to do anything."),
    ("The cat sleeps on the sofa.", "A pet is resting on the couch."),
    ("He lost his keys.", "The man cannot find what opens his door."),
    ("Stocks fell sharply.", "The market went down a lot."),
)

console = Console()


def main() -> None:
    """Train, and show how the loss falls."""
    given = parse_arguments()
    steps, pairs = (2, 3) if given.quick else (24, len(PAIRS))
    client = init_twinkle_client(base_url=given.url, api_key=given.key)
    features = encoded(given.model)
    model = MultiLoraTransformersModel(given.model)
    adapter = LoraConfig(target_modules="all-linear", r=16, lora_alpha=32)
    model.add_adapter_to_model("meaning", adapter)
    model.set_loss("InfonceLoss", temperature=0.1)
    model.add_metric("EmbeddingMetric", is_training=True)
    model.set_optimizer("AdamW", lr=3e-4, weight_decay=0.0)
    rng = random.Random(0)
    table = Table("step", "InfoNCE loss")
    for step in range(1, steps + 1):
        chosen = rng.sample(range(len(PAIRS)), pairs)
        batch = [row for pair in chosen for row in features[2 * pair : 2 * pair + 2]]
        loss = model.forward_backward(inputs=batch, task="embedding").result["loss"]
        model.clip_grad_and_step()
        if step % 4 == 0 or step in {1, steps}:
            table.add_row(str(step), f"{loss:.4f}")
    console.print(table)
    console.print(model.calculate_metric(is_training=True).result)
    client.close()


def encoded(model_id: str) -> list[dict[str, Any]]:
    """All sentences as tokens, with what they are in place of labels."""
    sentences = [sentence for pair in PAIRS for sentence in pair]
    rows = [{"messages": [{"role": "user", "content": sentence}]} for sentence in sentences]
    dataset = Dataset(DatasetMeta(data=rows))
    dataset.set_template("Template", model_id=model_id)
    dataset.encode()
    found: list[dict[str, Any]] = []
    for number in range(len(rows)):
        row = dataset[number]
        found.append({"input_ids": row["input_ids"], "labels": [1 - number % 2]})
    return found


def parse_arguments() -> argparse.Namespace:
    """Where the service is."""
    parser = argparse.ArgumentParser(description="InfoNCE with the Twinkle client.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--quick", action="store_true", help="two steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
