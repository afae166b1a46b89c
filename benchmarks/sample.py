"""Sampled tokens per second at several numbers of concurrent requests.

Each request draws 64 tokens from a prompt of 16. All requests of a round are sent at once; the
round ends with the last one. Beside it Transformers' ``generate`` draws as many tokens for as many
rows at once, without any adapter.
"""

import time
from collections.abc import Sequence
from typing import Any

import tinker
import torch
from tinker import types

from benchmarks._common import ROWS, Options, median, new_run, options, report, service
from benchmarks._plain import load_plain
from tests.blackbox.data import batch, random_tokens, train_one_step

_PROMPT_TOKENS = 16
_NEW_TOKENS = 64
_ADAPTERS = 8


def main() -> None:
    with (
        options(__doc__) as asked,
        service(asked) as (running, keys),
        tinker.ServiceClient(base_url=running.url, api_key=keys[0]) as client,
    ):
        samplers = [trained(client, asked) for _ in range(2 if asked.quick else _ADAPTERS)]
        plain = load_plain(asked)
        results = [
            measure(samplers[:adapters], plain, asked, requests)
            for requests in ((1, 4) if asked.quick else (1, 8, 32))
            for adapters in ((1, len(samplers)) if requests > 1 else (1,))
        ]
    rows = [
        (
            one["requests"],
            one["adapters"],
            f"{one['service_tokens_per_s']:.0f}",
            f"{one['generate_tokens_per_s']:.0f}",
            f"{one['ratio']:.2f}",
        )
        for one in results
    ]
    report("sample", asked, results, rows)


def trained(client: tinker.ServiceClient, asked: Options) -> tinker.SamplingClient:
    """A snapshot of a new run after one step."""
    run = new_run(client, asked)
    train_one_step(run, batch(ROWS), lr=1e-3)
    return run.save_weights_and_get_sampling_client().result()


def measure(
    samplers: Sequence[tinker.SamplingClient], plain: Any, asked: Options, requests: int
) -> dict[str, Any]:
    """Rounds of both, in turns."""
    rounds = 1 if asked.quick else 7
    prompts = [random_tokens(_PROMPT_TOKENS, seed) for seed in range(requests)]
    service_round(samplers, prompts)
    generate_round(plain, prompts)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        ours.append(service_round(samplers, prompts))
        theirs.append(generate_round(plain, prompts))
    return {
        "requests": requests,
        "adapters": len(samplers),
        "service_tokens_per_s": median(ours),
        "generate_tokens_per_s": median(theirs),
        "ratio": median([a / b for a, b in zip(ours, theirs, strict=True)]),
    }


def service_round(samplers: Sequence[tinker.SamplingClient], prompts: list[list[int]]) -> float:
    """Tokens per second; an end-of-sequence token may come before the 64th."""
    start_s = time.perf_counter()
    asked = [
        samplers[i % len(samplers)].sample(
            types.ModelInput.from_ints(prompt),
            num_samples=1,
            sampling_params=types.SamplingParams(max_tokens=_NEW_TOKENS, seed=i),
        )
        for i, prompt in enumerate(prompts)
    ]
    tokens = sum(len(one.result().sequences[0].tokens) for one in asked)
    return tokens / (time.perf_counter() - start_s)


def generate_round(plain: Any, prompts: list[list[int]]) -> float:
    """Tokens per second of one batch."""
    tokens_BL = torch.tensor(prompts)
    start_s = time.perf_counter()
    plain.generate(
        input_ids=tokens_BL,
        attention_mask=torch.ones_like(tokens_BL),
        do_sample=True,
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
    )
    return len(prompts) * _NEW_TOKENS / (time.perf_counter() - start_s)


if __name__ == "__main__":
    main()
