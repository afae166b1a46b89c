"""Sample a base model with the Twinkle client: several answers at once, and a prompt's score."""

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table
from twinkle_client import init_twinkle_client
from twinkle_client.sampler import vLLMSampler

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}

console = Console()


def main() -> None:
    """Draw in three ways."""
    given = parse_arguments()
    tokens = 8 if given.quick else 40
    client = init_twinkle_client(base_url=given.url, api_key=given.key)
    sampler = vLLMSampler(given.model)
    sampler.set_template("Template", model_id=given.model)

    (greedy,) = sampler.sample([QUESTION], {"max_tokens": tokens, "temperature": 0.0})
    console.print(f"[bold]The likeliest answer:[/] {greedy.sequences[0].decoded}")

    params = {"max_tokens": tokens, "temperature": 1.0, "seed": 1, "logprobs": 1, "num_samples": 4}
    (drawn,) = sampler.sample([QUESTION], params)
    table = Table("answer", "tokens", "mean logprob", title="Four at once")
    for each in drawn.sequences:
        scores = [place[0][1] for place in each.logprobs or [] if place]
        mean = sum(scores) / len(scores)
        table.add_row(str(each.decoded), str(len(each.tokens)), f"{mean:.2f}")
    console.print(table)

    (scored,) = sampler.sample([QUESTION], {"max_tokens": 0, "prompt_logprobs": 1})
    known: list[Any] = [logprob for logprob in scored.prompt_logprobs or [] if logprob is not None]
    console.print(f"The prompt's {len(known)} scored tokens add up to {sum(known):.1f} nats.")
    client.close()


def parse_arguments() -> argparse.Namespace:
    """Where the service is."""
    parser = argparse.ArgumentParser(description="Sample with the Twinkle client.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--quick", action="store_true", help="few tokens")
    return parser.parse_args()


if __name__ == "__main__":
    main()
