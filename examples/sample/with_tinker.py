"""Sample a base model with the Tinker SDK: the likeliest answer, several at once, scores."""

import argparse
from typing import Any

import tinker
from rich.console import Console
from rich.table import Table
from tinker import types

MODEL = "SmolLM2-135M-Instruct"
QUESTION = "The capital of France is"

console = Console()


def main() -> None:
    """Draw three ways. The SDK speaks tokens, so the tokenizer works on this side."""
    parser = argparse.ArgumentParser(description="Sample with the Tinker SDK.")
    parser.add_argument("--url", help="of the service; else TINKER_BASE_URL")
    parser.add_argument("--key", help="an API key; else TINKER_API_KEY")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--tokenizer", help="folder or hub id; else what the service names")
    parser.add_argument("--gguf", help="the GGUF file in that folder, if it is one")
    parser.add_argument("--quick", action="store_true", help="few tokens")
    given = parser.parse_args()
    tokens = 8 if given.quick else 40

    with tinker.ServiceClient(base_url=given.url, api_key=given.key) as service:
        sampler = service.create_sampling_client(base_model=given.model).result()
        tokenizer = load_tokenizer(sampler, given.tokenizer, given.gguf)
        prompt = types.ModelInput.from_ints(tokenizer.encode(QUESTION))
        likeliest = types.SamplingParams(max_tokens=tokens, temperature=0.0)
        answer = sampler.sample(prompt, 1, likeliest).result().sequences[0]
        console.print(f"[bold]{QUESTION}[/]{tokenizer.decode(answer.tokens)}", highlight=False)

        drawn = sampler.sample(prompt, 4, types.SamplingParams(max_tokens=tokens, seed=1)).result()
        table = Table("answer", "tokens", "mean logprob", title="Four at once")
        for each in drawn.sequences:
            scores = each.logprobs or [float("nan")]
            mean = f"{sum(scores) / len(scores):.2f}"
            table.add_row(tokenizer.decode(each.tokens), str(len(each.tokens)), mean)
        console.print(table)

        scored = sampler.compute_logprobs(prompt).result()
        known = [lp for lp in scored if lp is not None]
        console.print(f"The prompt's {len(known)} scored tokens add up to {sum(known):.1f} nats.")


def load_tokenizer(
    sampler: tinker.SamplingClient, source: str | None, gguf_file: str | None
) -> Any:
    """The given tokenizer, or the one that the service names for its model."""
    if source is None:
        return sampler.get_tokenizer()
    from transformers import AutoTokenizer

    untyped: Any = AutoTokenizer
    return untyped.from_pretrained(source, gguf_file=gguf_file)


if __name__ == "__main__":
    main()
