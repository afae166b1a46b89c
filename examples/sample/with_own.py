"""Sample a base model with our own client: one answer as it is drawn, several at once, scores."""

import argparse

from rich.console import Console
from rich.table import Table

from twinkle_dask_client import Conversation, Message, SamplingParams, Service

MODEL = "SmolLM2-135M-Instruct"
QUESTION = Conversation(messages=[Message(role="user", content="What is the capital of France?")])

console = Console()


def main() -> None:
    """Draw three ways."""
    parser = argparse.ArgumentParser(description="Sample with twinkle_dask_client.")
    parser.add_argument("--url", help="of the service; else TWINKLE_DASK_URL")
    parser.add_argument("--key", help="an API key; else TWINKLE_DASK_API_KEY")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--quick", action="store_true", help="few tokens")
    given = parser.parse_args()
    tokens = 8 if given.quick else 40

    with Service(given.url, api_key=given.key) as service:
        sampler = service.sampler(given.model)
        sampler.set_template()
        console.print("[bold]As it is drawn:[/] ", end="")
        for text in sampler.stream(QUESTION, SamplingParams(max_tokens=tokens, temperature=0)):
            console.print(text, end="", markup=False)
        console.print()

        params = SamplingParams(max_tokens=tokens, temperature=1.0, seed=1, logprobs=1)
        (drawn,) = sampler.sample([QUESTION], params, num_samples=4)
        table = Table("answer", "tokens", "mean logprob", title="Four at once")
        for each in drawn.sequences:
            scores = [place[0][1] for place in each.logprobs or () if place]
            mean = sum(scores) / len(scores)
            table.add_row(each.text, str(len(each.tokens)), f"{mean:.2f}")
        console.print(table)

        score_only = SamplingParams(max_tokens=0, prompt_logprobs=1)
        (scored,) = sampler.sample([QUESTION], score_only)
        known = [lp for lp in scored.prompt_logprobs or () if lp is not None]
        console.print(f"The prompt's {len(known)} scored tokens add up to {sum(known):.1f} nats.")


if __name__ == "__main__":
    main()
