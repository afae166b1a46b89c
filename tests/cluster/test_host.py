"""A host alone, with a stream and an engine that fail on demand."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from twinkle_dask import packing
from twinkle_dask.cluster import host as module
from twinkle_dask.cluster.commands import Command, CreateRun, LoadFolder, SaveFolder
from twinkle_dask.cluster.engine_thread import EngineThread
from twinkle_dask.cluster.host import Host
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.trainer.engine import Trainer
from twinkle_dask.trainer.work import Completion, Work
from twinkle_dask.types import LoraSpec, RunId, TenantId

PATIENCE_S = 20.0


class Recorder:
    """A trainer that keeps what it gets."""

    busy = False

    def __init__(self) -> None:
        self.works: dict[str, Work] = {}
        self.refuse: Exception | None = None
        self.got = threading.Event()
        self.three = threading.Event()

    def submit(self, work: Work) -> None:
        self.got.set()
        if self.refuse is not None:
            raise self.refuse
        self.works[work.id] = work
        if len(self.works) == 3:
            self.three.set()

    def forget_all(self) -> None:
        self.works.clear()

    def on_moved(self, wake: Callable[[], None]) -> None: ...

    def step(self) -> list[Completion]:
        return []

    def close(self) -> None: ...


class Stream:
    """One end of a comm."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[list[Command]] = asyncio.Queue()
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.closed = asyncio.Event()
        self.failure: Exception | None = None

    async def read(self) -> bytes:
        reading = asyncio.ensure_future(self.incoming.get())
        closed = asyncio.ensure_future(self.closed.wait())
        await asyncio.wait((reading, closed), return_when=asyncio.FIRST_COMPLETED)
        for task in (reading, closed):
            task.cancel()
        if self.closed.is_set():
            raise OSError("closed")
        return packing.pack(reading.result())

    async def write(self, message: bytes) -> None:
        if self.closed.is_set():
            raise OSError("closed")
        unpacked = packing.unpack(message)
        if self.failure is not None:
            raise self.failure
        self.sent.put_nowait(unpacked)

    def abort(self) -> None:
        self.closed.set()


@pytest.fixture
def trainer() -> Recorder:
    return Recorder()


@pytest.fixture
def host(trainer: Recorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    engines: list[EngineThread] = []

    def build(self: Host) -> tuple[EngineThread, None]:
        done: Any = self._on_done  # pyright: ignore[reportPrivateUsage]
        engines.append(EngineThread(cast(Trainer, trainer), None, cast(Any, None), done, 1))
        return engines[0], None

    class Worker:
        handlers: dict[str, object] = {}  # noqa: RUF012

    class Config:
        blob_url = "memory://"

        def __init__(self, _: bytes) -> None: ...

    def ignored(*_: object) -> None: ...

    monkeypatch.setattr(Host, "_build", build)
    monkeypatch.setattr(module, "get_worker", Worker)
    for name in ("configure", "BlobStore", "sys.setswitchinterval", "folders.read_state"):
        monkeypatch.setattr(f"{module.__name__}.{name}", ignored)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "unpack", Config)
        host = Host(b"", "info")
    yield host
    engines[0].stop()


def command(command_id: str, body: object = CreateRun(spec=LoraSpec(rank=1, seed=0))) -> Command:
    return Command(id=command_id, run=RunId("r"), tenant=TenantId("t"), body=packing.pack(body))


async def attach(host: Host, epoch: int) -> None:
    assert packing.unpack(await host.attach(packing.pack({"epoch": epoch}))) == {}


async def connected(host: Host, epoch: int) -> "tuple[Stream, asyncio.Task[None]]":
    stream = Stream()
    carrying = asyncio.create_task(host.carry(stream, epoch))
    assert await asyncio.wait_for(stream.sent.get(), PATIENCE_S) == {}
    return stream, carrying


async def over(carrying: "asyncio.Task[None]") -> None:
    with pytest.raises(OSError, match="closed"):
        await asyncio.wait_for(carrying, PATIENCE_S)


async def test_work_that_the_trainer_refuses_fails_alone(host: Host, trainer: Recorder) -> None:
    trainer.refuse = InvalidRequest("nothing to adapt")
    await attach(host, 1)
    stream, carrying = await connected(host, 1)
    stream.incoming.put_nowait([command("1")])
    (done,) = await asyncio.wait_for(stream.sent.get(), PATIENCE_S)
    assert done.id == "1"
    assert isinstance(done.failure.error(), InvalidRequest)
    trainer.refuse = None
    trainer.got.clear()
    stream.incoming.put_nowait([command("2")])
    await asyncio.to_thread(trainer.got.wait, PATIENCE_S)
    stream.abort()
    await over(carrying)


async def test_answers_that_cannot_be_sent_end_the_link(host: Host, trainer: Recorder) -> None:
    """Whatever the reason; the gateway then has the work done again."""
    trainer.refuse = InvalidRequest("no")
    await attach(host, 1)
    stream, carrying = await connected(host, 1)
    stream.failure = TypeError("cannot be sent")
    with capture_logs() as logs:
        stream.incoming.put_nowait([command("1")])
        await over(carrying)
    assert [entry["event"] for entry in logs] == ["completions_not_sent"]


async def test_a_new_gateway_finds_nothing_of_the_one_before(
    host: Host, trainer: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither work that waits, nor what was in the middle of being accepted, nor its answer."""
    unpacking, go = threading.Event(), threading.Event()
    real = packing.unpack

    def slow(data: bytes) -> Any:
        if threading.current_thread() is not threading.main_thread():
            unpacking.set()
            assert go.wait(PATIENCE_S)
        return real(data)

    monkeypatch.setattr(packing, "unpack", slow)
    await attach(host, 1)
    old, carrying = await connected(host, 1)
    save = SaveFolder(folder="f", gradients=False, optimizer=False, base_model="m")
    load = LoadFolder(folder="g", with_optimizer=True)
    old.incoming.put_nowait([command("1"), command("2", load), command("3", save)])
    assert await asyncio.to_thread(trainer.three.wait, PATIENCE_S)
    monkeypatch.setattr(module, "_UNPACK_ASIDE_BYTES", 0)
    old.incoming.put_nowait([command("4"), command("5")])
    await asyncio.to_thread(unpacking.wait, PATIENCE_S)
    await attach(host, 2)
    new, carrying_new = await connected(host, 2)
    assert trainer.works == {}
    go.set()
    await over(carrying)
    posted: Future[None] = Future()
    host._engine.post(lambda: posted.set_result(None))  # pyright: ignore[reportPrivateUsage]
    await asyncio.wrap_future(posted)
    assert trainer.works == {}
    assert new.sent.empty()
    new.abort()
    await over(carrying_new)
