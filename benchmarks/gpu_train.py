"""Training on a GPU: right numbers first, then tokens per second, utilisation and memory.

Makes a random model of the chosen shape on the device, so nothing is downloaded. Utilisation is 4
operations per weight and token, over the rate of one large product on the same device, or over the
rate of the model's own products. Without a GPU it says so and ends; ``--device cpu --shape tiny``
runs all of it anywhere.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

from benchmarks._common import Options, report, warn_of_load
from benchmarks._inprocess import Engine, Training
from benchmarks._products import (
    OPERATIONS_PER_WEIGHT,
    ModelProducts,
    SquareProduct,
    synchronize,
)
from benchmarks._reference import compare, engine_numbers, mixed_cases, plain_numbers
from benchmarks._shapes import SHAPES, facts_of, random_model
from benchmarks._turns import Contender, in_turns
from tests.blackbox.data import random_tokens
from twinkle_dask.model.base import BaseModel
from twinkle_dask.trainer.engine import TrainerConfig
from twinkle_dask.types import LoraSpec

_RANK = 32
_RANKS = (4, 8, 16, 16, 32, 32, 64, 64)
_SQUARE = {"cuda": 8192, "cpu": 1024}
_MOST_TOKENS_OF_PRODUCTS = 8192
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    given = _given()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("Skipped: there is no CUDA device here.", file=sys.stderr)
        print(json.dumps({"benchmark": "gpu_train", "skipped": "no CUDA device"}))
        return
    warn_of_load()
    asked = Options(
        model=f"random-qwen3-{given.shape}",
        source="",
        dtype=given.dtype,
        threads=torch.get_num_threads(),
        service_threads=None,
        quick=given.quick,
    )
    results = measure(asked, given)
    report("gpu_train", asked, results, [table_row(results)])
    if not results["numbers"]["right"]:
        sys.exit("The engine's numbers are further from the reference than is allowed.")


def _given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="bfloat16")
    parser.add_argument("--rows", type=int, default=16, help="of a step, a multiple of 8")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each row")
    parser.add_argument(
        "--micro-batch", type=int, help="its most tokens; by default what the trainer chooses"
    )
    parser.add_argument("--quick", action="store_true", help="only see that it works")
    given = parser.parse_args()
    if given.quick:
        given.rows, given.length = len(_RANKS), 16
    if given.rows < 1 or given.rows % len(_RANKS):
        parser.error(f"--rows must be a multiple of {len(_RANKS)}")
    return given


def measure(asked: Options, given: argparse.Namespace) -> dict[str, Any]:
    """Check, then measure."""
    device = torch.device(given.device)
    model = random_model(given.shape, asked.torch_dtype, device)
    cases = mixed_cases(model)
    truth = plain_numbers(model, cases, torch.float32)
    plain = plain_numbers(model, cases, asked.torch_dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the copies' memory, before the trainer looks for what is free
        torch.cuda.reset_peak_memory_stats()
    config = TrainerConfig(tokens_per_micro_batch=given.micro_batch)
    engine = Engine(BaseModel(model, facts_of(model), tokenizer=None), config)
    numbers = compare(engine_numbers(engine, cases), plain, truth)
    rows = [
        random_tokens(given.length + 1, seed, engine.base.facts.vocab_size)
        for seed in range(given.rows)
    ]
    each = len(rows) // len(_RANKS)
    one = Training(engine, [_RANK], [rows])
    eight = Training(engine, _RANKS, [rows[i : i + each] for i in range(0, len(rows), each)])
    memory = _memory_of(one.step, device)
    return {
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        "parameters": engine.base.facts.num_parameters,
        "rows": given.rows,
        "length": given.length,
        "micro_batch_tokens": given.micro_batch or "chosen by the trainer",
        "numbers": numbers,
        "memory": memory,
        "optimizer_ms": {
            "one_tenant": _optimizer_ms(one, asked.quick),
            "eight_tenants": _optimizer_ms(eight, asked.quick),
        },
        **_speed(engine, one, eight, asked),
    }


def _memory_of(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Of two steps, in MB; before, what the weights and runs hold."""
    if device.type != "cuda":
        step()
        return {"resident": round(psutil.Process().memory_info().rss / 2**20)}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    step()
    return {
        "before": round(before / 2**20),
        "peak_allocated": round(torch.cuda.max_memory_allocated() / 2**20),
        "peak_reserved": round(torch.cuda.max_memory_reserved() / 2**20),
    }


def _optimizer_ms(work: Training, quick: bool) -> float:
    """The median time of all runs' optimizer steps alone."""
    taken: list[float] = []
    for _ in range(1 if quick else 5):
        work.forward_backward()
        start_s = time.perf_counter()
        work.optim()
        taken.append((time.perf_counter() - start_s) * 1000)
    return round(statistics.median(taken), 2)


def _speed(engine: Engine, one: Training, eight: Training, asked: Options) -> dict[str, Any]:
    base = engine.base
    shapes = [(t.in_features, t.out_features) for t in base.targets(LoraSpec(rank=1, seed=1))]
    operations = OPERATIONS_PER_WEIGHT * sum(d * e for d, e in shapes)
    tokens = min(one.tokens, _MOST_TOKENS_OF_PRODUCTS)
    own = ModelProducts(shapes, tokens, base.dtype, base.device)
    square = SquareProduct(
        256 if asked.quick else _SQUARE[base.device.type], base.dtype, base.device
    )

    def synced(step: Callable[[], object]) -> Callable[[], object]:
        def whole() -> None:
            step()
            synchronize(base.device)

        return whole

    rates = in_turns(
        {
            "one_tenant": Contender(synced(one.step), one.tokens),
            "eight_tenants": Contender(synced(eight.step), eight.tokens),
            "own_shapes": Contender(own.step, own.operations),
            "square": Contender(square.step, square.operations),
        },
        quick=asked.quick,
    )
    tenants: Sequence[str] = ("one_tenant", "eight_tenants")
    limits: Sequence[str] = ("square", "own_shapes")
    return {
        "tokens_per_s": {name: rates.of(name) for name in tenants},
        "eight_over_one": rates.ratio("eight_tenants", "one_tenant"),
        "gemm_tflops": {name: round(rates.of(name) / 1e12, 3) for name in limits},
        "utilisation": {
            name: {limit: rates.ratio(name, limit, operations) for limit in limits}
            for name in tenants
        },
        "windows": rates.rounded(),
    }


def table_row(results: dict[str, Any]) -> tuple[object, ...]:
    """For README.md."""
    speed, used, memory = (results[name] for name in ("tokens_per_s", "utilisation", "memory"))
    one, numbers = used["one_tenant"], results["numbers"]
    return (
        results["device"],
        f"{results['rows']} x {results['length']}",
        f"{speed['one_tenant']:.0f}",
        f"{speed['eight_tenants']:.0f}",
        f"{one['square']:.0%} / {one['own_shapes']:.0%}",
        f"{memory.get('peak_allocated', memory.get('resident')) / 1024:.1f}",
        f"{results['optimizer_ms']['one_tenant']:.1f} / "
        f"{results['optimizer_ms']['eight_tenants']:.1f}",
        f"{numbers['engine_error']['gradient']:.1e} / {numbers['plain_error']['gradient']:.1e}",
    )


if __name__ == "__main__":
    main()
