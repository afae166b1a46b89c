"""What a small training step waits for while another tenant submits large batches without pause.

The small tenant begins its steps at random moments, as people do; the large one always has two
batches queued. In this process the trainer is driven as a host drives it, work being taken in
between its steps; with ``--http`` both tenants come through the official SDK as well.
"""

import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import tinker
from tinker import types

from benchmarks._common import (
    Options,
    common_parser,
    new_run,
    percentiles,
    prepared,
    report,
    service,
)
from benchmarks._inprocess import Engine, Rows, adam_step, cross_entropy
from tests.blackbox.data import datum, random_tokens
from twinkle_dask.errors import TwinkleDaskError
from twinkle_dask.types import RunId

_LEARNING_RATE = 1e-4
_ADAM = types.AdamParams(learning_rate=_LEARNING_RATE)
_RANK = 8
_SMALL_TOKENS = 64
_BATCHES_AHEAD = 2
_BOUND = "3 x unloaded p95 + one micro-batch"

Latencies = dict[str, float]


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--http", action="store_true", help="also through the SDK and HTTP")
    given = parser.parse_args()
    with prepared(given) as asked:
        num_rows, length = (8, 128) if asked.quick else (64, 1024)
        large = [random_tokens(length + 1, seed) for seed in range(num_rows)]
        small = [random_tokens(_SMALL_TOKENS + 1, seed=num_rows)]
        times = 3 if asked.quick else 40
        results = [in_process(asked, large, small, times)]
        if given.http:
            micro_batch_ms = results[0]["micro_batch_ms"]
            results.append(through_http(asked, large, small, times, micro_batch_ms))
    report("sharing", asked, results, [table_row(one) for one in results])


class LargeTenant:
    """Keeps batches queued on an engine."""

    def __init__(self, engine: Engine, rows: Rows) -> None:
        self._engine = engine
        (self._run,) = engine.create([_RANK])
        self._batch = cross_entropy(rows)
        self._queued: set[str] = set()

    def top_up(self) -> None:
        """Have as many batches queued as it should be."""
        while len(self._queued) < _BATCHES_AHEAD:
            self._engine.submit(self._run, self._batch)
            self._queued.add(self._engine.submit(self._run, adam_step(_LEARNING_RATE)))

    def ended(self, work_id: str) -> None:
        """Be told of any work that ended."""
        self._queued.discard(work_id)


def in_process(asked: Options, large: Rows, small: Rows, times: int) -> dict[str, Any]:
    """On a trainer in this thread."""
    engine = Engine.load(asked)
    (run,) = engine.create([_RANK])
    tenant = LargeTenant(engine, large)
    small_steps(engine, run, small, 3, pause_s=0.0)
    alone = small_steps(engine, run, small, times, pause_s=0.02)
    micro_batch_ms = one_micro_batch_ms(engine, tenant, 2 if asked.quick else 16)
    pause_s = 2 * micro_batch_ms / 1000
    beside = small_steps(engine, run, small, times, pause_s, tenant)
    return _result("in process", large, alone, beside, micro_batch_ms)


def one_micro_batch_ms(engine: Engine, tenant: LargeTenant, num: int) -> float:
    """How long the trainer's steps take while the large tenant is alone; the median."""
    taken: list[float] = []
    for _ in range(num):
        tenant.top_up()
        start_s = time.perf_counter()
        _advance(engine, tenant)
        taken.append((time.perf_counter() - start_s) * 1000)
    return round(statistics.median(taken), 2)


def small_steps(
    engine: Engine,
    run: RunId,
    rows: Rows,
    times: int,
    pause_s: float,
    beside: LargeTenant | None = None,
) -> list[float]:
    """Milliseconds of each forward_backward with optim_step, from the moment it is wanted."""
    batch, chance = cross_entropy(rows), random.Random(1)
    taken: list[float] = []
    wanted_s, waiting = time.perf_counter(), ""
    while len(taken) < times:
        if not waiting and time.perf_counter() >= wanted_s:
            # Wanted in the middle of a trainer's step, perhaps: a host takes it up only now, too.
            engine.submit(run, batch)
            waiting = engine.submit(run, adam_step(_LEARNING_RATE))
        if beside is not None:
            beside.top_up()
        if not engine.trainer.busy:
            time.sleep(max(0.0, wanted_s - time.perf_counter()))
        elif waiting in _advance(engine, beside):
            now_s = time.perf_counter()
            taken.append((now_s - wanted_s) * 1000)
            wanted_s, waiting = now_s + chance.uniform(0, pause_s), ""
    return taken


