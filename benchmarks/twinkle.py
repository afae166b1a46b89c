"""How long one client of the Twinkle protocol waits, beside one of the Tinker protocol.

Both ask the same service through HTTP, in turns. Losses that need the whole batch (DPO) take two
passes; their row shows what the second one costs.
"""

from collections.abc import Callable

import tinker
from tinker import types

from benchmarks._common import ROWS, Options, new_run, options, percentiles, report, service
from benchmarks.latency import timed
from tests.blackbox.data import datum, random_tokens
from twinkle_dask_client import Feature, Lora, Run, SamplingParams, Service

_TOKENS = 64
_ADAM = types.AdamParams(learning_rate=1e-3)

Action = Callable[[], object]


def main() -> None:
    with (
        options(__doc__) as asked,
        service(asked) as (running, keys),
        tinker.ServiceClient(base_url=running.url, api_key=keys[0]) as theirs,
        Service(running.url, api_key=keys[0], progress=False) as ours,
    ):
        print_results(asked, measure(theirs, ours, asked))


def measure(
    theirs: tinker.ServiceClient, ours: Service, asked: Options
) -> dict[str, dict[str, float]]:
    rounds, times = (1, 3) if asked.quick else (5, 20)
    training = new_run(theirs, asked)
    model = ours.capabilities().models[0].name
    plain, dpo = (new_own_run(ours, model, loss) for loss in ("CrossEntropyLoss", "DPOLoss"))
    rows = [random_tokens(_TOKENS + 1, seed) for seed in range(ROWS)]
    data = [datum(tokens) for tokens in rows]
    features = [Feature(input_ids=row[:-1], labels=row[1:]) for row in map(list, rows)]
    reference = {"logps": [list(row) for row in plain.forward(features).logprobs]}
    sampler = ours.sampler(model)
    prompt = [Feature(input_ids=list(rows[0][:8]))]
    one = SamplingParams(max_tokens=1, seed=1)

    def tinker_pair() -> None:
        evaluated = training.forward_backward(data, "cross_entropy")
        stepped = training.optim_step(_ADAM)
        evaluated.result()
        stepped.result()

    def pair(run: Run, **arguments: object) -> None:
        run.forward_backward(features, **arguments)
        run.step()

    actions: dict[str, Action] = {
        "tinker_pair_ms": tinker_pair,
        "pair_ms": lambda: pair(plain),
        "dpo_pair_ms": lambda: pair(dpo, ref_outputs=reference),
        "forward_ms": lambda: plain.forward(features),
        "metric_ms": plain.metrics,
        "sample_one_token_ms": lambda: sampler.sample(prompt, one),
    }
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            action()  # warms caches that the action before has used
            taken[name] += timed(action, times)
    return {name: percentiles(values) for name, values in taken.items()}


def new_own_run(service: Service, model: str, loss: str) -> Run:
    run = service.create_run(model, name=loss, lora=Lora(rank=8))
    run.set_loss(loss)
    run.set_optimizer("AdamW", lr=1e-3)
    return run


def print_results(asked: Options, results: dict[str, dict[str, float]]) -> None:
    tinker_ms = results["tinker_pair_ms"]["p50"]
    ratios = {
        "pair_over_tinker": round(results["pair_ms"]["p50"] / tinker_ms, 2),
        "dpo_over_pair": round(results["dpo_pair_ms"]["p50"] / results["pair_ms"]["p50"], 2),
    }
    row = tuple(f"{each['p50']:.1f} / {each['p95']:.1f}" for each in results.values())
    report("twinkle", asked, results | {"ratios": ratios}, [(*row, *ratios.values())])


if __name__ == "__main__":
    main()
