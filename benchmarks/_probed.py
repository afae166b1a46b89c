"""The service as ``twinkle-dask serve`` runs it, with a probe on the gateway's event loop.

The probe is a task that sleeps for 2 ms again and again; its lag is how much later than that it
wakes. So it meets whatever keeps the loop from its next turn: work on it, other threads of the
process that hold the interpreter's lock, and processes that take the cores.

SIGUSR1 makes it print one line of JSON on standard output, about the time since the signal before:
the largest lag and the 99th percentile in ms, and the process's resident memory in MB. ``busy_ms``
is the largest lag when of each only so much is counted as the process computed meanwhile, in all
its threads: what is left of it on a machine whose cores nobody else wants.
"""

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from twinkle_dask import logs
from twinkle_dask.config import load_config
from twinkle_dask.event_loops import loop_factory
from twinkle_dask_gateway.serve import serve

_PERIOD_S = 0.002
_STOP_TIMEOUT_S = 20.0


class Probed:
    """The service, seen from the process that started it."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self._process = process
        self.url = url

    def lag(self) -> dict[str, float]:
        """What the probe saw since this was called before."""
        self._process.send_signal(signal.SIGUSR1)
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def probed_service(settings: Mapping[str, Any]) -> Generator[Probed]:
    """A service with these settings; gone at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps({"port": 0, "data_dir": folder, **settings}))
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            words = process.stdout.readline().split()
            if words[:1] != ["READY"]:
                sys.exit("The service did not start.")
            yield Probed(process, words[1])
        finally:
            process.stdin.close()  # which stops it
            process.wait(_STOP_TIMEOUT_S)
            process.stdout.close()


async def _probe(lags_s: list[tuple[float, float]]) -> None:
    while True:
        slept_s, computed_s = time.perf_counter(), time.process_time()
        await asyncio.sleep(_PERIOD_S)
        lag_s = time.perf_counter() - slept_s - _PERIOD_S
        lags_s.append((lag_s, min(lag_s, time.process_time() - computed_s)))


async def _probing(file: Path) -> None:
    lags_s: list[tuple[float, float]] = []

    def tell() -> None:
        lags_ms, busy_ms = np.array(lags_s or [(0.0, 0.0)]).T * 1000
        told = {
            "max_ms": round(float(lags_ms.max()), 2),
            "p99_ms": round(float(np.percentile(lags_ms, 99)), 2),
            "busy_ms": round(float(busy_ms.max()), 2),
            "rss_mb": round(psutil.Process().memory_info().rss / 2**20, 1),
        }
        lags_s.clear()
        print(json.dumps(told), flush=True)

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
    probe = asyncio.create_task(_probe(lags_s))
    config = load_config(file, {})
    logs.configure(config.log_level)

    def ready(url: str) -> None:
        print(f"READY {url}", flush=True)

    await serve(config, ready=ready, until_stdin_closes=True)
    probe.cancel()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_probing(Path(sys.argv[1])))
