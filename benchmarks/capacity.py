"""Many registered runs on one engine: memory of each, and whether steps stay as fast.

Every run is created and takes one training step, so that its moments exist, and stays. This happens
in a fresh process, whose resident memory holds nothing else.
"""

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psutil
import torch

from benchmarks._common import RANK, ROWS, TINY, Options, common_parser, prepared, report
from benchmarks._inprocess import Engine, cross_entropy
from tests.blackbox.data import random_tokens
from twinkle_dask.model.allocator import keep_freed_memory
from twinkle_dask.types import LoraSpec, RunId

_LEARNING_RATE = 1e-4
_LENGTH = 64
_FLOATS_PER_WEIGHT = 3  # the weight and two moments, float32


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument(
        "--runs", type=int, help="to register; by default 1000 of the tiny model, 50 of another"
    )
    given = parser.parse_args()
    with prepared(given) as asked:
        num = _number(given, asked)
        # Spawned: a fork would begin with this process's memory.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as fresh:
            results = fresh.submit(measure, asked, num).result()
    memory, times = results["memory"], results["step_ms"]
    row = (
        num,
        f"{memory['grown_mb']:.0f}",
        f"{memory['kept_mb']:.0f}",
        f"{memory['grown_over_kept']:.2f}",
        f"{times['first']:.1f}",
        f"{times['last']:.1f}",
        f"{times['last_over_first']:.2f}",
        f"{times['again']:.1f}",
    )
    report("capacity", asked, results, [row])


def _number(given: argparse.Namespace, asked: Options) -> int:
    if given.runs is not None:
        return given.runs
    if asked.quick:
        return 20
    return 1000 if asked.model == TINY else 50


def measure(asked: Options, num: int) -> dict[str, Any]:
    """Register and train so many runs; in a process of its own."""
    torch.set_num_threads(asked.threads)
    keep_freed_memory()
    engine = Engine.load(asked)
    batch = cross_entropy([random_tokens(_LENGTH + 1, seed) for seed in range(ROWS)])

    def step(run: RunId) -> float:
        start_s = time.perf_counter()
        engine.forward_backward({run: batch}, _LEARNING_RATE)
        return (time.perf_counter() - start_s) * 1000

    tenth = max(1, num // 10)
    for run in engine.create([RANK] * tenth):  # what a pass needs stays allocated from here on
        step(run)
    before = _resident_bytes()
    runs: list[RunId] = []
    created_ms: list[float] = []
    step_ms: list[float] = []
    resident_mb = [before / 2**20]
    for i in range(num):
        start_s = time.perf_counter()
        (run,) = engine.create([RANK])
        created_ms.append((time.perf_counter() - start_s) * 1000)
        runs.append(run)
        step_ms.append(step(run))
        if (i + 1) % tenth == 0:
            resident_mb.append(_resident_bytes() / 2**20)
    grown = _resident_bytes() - before
    again_ms = [step(run) for run in runs[:tenth]]
    kept = num * _bytes_of_run(engine)
    first, last = _ms(step_ms[:tenth]), _ms(step_ms[-tenth:])
    return {
        "runs": num,
        "rank": RANK,
        "memory": {
            "grown_mb": round(grown / 2**20, 1),
            "kept_mb": round(kept / 2**20, 1),
            "grown_over_kept": round(grown / kept, 3),
            "resident_mb": [round(value, 1) for value in resident_mb],
        },
        "step_ms": {
            "of_each": tenth,
            "first": first,
            "last": last,
            "last_over_first": round(last / first, 3),
            "again": _ms(again_ms),
        },
        "create_ms": {"first": _ms(created_ms[:tenth]), "last": _ms(created_ms[-tenth:])},
    }


def _bytes_of_run(engine: Engine) -> int:
    """Adapter and moments."""
    targets = engine.base.targets(LoraSpec(rank=RANK, seed=1))
    weights = sum(RANK * (target.in_features + target.out_features) for target in targets)
    return weights * _FLOATS_PER_WEIGHT * 4


def _resident_bytes() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def _ms(values: Sequence[float]) -> float:
    return round(statistics.median(values), 2)


if __name__ == "__main__":
    main()
