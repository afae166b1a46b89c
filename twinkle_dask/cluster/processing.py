"""Work on processors as Dask tasks: on CPU workers only, never beside a trainer's engine.

A CPU worker is a Dask worker with the resource ``CPU`` and without ``GPU``; its ``CPU`` says how
many tasks it does at the same time. The embedded cluster gets one, a process of its own, when the
first task comes. On a separate cluster the operator starts them.

A task holds nothing that must survive: when its worker dies it is done again. Whose fault that was
nobody knows if several were at it, so each of them is then done alone, and one that kills a worker
alone is refused.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask.config
import structlog
from distributed import KilledWorker, Nanny
from distributed.client import FutureCancelledError

from twinkle_dask import packing
from twinkle_dask.cluster.commands import Failure
from twinkle_dask.cluster.turns import Turns
from twinkle_dask.config import ProcessingConfig
from twinkle_dask.errors import HostLost, InvalidRequest, Saturated, ServiceFault
from twinkle_dask.processor.commands import FUNCTIONS, run
from twinkle_dask.types import TenantId

log = structlog.stdlib.get_logger(__name__)

# A nanny replaces its worker within seconds, on a busy machine within many.
_PATIENCE_S = 60.0
# On a separate cluster somebody must start one.
_PATIENCE_WITH_OTHERS_S = 5.0
_LOOK_AGAIN_S = 0.25
_STOP_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Workers:
    """CPU workers. ``addresses`` is None if Dask's own choice cannot go wrong."""

    places: int
    addresses: list[str] | None


