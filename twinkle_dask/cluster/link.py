"""One host as the gateway sees it: commands out in order, completions in, and when it is lost.

Commands are coalesced: while one ``submit`` is on its way the next ones gather, and go together.
Completions come through one long poll with a cursor. So a host costs the gateway two connections,
however many requests are in flight. A raw ``actor_execute`` is used in place of Dask's actor
proxy, whose futures never resolve on some failures.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import structlog
from distributed import Client
from distributed.protocol.serialize import to_serialize

from twinkle_dask import packing
from twinkle_dask.cluster.commands import Command, Completion, Completions, Failure, Poll, Role
from twinkle_dask.errors import HostLost
from twinkle_dask.types import ModelFacts

log = structlog.stdlib.get_logger(__name__)

_CALL_TIMEOUT_S = 30.0
_POLL_WAIT_S = 20.0
_HEALTH_INTERVAL_S = 2.0
_HEALTH_TIMEOUT_S = 3.0
_HEALTH_MISSES = 3
_BATCH_BYTES = 32 * 2**20


class HostLink:
    """A host that answers commands until it is lost.

    Attributes:
        name: For logs, unique over time.
        facts: Of the base model it carries.
        load: Runs placed here; kept by the operations.
    """

    def __init__(
        self,
        client: Client,
        *,
        name: str,
        address: str,
        key: str,
        source: str,
        role: Role,
        facts: ModelFacts,
        epoch: int,
    ) -> None:
        self.name = name
        self.address = address
        self.key = key
        self.source = source
        self.role = role
        self.facts = facts
        self.load = 0
        self.lost = asyncio.Event()
        self._client = client
        self._epoch = epoch
        self._outbox: deque[Command] = deque()
        self._outbox_filled = asyncio.Event()
        self._waiting: dict[str, asyncio.Future[bytes]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._on_lost: Callable[[HostLink], None] = lambda _: None

    @property
    def in_flight(self) -> int:
        """Commands that have not been answered."""
        return len(self._waiting)

    def start(self, on_lost: "Callable[[HostLink], None]") -> None:
        """Begin to carry commands; ``on_lost`` is called once if the host goes away."""
        self._on_lost = on_lost
        jobs = (self._submit_forever(), self._poll_forever(), self._probe_forever())
        self._tasks = [asyncio.create_task(self._guard(job)) for job in jobs]

    def send(self, command: Command) -> "asyncio.Future[bytes]":
        """Queue a command. The future gives its packed result.

        Commands of one run reach the host in the order of these calls. The future raises what the
        host answered, or HostLost; then nobody knows whether the command took effect.
        """
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self.lost.is_set():
            future.set_exception(HostLost(f"Host {self.name} is gone."))
            return future
        self._waiting[command.id] = future
        self._outbox.append(command)
        self._outbox_filled.set()
        return future

    async def call(self, method: str, request: object, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
        """One packed round trip to the actor.

        Raises:
            HostLost: The worker does not answer, or no longer has the actor.
            TwinkleDaskError: What the host answered.
        """
        payload = await call_actor(
            self._client, self.address, self.key, method, packing.pack(request), timeout_s
        )
        return open_answer(payload)

    async def stop(self) -> None:
        """Stop carrying commands; those in flight end as HostLost."""
        self._lose("the service is stopping", tell=False)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lose(self, why: str) -> None:
        """The host is known to be gone."""
        self._lose(why, tell=True)

    def _lose(self, why: str, *, tell: bool) -> None:
        if self.lost.is_set():
            return
        self.lost.set()
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(HostLost(f"Host {self.name} is gone: {why}"))
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        if tell:
            log.warning("host_lost", host=self.name, why=why, in_flight=len(waiting))
            self._on_lost(self)

    async def _guard(self, job: Any) -> None:
        try:
            await job
        except HostLost as error:
            self.lose(error.message)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("link_failed", host=self.name)
            self.lose(repr(error))

    async def _submit_forever(self) -> None:
        number = 0
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            while self._outbox:
                batch: list[Command] = []
                size = 0
                while self._outbox and (not batch or size < _BATCH_BYTES):
                    command = self._outbox.popleft()
                    batch.append(command)
                    size += len(command.body)
                number += 1
                message = {"epoch": self._epoch, "number": number, "commands": batch}
                await self._insist("submit", message)

    async def _poll_forever(self) -> None:
        cursor = 0
        while True:
            request = {"epoch": self._epoch, "poll": Poll(cursor=cursor, wait_s=_POLL_WAIT_S)}
            answer = cast(Completions, await self._insist("poll", request))
            cursor = answer.cursor
            for completion in answer.items:
                self._settle(completion)

    def _settle(self, completion: Completion) -> None:
        future = self._waiting.pop(completion.id, None)
        if future is None or future.done():
            return
        if completion.failure is not None:
            future.set_exception(completion.failure.error())
        else:
            future.set_result(completion.result)

    async def _probe_forever(self) -> None:
        """Notice a host that is frozen: its connections stay open, nothing comes back."""
        misses = 0
        while misses < _HEALTH_MISSES:
            await asyncio.sleep(_HEALTH_INTERVAL_S)
            try:
                await self.call("health", {}, _HEALTH_TIMEOUT_S)
                misses = 0
            except TimeoutError:
                misses += 1
        raise HostLost("it does not answer")

    async def _insist(self, method: str, request: object) -> Any:
        """Call again after a time-out: the host knows which batch it has seen last."""
        while True:
            with contextlib.suppress(TimeoutError):
                return await self.call(method, request)


async def call_actor(
    client: Client, address: str, key: str, method: str, request: bytes, timeout_s: float
) -> bytes:
    """Call a method of an actor with bytes, and get bytes.

    Raises:
        HostLost: The worker cannot be reached or has no such actor.
        TimeoutError: No answer in time; the method may go on.
    """
    rpc: Any = client.rpc  # distributed has no types
    call = rpc(address).actor_execute(
        function=method, actor=key, args=[to_serialize(request)], kwargs={}
    )
    try:
        answer = await asyncio.wait_for(call, timeout_s)
    except TimeoutError:
        raise
    except (OSError, KeyError) as error:
        raise HostLost(f"its worker is gone ({error!r})") from None
    if answer["status"] != "OK":
        raise HostLost(f"its worker failed ({answer['exception']!r})")
    return answer["result"]


def open_answer(payload: bytes) -> Any:
    """A host's answer as a value; raises the failure it may carry."""
    value = packing.unpack(payload)
    if isinstance(value, Failure):
        raise value.error()
    return value
