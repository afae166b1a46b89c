"""Training tokens per second over all tenants, beside a plain PEFT loop with set_adapter.

Every tenant has its own key, run and thread, and keeps at most two steps on their way. Windows of
service and PEFT loop take turns; ratios are of neighbouring windows.
"""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import tinker
from tinker import types

from benchmarks._common import RANK, ROWS, Options, median, new_run, options, report, service
from benchmarks._plain import PeftLoop
from tests.blackbox.data import datum, random_tokens

_LEARNING_RATE = 1e-3
_ADAM = types.AdamParams(learning_rate=_LEARNING_RATE)
_STEPS_AHEAD = 2


def main() -> None:
    with options(__doc__) as asked:
        tenants, lengths = ((1, 2), (64,)) if asked.quick else ((1, 4, 8), (64, 256))
        with service(asked, num_tenants=max(tenants)) as (running, keys), ExitStack() as stack:
            runs = [
                new_run(
                    stack.enter_context(tinker.ServiceClient(base_url=running.url, api_key=key)),
                    asked,
                )
                for key in keys
            ]
            pool = stack.enter_context(ThreadPoolExecutor(len(runs)))
            results = [
                measure(runs[:num], pool, asked, length) for num in tenants for length in lengths
            ]
    print_results(asked, results)


def measure(
    runs: Sequence[tinker.TrainingClient], pool: ThreadPoolExecutor, asked: Options, length: int
) -> dict[str, Any]:
    """Several windows of both, for one number of tenants and one length."""
    window_s, rounds = (0.5, 1) if asked.quick else (4.0, 5)
    rows = [
        [random_tokens(length + 1, seed=tenant * ROWS + row) for row in range(ROWS)]
        for tenant in range(len(runs))
    ]
    loop = PeftLoop(asked, ranks=[RANK] * len(runs))
    service_window(runs, pool, rows, window_s / 4)
    peft_window(loop, rows, window_s / 4)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        ours.append(service_window(runs, pool, rows, window_s))
        theirs.append(peft_window(loop, rows, window_s))
    return {
        "tenants": len(runs),
        "length": length,
        "service_tokens_per_s": median(ours),
        "peft_tokens_per_s": median(theirs),
        "ratio": median([a / b for a, b in zip(ours, theirs, strict=True)]),
        "windows": {"service": [round(v) for v in ours], "peft": [round(v) for v in theirs]},
    }


def service_window(
    runs: Sequence[tinker.TrainingClient],
    pool: ThreadPoolExecutor,
    rows: Sequence[Sequence[Sequence[int]]],
    window_s: float,
) -> float:
    """Tokens per second; the window ends when the last step begun in it has its results."""
    data = [[datum(tokens) for tokens in batch] for batch in rows]
    start_s = time.perf_counter()
    steps = sum(pool.map(partial(train_until, ends_s=start_s + window_s), runs, data))
    return steps * ROWS * (len(rows[0][0]) - 1) / (time.perf_counter() - start_s)


def train_until(run: tinker.TrainingClient, data: list[types.Datum], ends_s: float) -> int:
    """One tenant; returns its number of steps."""
    on_the_way: deque[tuple[Any, Any]] = deque()
    steps = 0
    while time.perf_counter() < ends_s:
        on_the_way.append((run.forward_backward(data, "cross_entropy"), run.optim_step(_ADAM)))
        steps += 1
        if len(on_the_way) >= _STEPS_AHEAD:
            _wait(on_the_way.popleft())
    for pair in on_the_way:
        _wait(pair)
    return steps


def _wait(pair: tuple[Any, Any]) -> None:
    for future in pair:
        future.result()


def peft_window(loop: PeftLoop, rows: Sequence[Sequence[Sequence[int]]], window_s: float) -> float:
    """Tokens per second of adapters trained in turns, each at least once."""
    start_s = time.perf_counter()
    steps = 0
    while steps < len(rows) or time.perf_counter() - start_s < window_s:
        adapter = steps % len(rows)
        loop.step(adapter, rows[adapter], _LEARNING_RATE)
        steps += 1
    return steps * ROWS * (len(rows[0][0]) - 1) / (time.perf_counter() - start_s)


def print_results(asked: Options, results: list[dict[str, Any]]) -> None:
    table: list[tuple[object, ...]] = []
    for one in results:
        alone = next(r for r in results if r["tenants"] == 1 and r["length"] == one["length"])
        gain = one["service_tokens_per_s"] / alone["service_tokens_per_s"]
        table.append(
            (
                one["length"],
                one["tenants"],
                f"{one['service_tokens_per_s']:.0f}",
                f"{one['peft_tokens_per_s']:.0f}",
                f"{one['ratio']:.2f}",
                f"{gain:.2f}",
            )
        )
    report("train", asked, results, table)


if __name__ == "__main__":
    main()