def _advance(engine: Engine, beside: LargeTenant | None) -> set[str]:
    """One step of the trainer; the ids of what ended."""
    ended: set[str] = set()
    for done in engine.trainer.step():
        if isinstance(done.outcome, TwinkleDaskError):
            raise done.outcome
        ended.add(done.id)
        if beside is not None:
            beside.ended(done.id)
    return ended


def through_http(
    asked: Options, large: Rows, small: Rows, times: int, micro_batch_ms: float
) -> dict[str, Any]:
    """The same through a service; the micro-batch is the one that was measured in process."""
    with (
        service(asked, num_tenants=2) as (running, keys),
        tinker.ServiceClient(base_url=running.url, api_key=keys[0]) as one,
        tinker.ServiceClient(base_url=running.url, api_key=keys[1]) as other,
    ):
        run = new_run(one, asked)
        data = [datum(tokens) for tokens in small]
        http_steps(run, data, 3, pause_s=0.0)
        alone = http_steps(run, data, times, pause_s=0.02)
        under_way, enough = threading.Event(), threading.Event()
        load = threading.Thread(
            target=keep_busy,
            args=(new_run(other, asked), [datum(tokens) for tokens in large]),
            kwargs={"tell": under_way.set, "enough": enough},
        )
        load.start()
        try:
            while not under_way.wait(1.0):
                if not load.is_alive():
                    raise RuntimeError("the large tenant failed")
            beside = http_steps(run, data, times, pause_s=2 * micro_batch_ms / 1000)
        finally:
            enough.set()
            load.join()
    return _result("SDK and HTTP", large, alone, beside, micro_batch_ms)


def keep_busy(
    run: tinker.TrainingClient,
    data: list[types.Datum],
    tell: Callable[[], None],
    enough: threading.Event,
) -> None:
    """Submit batches, two ahead, and tell when the first has its results."""
    on_the_way: deque[tuple[Any, Any]] = deque()
    while on_the_way or not enough.is_set():
        while len(on_the_way) < _BATCHES_AHEAD and not enough.is_set():
            on_the_way.append((run.forward_backward(data, "cross_entropy"), run.optim_step(_ADAM)))
        for future in on_the_way.popleft():
            future.result()
        tell()


def http_steps(
    run: tinker.TrainingClient, data: list[types.Datum], times: int, pause_s: float
) -> list[float]:
    """As ``small_steps``."""
    chance = random.Random(1)
    taken: list[float] = []
    for _ in range(times):
        time.sleep(chance.uniform(0, pause_s))
        start_s = time.perf_counter()
        evaluated, stepped = run.forward_backward(data, "cross_entropy"), run.optim_step(_ADAM)
        evaluated.result()
        stepped.result()
        taken.append((time.perf_counter() - start_s) * 1000)
    return taken


def _result(
    way: str, large: Rows, alone: Sequence[float], beside: Sequence[float], micro_batch_ms: float
) -> dict[str, Any]:
    unloaded, loaded = percentiles(alone), percentiles(beside)
    bound_ms = 3 * unloaded["p95"] + micro_batch_ms
    return {
        "way": way,
        "large_batch_tokens": sum(len(row) - 1 for row in large),
        "alone_ms": unloaded,
        "beside_ms": loaded,
        "micro_batch_ms": micro_batch_ms,
        "bound_ms": round(bound_ms, 2),
        "bound": _BOUND,
        "within_bound": loaded["p95"] < bound_ms,
    }


def table_row(one: dict[str, Any]) -> tuple[object, ...]:
    """For README.md."""

    def spread(latencies: Latencies) -> str:
        return f"{latencies['p50']:.1f} / {latencies['p95']:.1f}"

    return (
        one["way"],
        spread(one["alone_ms"]),
        spread(one["beside_ms"]),
        f"{one['micro_batch_ms']:.0f}",
        f"{one['bound_ms']:.0f}",
        "yes" if one["within_bound"] else "no",
    )


if __name__ == "__main__":
    main()
