"""One host as the gateway sees it: commands out in order, completions in, and when it is lost.

Both go through one stream: a connection of Dask's own kind to a handler that the host has added to
its worker, so one message a way, and what gathers while one is written goes with the next. Seldom
calls (attach, health) are raw ``actor_execute`` in place of Dask's actor proxy, whose futures never
resolve on some failures.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, cast

import structlog
from distributed import Client
from distributed.comm import core
from distributed.protocol.serialize import to_serialize

from twinkle_dask import packing
from twinkle_dask.cluster.commands import (
    STREAM,
    Command,
    Completion,
    Failure,
    Health,
    Part,
    Role,
)
from twinkle_dask.errors import HostLost
from twinkle_dask.types import ModelFacts, SamplePart

log = structlog.stdlib.get_logger(__name__)

_comm = cast(Any, core)  # distributed has no types

_CALL_TIMEOUT_S = 30.0
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
        health: What the host said of itself last.
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
        self.health = Health()
        self.lost = asyncio.Event()
        self._client = client
        self._epoch = epoch
        self._outbox: deque[Command] = deque()
        self._outbox_filled = asyncio.Event()
        self._waiting: dict[str, asyncio.Future[bytes]] = {}
        self._watching: dict[str, Callable[[SamplePart], None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._comm: Any = None
        self._on_lost: Callable[[HostLink], None] = lambda _: None

    @property
    def in_flight(self) -> int:
        """Commands that have not been answered."""
        return len(self._waiting)

    async def start(self, on_lost: "Callable[[HostLink], None]") -> None:
        """Connect and begin to carry commands; ``on_lost`` is called once if the host goes away.

        Raises:
            HostLost: It cannot be reached; ``on_lost`` is not called.
        """
        self._on_lost = on_lost
        comm = self._comm = await open_stream(self._client, self.address, self._epoch)
        jobs = (self._write_forever(comm), self._read_forever(comm), self._probe_forever())
        self._tasks = [asyncio.create_task(self._guard(job)) for job in jobs]

    def send(
        self, command: Command, on_part: "Callable[[SamplePart], None] | None" = None
    ) -> "asyncio.Future[bytes]":
        """Queue a command. The future gives its packed result.

        Commands of one run reach the host in the order of these calls. The future raises what the
        host answered, or HostLost; then nobody knows whether the command took effect.

        Args:
            command: What to do.
            on_part: Told what a watched sample has drawn, each time before the future is done.
        """
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if self.lost.is_set():
            future.set_exception(HostLost(f"Host {self.name} is gone."))
            return future
        self._waiting[command.id] = future
        if on_part is not None:
            self._watching[command.id] = on_part
            future.add_done_callback(lambda _: self._watching.pop(command.id, None))
        future.add_done_callback(lambda done: done.cancelled() and self._forget(command.id))
        self._outbox.append(command)
        self._outbox_filled.set()
        return future

    def _forget(self, command_id: str) -> None:
        """Nobody waits for the command any more, and a host may never answer it."""
        self._waiting.pop(command_id, None)

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
        if self._comm is not None:
            self._comm.abort()
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

    async def _write_forever(self, comm: Any) -> None:
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
                with _host_lost():
                    await comm.write(packing.pack(batch))

    async def _read_forever(self, comm: Any) -> None:
        while True:
            with _host_lost():
                message = await comm.read()
            answers: tuple[Completion | Part, ...] = open_answer(message)
            for answer in answers:
                if isinstance(answer, Completion):
                    self._settle(answer)
                elif (on_part := self._watching.get(answer.id)) is not None:
                    on_part(answer.drawn)

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
                self.health = cast(Health, await self.call("health", {}, _HEALTH_TIMEOUT_S))
                misses = 0
            except TimeoutError:
                misses += 1
        raise HostLost("it does not answer")


async def open_stream(client: Client, address: str, epoch: int) -> Any:
    """A connection of our own to a worker's host: commands one way, completions the other.

    Raises:
        HostLost: The worker cannot be reached or has no host for this epoch.
    """
    pool: Any = client.rpc
    with _host_lost():
        comm: Any = await _comm.connect(address, **pool.connection_args)
        await comm.write({"op": STREAM, "epoch": epoch, "reply": False})
        try:
            open_answer(await asyncio.wait_for(comm.read(), _CALL_TIMEOUT_S))
        except BaseException:
            comm.abort()
            raise
    return comm


@contextlib.contextmanager
def _host_lost() -> Generator[None]:
    try:
        yield
    except OSError as error:  # time-outs and Dask's closed connections are among them
        raise HostLost(f"its worker is gone ({error!r})") from None


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
