"""Seconds until a service is READY and until it is gone, and the memory of its processes.

The clock starts before the process does, so that imports count.
"""

import statistics
import time
from typing import Any

import psutil
import tinker

from benchmarks._common import ROWS, Options, new_run, options, report, service
from tests.blackbox.data import batch, train_one_step

_RUNS = 8


def main() -> None:
    with options(__doc__) as asked:
        starts = [one_start(asked) for _ in range(1 if asked.quick else 3)]
    results = {name: round(statistics.median(s[name] for s in starts), 2) for name in starts[0]}
    row = (
        f"{results['ready_s']:.1f}",
        f"{results['first_step_s']:.2f}",
        f"{results['stop_s']:.2f}",
        f"{results['gateway_start_mb']:.0f} / {results['gateway_later_mb']:.0f}",
        f"{results['worker_start_mb']:.0f} / {results['worker_later_mb']:.0f}",
    )
    report("startup", asked, results, [row])


def one_start(asked: Options) -> dict[str, Any]:
    """Start, look, train a few runs, look again, stop."""
    seen: dict[str, Any] = {}
    start_s = time.perf_counter()
    with service(asked) as (running, keys):
        seen["ready_s"] = time.perf_counter() - start_s
        gateway = psutil.Process(running.pid)
        # Besides the worker there are only helpers of a few megabytes.
        worker = max(gateway.children(recursive=True), key=_resident_mb)
        seen["gateway_start_mb"] = _resident_mb(gateway)
        seen["worker_start_mb"] = _resident_mb(worker)
        with tinker.ServiceClient(base_url=running.url, api_key=keys[0]) as client:
            start_s = time.perf_counter()
            train_one_step(new_run(client, asked), batch(ROWS, 64))
            seen["first_step_s"] = time.perf_counter() - start_s
            for _ in range(1, _RUNS):
                train_one_step(new_run(client, asked), batch(ROWS, 64))
        seen["gateway_later_mb"] = _resident_mb(gateway)
        seen["worker_later_mb"] = _resident_mb(worker)
        start_s = time.perf_counter()
    seen["stop_s"] = time.perf_counter() - start_s
    return seen


def _resident_mb(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


if __name__ == "__main__":
    main()