class Processing:
    """Calls functions of ``processor.commands`` on CPU workers.

    Args:
        config: How much of it.
        client: Gives the Dask client; it may be replaced by another one over time.
        scheduler: Address of the embedded cluster's scheduler, for a CPU worker of our own; None
            uses those that the cluster has.
        log_level: Of the workers' logs.
    """

    def __init__(
        self,
        config: ProcessingConfig,
        client: Callable[[], Any],
        *,
        scheduler: str | None,
        log_level: str,
    ) -> None:
        self._config = config
        self._client = client
        self._scheduler = scheduler
        self._log_level = log_level
        self._turns = Turns(per_tenant=config.max_tasks, max_waiting=config.max_waiting)
        self._nanny: Any = None
        self._starting = asyncio.Lock()
        self._closed = False

    async def call(
        self, function: str, value: object, *, tenant: TenantId, timeout_s: float | None = None
    ) -> Any:
        """Do one task, in turn with those of other tenants.

        It may be done more than once if a worker dies, so it must not depend on being done once.

        Args:
            function: A name of ``processor.commands.FUNCTIONS``.
            value: Anything that ``packing.pack`` takes; sequences arrive as tuples.
            tenant: Whose turn it takes.
            timeout_s: Longest time, waiting included; None is the configured one.

        Returns:
            What the function answered; sequences come back as tuples.

        Raises:
            InvalidRequest: What the function says of the value, or it takes too long or too much
                memory, or it holds what cannot be sent.
            QuotaExceeded: Too many tasks of this tenant wait already.
            Saturated: There is no CPU worker, or none became free in time.
            ServiceFault: The function failed; the trace is in the worker's log.
        """
        if function not in FUNCTIONS:
            raise ServiceFault(f"CPU workers know no function {function!r}.")
        try:
            packed = packing.pack(value)
        except TypeError as error:
            raise InvalidRequest(f"A value of this request cannot be processed: {error}") from error
        deadline_s = time.monotonic() + (timeout_s or self._config.timeout_s)
        alone = False
        while True:
            try:
                answer = await self._one_turn(function, packed, tenant, alone, deadline_s)
            except KilledWorker:
                if alone:
                    raise InvalidRequest(
                        "The worker process ended while it was doing this alone, most likely for "
                        "lack of memory. Send less at a time."
                    ) from None
                log.warning("cpu_worker_lost", function=function)
                alone = True
            else:
                return _opened(answer)

    async def close(self) -> None:
        """Stop the CPU worker that we started, at once if it does not stop by itself."""
        self._closed = True
        nanny, self._nanny = self._nanny, None
        if nanny is None:
            return
        process = nanny.process and nanny.process.process
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(nanny.close(timeout=_STOP_S), _STOP_S + 0.5)
        if process is not None and process.is_alive():
            await process.kill()
            with contextlib.suppress(TimeoutError):
                await process.join(1.0)

    async def _one_turn(
        self, function: str, packed: bytes, tenant: TenantId, alone: bool, deadline_s: float
    ) -> bytes:
        workers = await self._ready_workers(deadline_s)
        self._turns.places = workers.places
        # Not around the block: what times out in it is told apart from what waits too long.
        turn = self._turns.turn(tenant, alone=alone)
        try:
            await asyncio.wait_for(turn.__aenter__(), deadline_s - time.monotonic())
        except TimeoutError:
            raise Saturated("The CPU workers are busy; try again later.", 5.0) from None
        try:
            return await self._submit(function, packed, workers, deadline_s)
        finally:
            await turn.__aexit__(None, None, None)

    async def _submit(
        self, function: str, packed: bytes, workers: _Workers, deadline_s: float
    ) -> bytes:
        key = f"tw-cpu-{function}-{secrets.token_hex(8)}"
        future: Any = self._client().submit(
            run,
            function,
            packed,
            self._log_level,
            key=key,
            resources={"CPU": 1},
            workers=workers.addresses,
        )
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                return await future
        except TimeoutError:
            await self._end(key)
            raise InvalidRequest(
                "This took too long and was given up. Send less at a time."
            ) from None
        except FutureCancelledError:
            raise HostLost("The connection to the cluster broke; try again.") from None
        finally:
            future.release()

    async def _end(self, key: str) -> None:
        """Restart the worker that is at a task: a thread cannot be stopped otherwise."""

        async def restart(dask_scheduler: Any) -> None:
            task = dask_scheduler.tasks.get(key)
            if task is not None and task.processing_on is not None:
                await dask_scheduler.restart_workers(
                    [task.processing_on.address],
                    wait_for_workers=False,
                    on_error="return",
                    stimulus_id="too-slow",
                )

        log.warning("task_given_up", key=key)
        await self._client().run_on_scheduler(restart)

    async def _ready_workers(self, deadline_s: float) -> _Workers:
        """CPU workers, once there is one; a lost one is soon replaced by its nanny."""
        patience_s = _PATIENCE_S if self._scheduler is not None else _PATIENCE_WITH_OTHERS_S
        until_s = min(deadline_s, time.monotonic() + patience_s)
        while True:
            if self._scheduler is not None:
                await self._start_worker(self._scheduler)
            workers = await self._workers()
            if workers.places:
                return workers
            if time.monotonic() > until_s:
                raise Saturated(
                    "This service has no CPU worker at the moment, which this needs. Its operator "
                    "starts one with: dask worker SCHEDULER --resources CPU=1",
                    10.0,
                )
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _workers(self) -> _Workers:
        # Nested, so that it travels by value: the scheduler need not have this package.
        def look(dask_scheduler: Any) -> list[tuple[str, float, bool]]:
            return [
                (ws.address, ws.resources["CPU"], bool(ws.resources.get("GPU")))
                for ws in dask_scheduler.workers.values()
                if ws.resources.get("CPU") and ws.status.name == "running"
            ]

        found = await self._client().run_on_scheduler(look)
        pure = {address: int(places) for address, places, beside_gpu in found if not beside_gpu}
        # Named only where Dask could take a wrong one: a task waits for a named worker for ever.
        named = list(pure) if len(pure) < len(found) else None
        return _Workers(places=sum(pure.values()), addresses=named)

    async def _start_worker(self, scheduler: str) -> None:
        async with self._starting:
            if self._closed:
                raise HostLost("The service is stopping.")
            if self._nanny is not None and self._nanny.status.name not in {"closed", "failed"}:
                return
            # The memory manager of a nanny reads its settings when it is made; those of the GPU
            # workers are off, since a terminated worker loses its actors.
            with dask.config.set({"distributed.worker.memory.terminate": 1.0}):
                make: Any = Nanny  # its types are guessed from its defaults
                nanny = make(
                    scheduler,
                    name="cpu-0",
                    nthreads=self._config.threads,
                    resources={"CPU": self._config.threads},
                    memory_limit=self._config.memory_bytes,
                    env={
                        "OMP_NUM_THREADS": "1",
                        "MKL_NUM_THREADS": "1",
                        "TOKENIZERS_PARALLELISM": "false",  # tasks are what runs in parallel
                        "CUDA_VISIBLE_DEVICES": "",
                    },
                    dashboard=False,
                    host="127.0.0.1",
                    silence_logs=None,
                )
            self._nanny = await nanny


def _opened(answer: bytes) -> Any:
    opened = packing.unpack(answer)
    if "kind" in opened:
        raise Failure(**opened).error()
    return opened["result"]
