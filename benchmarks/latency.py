"""How long one client waits, through the official SDK and HTTP, beside the bare engine.

Service and bare engine take turns, so that both meet the same machine.
"""

import time
from collections.abc import Callable, Sequence

import tinker
from tinker import types

from benchmarks._common import ROWS, Options, new_run, options, percentiles, report, service
from benchmarks._inprocess import InProcess
from tests.blackbox.data import datum, random_tokens

_LEARNING_RATE = 1e-3
_ADAM = types.AdamParams(learning_rate=_LEARNING_RATE)
_PAIR_TOKENS = 64
_SHORT_TOKENS = 8

Action = Callable[[], object]


def main() -> None:
    with (
        options(__doc__) as asked,
        service(asked) as (running, keys),
        tinker.ServiceClient(base_url=running.url, api_key=keys[0]) as client,
    ):
        results = measure(client, asked)
        print_results(asked, results)


def measure(client: tinker.ServiceClient, asked: Options) -> dict[str, dict[str, float]]:
    rounds, times = (1, 3) if asked.quick else (5, 30)
    run = new_run(client, asked)
    bare = InProcess(asked)
    rows = [random_tokens(_PAIR_TOKENS + 1, seed) for seed in range(ROWS)]
    short = [random_tokens(_SHORT_TOKENS + 1, seed=99)]
    data, short_data = ([datum(tokens) for tokens in each] for each in (rows, short))
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(random_tokens(_SHORT_TOKENS, seed=98))

    def pair() -> None:
        # Both are submitted before the first is waited for, as clients are advised to.
        evaluated, stepped = run.forward_backward(data, "cross_entropy"), run.optim_step(_ADAM)
        evaluated.result()
        stepped.result()

    def sample(with_weights: tinker.SamplingClient = sampler) -> None:
        params = types.SamplingParams(max_tokens=1, seed=1)
        with_weights.sample(prompt, num_samples=1, sampling_params=params).result()

    def snapshot() -> None:
        sample(run.save_weights_and_get_sampling_client().result())

    actions: dict[str, Action] = {
        "pair_ms": pair,
        "bare_pair_ms": lambda: bare.pair(rows, _LEARNING_RATE),
        "forward_ms": lambda: run.forward(short_data, "cross_entropy").result(),
        "bare_forward_ms": lambda: bare.forward(short),
        "sample_one_token_ms": sample,
        "snapshot_to_first_sample_ms": snapshot,
    }
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            action()  # warms caches that the action before has used
            taken[name] += timed(action, times)
    return {name: percentiles(values) for name, values in taken.items()}


def timed(action: Action, times: int) -> Sequence[float]:
    """Milliseconds of each call."""
    taken: list[float] = []
    for _ in range(times):
        start_s = time.perf_counter()
        action()
        taken.append((time.perf_counter() - start_s) * 1000)
    return taken


def print_results(asked: Options, results: dict[str, dict[str, float]]) -> None:
    ratios = {
        f"{name}_over_bare": round(
            results[f"{name}_ms"]["p50"] / results[f"bare_{name}_ms"]["p50"], 2
        )
        for name in ("pair", "forward")
    }

    def spread(name: str) -> str:
        return f"{results[name]['p50']:.1f} / {results[name]['p95']:.1f}"

    row = (
        spread("pair_ms"),
        f"{results['bare_pair_ms']['p50']:.1f}",
        ratios["pair_over_bare"],
        spread("forward_ms"),
        f"{results['bare_forward_ms']['p50']:.1f}",
        f"{results['sample_one_token_ms']['p50']:.1f}",
        f"{results['snapshot_to_first_sample_ms']['p50']:.1f}",
    )
    report("latency", asked, results | {"ratios": ratios}, [row])


if __name__ == "__main__":
    main()
