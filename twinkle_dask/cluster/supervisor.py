"""Starts or joins a cluster, places hosts on workers, notices losses and replaces them.

The only writer of placements. A host's key is ``tw-host-<service>-<slot>-<random>``: the service
part tells our hosts from another gateway's, the slot part says what the host was made for, and the
random part is never used again. Hosts are published, so they outlive a gateway that was killed;
the next gateway finds them by name and takes them over under a new epoch.
"""

import asyncio
import contextlib
import hashlib
import secrets
import time
from dataclasses import dataclass
from typing import Any

import structlog
from distributed import Client

from twinkle_dask import packing
from twinkle_dask.cluster.commands import HostConfig, Role
from twinkle_dask.cluster.embedded import start_embedded, stop_embedded, use_settings
from twinkle_dask.cluster.host import Host
from twinkle_dask.cluster.link import HostLink, call_actor, open_answer
from twinkle_dask.cluster.placement import Slot, num_workers_needed, plan
from twinkle_dask.cluster.processing import Processing
from twinkle_dask.config import ServiceConfig
from twinkle_dask.errors import HostLost, StartupError
from twinkle_dask.types import ModelFacts

log = structlog.stdlib.get_logger(__name__)

_PREFIX = "tw-host-"
_RETRY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A GPU worker of the cluster. ``hosts`` are the keys of the host actors it carries."""

    address: str
    name: str
    hosts: tuple[str, ...]


class Supervisor:
    """Keeps a host alive for every slot of the plan.

    Attributes:
        processing: Work on CPU workers; there once ``start`` has returned.

    Args:
        config: Of the whole service.
        blob_url: Where hosts write folders; every worker must reach it.
    """

    processing: Processing

    def __init__(self, config: ServiceConfig, blob_url: str) -> None:
        self._config = config
        self._blob_url = blob_url
        self._epoch = time.time_ns()
        self._service = hashlib.sha256(blob_url.encode()).hexdigest()[:12]
        self._cluster: Any = None
        self._client: Any = None
        self._links: dict[Slot, HostLink] = {}
        self._facts: dict[str, ModelFacts] = {}
        self._changed = asyncio.Condition()
        self._connecting = asyncio.Lock()
        self._replacing: set[asyncio.Task[None]] = set()
        self._claimed: set[str] = set()
        self._closing = False

    async def start(self) -> None:
        """Return when every slot has a host that answers.

        Raises:
            StartupError: No cluster, too few workers, or a base model that cannot be loaded.
        """
        use_settings()
        address = await self._open_cluster()
        try:
            self._client = await self._connect(address)
        except OSError as error:
            raise StartupError(f"Cannot reach the Dask scheduler {address}: {error}") from None
        self.processing = Processing(
            self._config.processing,
            lambda: self._client,
            scheduler=address if self._cluster is not None else None,
            log_level=self._config.log_level,
        )
        slots = plan(self._config.models, await self._enough_workers())
        taken = await self._take_over(slots)
        await asyncio.gather(*(self._place(slot) for slot in slots if slot not in taken))

    def facts(self, source: str) -> ModelFacts:
        """Of a base model that was loaded at the start."""
        return self._facts[source]

    def links(self) -> tuple[HostLink, ...]:
        """Hosts that are up."""
        return tuple(self._links.values())

    def why_not_up(self, source: str) -> str | None:
        """What is missing of a base model's hosts, in words; None if nothing is."""
        if not self._with_role(source, Role.TRAINER):
            return "No host that trains it is up; another is being started."
        sampled = self._facts[source].why_not_sampled is None
        if sampled and not self._with_role(source, Role.SAMPLER):
            return "No host that samples it is up; another is being started."
        return None

    async def trainer(self, source: str) -> HostLink:
        """The host with the fewest runs that trains this base model; waits until there is one."""
        while True:
            trainers = self._with_role(source, Role.TRAINER)
            if trainers:
                return min(trainers, key=lambda link: link.load)
            await self._wait_for_change()

    async def sampler(self, source: str, adapter: str | None) -> HostLink:
        """A host that samples this base model; waits until there is one.

        The same adapter goes to the same host while that one is not much busier than another, so
        that few hosts hold a copy of it.
        """
        while True:
            samplers = self._with_role(source, Role.SAMPLER)
            if samplers:
                least = min(link.in_flight for link in samplers)
                near = [link for link in samplers if link.in_flight <= least + 8]
                return max(near, key=lambda link: _affinity(link.name, adapter))
            await self._wait_for_change()

    async def close(self) -> None:
        """Stop the embedded cluster, or release our hosts of a shared one."""
        self._closing = True
        for task in self._replacing:
            task.cancel()
        links = list(self._links.values())
        self._links.clear()
        if self._cluster is None:
            await asyncio.gather(*(self._release(link.address, link.key) for link in links))
        for link in links:
            await link.stop()
        if self._client is not None:
            await self.processing.close()
            self._client.unsubscribe_topic("all")
            await self._client.close()
        if self._cluster is not None:
            await stop_embedded(self._cluster)

    def _with_role(self, source: str, role: Role) -> list[HostLink]:
        return [
            link
            for slot, link in self._links.items()
            if slot.source == source and slot.role in {role, Role.BOTH}
        ]

    async def _wait_for_change(self) -> None:
        async with self._changed:
            await self._changed.wait()

    async def _open_cluster(self) -> str:
        if self._config.scheduler is not None:
            return self._config.scheduler
        self._cluster = await start_embedded(
            num_workers_needed(self._config.models),
            self._config.engine.threads,
            self._config.dashboard,
        )
        return self._cluster.scheduler_address

    async def _enough_workers(self) -> int:
        """Wait for the workers that the configuration needs, and a moment for more."""
        deadline_s = time.monotonic() + self._config.start_timeout_s
        if self._config.scheduler is not None:
            # A short patience: on a shared cluster workers are there, or somebody must start them.
            deadline_s = min(deadline_s, time.monotonic() + 30)
        seen = -1
        while True:
            usable = [w for w in await self._workers() if not self._foreign(w)]
            try:
                plan(self._config.models, len(usable))
                if len(usable) == seen:
                    return seen
            except StartupError:
                if time.monotonic() > deadline_s:
                    raise
            seen = len(usable)
            await asyncio.sleep(_RETRY_S if self._cluster is None else 0)

    def _foreign(self, worker: Worker) -> bool:
        return any(not key.startswith(f"{_PREFIX}{self._service}-") for key in worker.hosts)

    async def _workers(self) -> list[Worker]:
        # Nested, so that it travels by value: the scheduler need not have this package.
        def look(dask_scheduler: Any) -> list[tuple[str, str, list[str]]]:
            return [
                (ws.address, str(ws.name), [str(ts.key) for ts in ws.actors])
                for ws in dask_scheduler.workers.values()
                if ws.resources.get("GPU") and ws.status.name == "running"
            ]

        found = await self._client.run_on_scheduler(look)
        return [
            Worker(address=a, name=n, hosts=tuple(k for k in keys if k.startswith(_PREFIX)))
            for a, n, keys in found
        ]

    def _host_config(self, slot: Slot) -> bytes:
        engine = self._config.engine
        return packing.pack(
            HostConfig(
                source=slot.source,
                role=slot.role,
                dtype=self._config.dtype,
                max_rank=self._config.limits.max_rank,
                blob_url=self._blob_url,
                threads=engine.threads,
                tokens_per_micro_batch=engine.tokens_per_micro_batch,
                kv_cache_bytes=engine.kv_cache_bytes,
                adapter_bytes=engine.adapter_bytes,
                adapter_host_bytes=engine.adapter_host_bytes,
                deterministic=engine.deterministic,
            )
        )

    def _key_stem(self, slot: Slot) -> str:
        digest = hashlib.sha256(self._host_config(slot) + bytes([slot.index])).hexdigest()[:12]
        return f"{_PREFIX}{self._service}-{digest}-"

    async def _take_over(self, slots: list[Slot]) -> set[Slot]:
        """Re-attach the hosts of a gateway before us; release those that no slot wants."""
        by_stem = {self._key_stem(slot): slot for slot in slots}
        taken: set[Slot] = set()
        for worker in await self._workers():
            for key in worker.hosts:
                if self._foreign(Worker(address="", name="", hosts=(key,))):
                    continue
                slot = by_stem.get(key.rpartition("-")[0] + "-")
                if slot is not None and slot not in taken:
                    try:
                        await self._link(slot, worker, key)
                    except (HostLost, TimeoutError) as error:
                        log.warning("host_not_taken_over", key=key, error=str(error))
                    else:
                        taken.add(slot)
                        continue
                await self._release(worker.address, key)
        return taken

    async def _place(self, slot: Slot) -> None:
        """Start a host for a slot on a free worker."""
        worker = await self._claim_worker()
        key = self._key_stem(slot) + secrets.token_hex(6)
        try:
            future = self._client.submit(
                Host,
                self._host_config(slot),
                self._config.log_level,
                actor=True,
                key=key,
                workers=[worker.address],
                allow_other_workers=False,
            )
            try:
                await asyncio.wait_for(future, self._config.start_timeout_s)
                # A published actor outlives a broken connection between us and the scheduler.
                await self._client.publish_dataset(future, name=key)
            except TimeoutError:
                raise StartupError(
                    f"{slot.source} was not loaded within {self._config.start_timeout_s:.0f} s."
                ) from None
            finally:
                future.release()
            await self._link(slot, worker, key)
        finally:
            self._claimed.discard(worker.address)

    async def _claim_worker(self) -> Worker:
        while True:
            for worker in await self._workers():
                if not worker.hosts and worker.address not in self._claimed:
                    self._claimed.add(worker.address)
                    return worker
            await asyncio.sleep(_RETRY_S)

    async def _link(self, slot: Slot, worker: Worker, key: str) -> None:
        request = packing.pack({"epoch": self._epoch})
        answer = await call_actor(self._client, worker.address, key, "attach", request, 30.0)
        open_answer(answer)
        answer = await call_actor(self._client, worker.address, key, "facts", request, 30.0)
        facts: ModelFacts = open_answer(answer)
        link = HostLink(
            self._client,
            name=key.removeprefix(_PREFIX),
            address=worker.address,
            key=key,
            source=slot.source,
            role=slot.role,
            facts=facts,
            epoch=self._epoch,
        )
        self._facts[slot.source] = facts
        await link.start(lambda lost: self._on_lost(slot, lost))
        self._links[slot] = link
        log.info("host_ready", host=link.name, worker=worker.name, role=slot.role)
        async with self._changed:
            self._changed.notify_all()

    def _on_event(self, event: Any) -> None:
        _, message = event
        if isinstance(message, dict) and message.get("action") == "remove-worker":  # pyright: ignore[reportUnknownMemberType]
            for link in list(self._links.values()):
                if link.address == message.get("worker"):  # pyright: ignore[reportUnknownMemberType]
                    link.lose("its worker left the cluster")

    def _on_lost(self, slot: Slot, link: HostLink) -> None:
        if self._links.get(slot) is link:
            del self._links[slot]
        if not self._closing:
            task = asyncio.create_task(self._replace(slot, link))
            self._replacing.add(task)
            task.add_done_callback(self._replacing.discard)

    async def _replace(self, slot: Slot, link: HostLink) -> None:
        """Fence a lost host and fill its slot again, however long that takes."""
        fenced = False
        while True:
            try:
                await self._reconnect()
                if not fenced:
                    await self._fence(link)
                    fenced = True
                await self._place(slot)
            except Exception:
                # No worker, no scheduler, a worker that dies while it loads: all may pass.
                log.exception("host_not_replaced", source=slot.source)
                await asyncio.sleep(_RETRY_S)
            else:
                return

    async def _fence(self, link: HostLink) -> None:
        """Make sure that a host we gave up cannot go on, and that no call to it hangs.

        Under a nanny the worker's process is replaced, which also ends a frozen one; another
        worker is removed from the cluster, and exits when it sees that.
        """
        address = link.address

        async def restart(dask_scheduler: Any) -> None:
            if address in dask_scheduler.workers:
                await dask_scheduler.restart_workers(
                    [address], wait_for_workers=False, on_error="return", stimulus_id="fence"
                )

        await self._client.run_on_scheduler(restart)
        with contextlib.suppress(KeyError):
            await self._client.unpublish_dataset(link.key)
        self._client.rpc.remove(address)

    async def _reconnect(self) -> None:
        """A client that lost its scheduler for too long is closed for good; make another."""
        async with self._connecting:
            if self._client.status == "closed" and self._config.scheduler is not None:
                self._client = await self._connect(self._config.scheduler)

    async def _connect(self, address: str) -> Any:
        client: Any = await Client(
            address, asynchronous=True, direct_to_workers=True, name="twinkle-gateway"
        )
        client.subscribe_topic("all", self._on_event)
        return client

    async def _release(self, address: str, key: str) -> None:
        """Free what a host holds on a shared cluster."""
        try:
            # Its engine first, or the thread would keep the weights after the actor is gone.
            await call_actor(self._client, address, key, "close", packing.pack({}), 2.0)
        except (HostLost, TimeoutError) as error:
            log.warning("host_not_closed", key=key, error=str(error))
        try:
            await asyncio.wait_for(self._client.unpublish_dataset(key), 1.0)
        except (OSError, KeyError, TimeoutError) as error:
            log.warning("host_not_released", key=key, error=str(error))


def _affinity(host: str, adapter: str | None) -> bytes:
    """Highest-random-weight hashing."""
    return hashlib.sha256(f"{host}|{adapter}".encode()).digest()
