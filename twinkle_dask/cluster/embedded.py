"""The cluster that a laptop gets: a scheduler in this process and one worker process per GPU.

Without a GPU there are as many workers as the base models need, and they share the cores.
"""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Any

import dask.config
from distributed import Nanny, Scheduler, SpecCluster

from twinkle_dask import event_loops

#: What every cluster of ours needs; the reasons are in docs/architecture.md, "Dask settings".
SETTINGS: dict[str, Any] = {
    # Set before a worker process imports anything; its own lines before ours would not be JSON.
    # Dask's own MALLOC_TRIM_THRESHOLD_ is left out on purpose: with it every tensor is mapped and
    # faulted in anew (a step of SmolLM2-135M, bfloat16, one core: 3.9 s with it, 2.8 s without).
    "distributed.nanny.pre-spawn-environ": {"DASK_LOGGING__DISTRIBUTED": "warning"},
    "distributed.scheduler.worker-ttl": "20s",
    # A worker that is slow to come back is still ours.
    "distributed.deploy.lost-worker-timeout": "1h",
    "distributed.scheduler.idle-timeout": None,
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.worker.profile.enabled": False,
    "distributed.comm.compression": False,
    "distributed.comm.timeouts.connect": "5s",
    "distributed.comm.timeouts.tcp": "15s",
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.admin.tick.limit": "3s",
    # How often each server of Dask looks whether its loop still turns; there are three of them.
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.event-loop": event_loops.NAME,
}


def use_settings() -> None:
    """Apply ``SETTINGS`` to this process, and so to the workers it starts."""
    dask.config.set(SETTINGS)


def num_gpus() -> int:
    """NVIDIA GPUs this process may use, found without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in {"", "-1"}])
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


async def stop_embedded(cluster: Any) -> None:
    """End the cluster's processes, gently for two seconds and then at once.

    Nothing is lost by that: hosts keep nothing that the journal does not have.
    """
    # Looked up now, since a nanny that gives up on its process forgets it.
    workers = [nanny.process for nanny in cluster.workers.values()]
    processes = [worker.process for worker in workers if worker is not None]
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(cluster.close(timeout=2), 2.5)
    await asyncio.gather(*(_kill(process) for process in processes if process is not None))


async def _kill(process: Any) -> None:
    """End a worker's process if it is still there, and wait until Dask knows that it has ended.

    By Dask's own means: ``multiprocessing.active_children``, which Python calls at its end too,
    would take the exit status that a thread of Dask waits for, and Dask logs that.
    """
    if process.is_alive():
        await process.kill()
        with contextlib.suppress(TimeoutError):
            await process.join(1.0)


async def start_embedded(num_workers: int, threads: int | None, dashboard: str | None) -> Any:
    """Start scheduler and workers.

    Args:
        num_workers: What the plan needs at least (``placement.num_workers_needed``). Where there
            are more GPUs, each gets a worker; where there are fewer, workers share them.
        threads: Arithmetic threads of one worker; None shares the cores out.
        dashboard: ``HOST:PORT``, or None for no dashboard.

    Returns:
        The running ``SpecCluster``; ``stop_embedded`` ends its processes.
    """
    gpus = num_gpus()
    workers = max(gpus, num_workers)
    if threads is None:
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
    spec: dict[str, Any] = {}
    for i in range(workers):
        env = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
            env["CUDA_VISIBLE_DEVICES"] = visible.split(",")[i % gpus].strip()
        spec[f"gpu-{i}"] = {
            "cls": Nanny,
            "options": {
                "nthreads": 1,
                "resources": {"GPU": 1},
                "memory_limit": 0,
                "env": env,
                "dashboard": False,
                "host": "127.0.0.1",
                "silence_logs": None,
            },
        }
    scheduler: dict[str, Any] = {
        "cls": Scheduler,
        "options": {
            "host": "127.0.0.1",
            "protocol": "tcp://",
            "dashboard": dashboard is not None,
            # Its HTTP server runs without a dashboard too, and ":0" would be on all interfaces.
            "dashboard_address": dashboard or "127.0.0.1:0",
        },
    }
    return await SpecCluster(
        workers=spec, scheduler=scheduler, asynchronous=True, silence_logs=False, name="twinkle"
    )
