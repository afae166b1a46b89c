"""The actor that owns a GPU worker: an async facade over the engine thread.

Every public method is async, takes and gives packed bytes, and only enqueues or waits, since the
async methods of all actors share the worker's event loop. Exceptions never cross as such (an
exception that fails to unpickle would hang the caller for ever); they travel as ``Failure``.

The gateway imports this module to name the class, so torch comes in only inside the constructor.
"""

import asyncio
import functools
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from distributed import get_worker

from twinkle_dask import packing
from twinkle_dask.checkpoints import exports, folders
from twinkle_dask.cluster.commands import (
    STREAM,
    Cancel,
    Command,
    Completion,
    CreateRun,
    DropRun,
    ExportFolder,
    Failure,
    FolderSaved,
    Health,
    HostConfig,
    LoadFolder,
    Role,
    Sample,
    SaveFolder,
)
from twinkle_dask.cluster.parts import Parts
from twinkle_dask.errors import HostLost, ServiceFault, TwinkleDaskError, new_incident
from twinkle_dask.logs import configure
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.types import (
    Embed,
    ForwardBackward,
    GradientStep,
    OptimStep,
    RunState,
    SampleRequest,
)

if TYPE_CHECKING:
    from twinkle_dask.cluster.engine_thread import EngineThread
    from twinkle_dask.sampler import interface

log = structlog.stdlib.get_logger(__name__)

_UNPACK_ASIDE_BYTES = 256 * 1024

Method = Callable[["Host", bytes], Awaitable[object]]


def answered(method: Method) -> Callable[["Host", bytes], Awaitable[bytes]]:
    """Make a method answer packed bytes whatever happens inside it."""

    @functools.wraps(method)
    async def wrapper(self: "Host", request: bytes) -> bytes:
        try:
            return packing.pack(await method(self, request))
        except TwinkleDaskError as error:
            return packing.pack(Failure.of(error))
        except Exception:
            incident = new_incident()
            log.exception("host_method_failed", method=method.__name__, incident=incident)
            return packing.pack(Failure.of(ServiceFault("The host failed.", incident)))

    return wrapper


class Host:
    """Carries a trainer engine, a sampler engine, or both, over one copy of the base weights.

    Args:
        config: A packed ``HostConfig``.
        log_level: Of this process's log.

    Raises:
        StartupError: The base model cannot be loaded.
    """

    def __init__(self, config: bytes, log_level: str) -> None:
        configure(log_level)
        # The engine thread runs much Python between its kernels; with the default of 5 ms every
        # message to the event loop would wait that long for the interpreter.
        sys.setswitchinterval(0.0005)
        self._config: HostConfig = packing.unpack(config)
        self._blobs = BlobStore(self._config.blob_url)
        self._epoch = 0
        self._arrived = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._comm: Any = None
        self._samples: set[str] = set()
        self._completions: list[Completion] = []
        self._parts = Parts(self._wake)
        self._saving: dict[str, tuple[Command, SaveFolder | ExportFolder, int]] = {}
        self._lock = threading.Lock()
        self._engine, self._facts = self._build()
        worker: Any = get_worker()  # distributed has no types
        worker.handlers[STREAM] = self.carry

    def _build(self) -> "tuple[EngineThread, Any]":
        # Here and not above, so that the gateway can name this class without loading torch.
        from twinkle_dask.cluster.engines import build_engines

        # Dask removes this folder with the worker, and at the next start of a worker beside it if
        # this one is killed.
        folder = Path(get_worker().local_directory)
        trainer, sampler, facts, threads = build_engines(self._config, folder)
        from twinkle_dask.cluster.engine_thread import EngineThread

        engine = EngineThread(trainer, sampler, self._read_adapter, self._on_done, threads)
        return engine, facts

    def _read_adapter(self, folder: str) -> Any:
        return folders.read_adapter(self._blobs, folder)

    @answered
    async def facts(self, request: bytes) -> object:
        """The base model's ``ModelFacts``."""
        return self._facts

    @answered
    async def health(self, request: bytes) -> object:
        """Answers ``Health`` while the event loop turns and the engine thread lives."""
        self._check_engine()
        if self._engine.trainer is None:
            return Health()
        paused, reason = self._engine.trainer.paused()
        return Health(paused=paused, reason=reason)

    @answered
    async def attach(self, request: bytes) -> object:
        """A gateway takes over: forget all runs, work and answers of the one before.

        The request is the new epoch. Commands of another one are neither accepted nor answered
        from now on; only what is being written for a checkpoint is written to its end.
        """
        with self._lock:
            self._epoch = packing.unpack(request)["epoch"]
        if self._comm is not None:
            self._comm.abort()
        forgotten: Future[None] = Future()
        self._engine.post(lambda: forgotten.set_result(self._forget()))
        await asyncio.wrap_future(forgotten)
        return {}

    async def carry(self, comm: Any, epoch: int) -> None:
        """Take a gateway's commands and send it their completions, until one of us leaves.

        A handler of the worker, since an answer to every message would double their number. What
        either side sends arrives once and in order, or the stream breaks and the host is lost.
        """
        self._loop = asyncio.get_running_loop()
        sending: asyncio.Task[None] | None = None
        try:
            self._check_epoch(epoch)
            self._comm = comm
            sending = asyncio.create_task(self._send_completions(comm, epoch))
            await comm.write(packing.pack({}))
            while True:
                await self._receive(packing.unpack(await comm.read()), epoch)
        except HostLost as error:
            await comm.write(packing.pack(Failure.of(error)))
        finally:
            if sending is not None:
                sending.cancel()
            comm.abort()

    async def _receive(self, commands: Iterable[Command], epoch: int) -> None:
        self._check_engine()
        for command in commands:
            try:
                body = await _body_of(command)
            except Exception as error:  # noqa: BLE001 - becomes this command's answer
                self._complete(command.id, error, epoch)
                continue
            self._check_epoch(epoch)  # another gateway may have come while it was unpacked
            try:
                self._accept(command, body, epoch)
            except Exception as error:  # noqa: BLE001 - becomes this command's answer
                self._complete(command.id, error, epoch)

    async def _send_completions(self, comm: Any, epoch: int) -> None:
        while True:
            await self._arrived.wait()
            if epoch != self._epoch:
                return  # they are for another gateway
            self._arrived.clear()
            with self._lock:
                completions, self._completions = self._completions, []
            # Taken after the completions, so that no part comes after its own.
            answers = [*self._parts.take(), *completions]
            if answers:
                try:
                    await comm.write(packing.pack(answers))
                    for completion in completions:
                        self._parts.end(completion.id)
                except OSError:
                    return  # the reader meets it too; the gateway has all of this done again
                except Exception:
                    # Whatever it was, these answers are gone: so must be the link, or their
                    # callers would wait for ever.
                    log.exception("completions_not_sent", count=len(completions))
                    comm.abort()
                    return

    @answered
    async def close(self, request: bytes) -> object:
        """Stop the engine thread, and remove what it has written to the worker's folder."""
        await asyncio.to_thread(self._engine.stop)
        return {}

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            raise HostLost("Another gateway has taken this host over.")

    def _check_engine(self) -> None:
        if self._engine.fault is not None:
            raise HostLost(f"The engine has died: {self._engine.fault!r}")

    def _forget(self) -> None:
        """Drop everything that was accepted; on the engine thread, so nothing ends meanwhile."""
        if self._engine.trainer is not None:
            self._engine.trainer.forget_all()
        for command_id in tuple(self._samples):
            self._engine.forget_sample(command_id)
        self._samples.clear()
        self._parts.clear()
        self._saving.clear()
        with self._lock:
            self._completions.clear()

    def _drop(self, command: Command) -> None:
        if self._engine.trainer is not None:
            for command_id in self._engine.trainer.drop_run(command.run):
                self._saving.pop(command_id, None)
                self._complete(command_id, HostLost("The run was dropped from this host."))
        self._complete(command.id, None)

    def _accept(self, command: Command, body: object, epoch: int) -> None:
        from twinkle_dask.sampler import interface
        from twinkle_dask.trainer import work

        def train(body: work.WorkBody) -> None:
            self._engine.train(
                work.Work(id=command.id, run=command.run, tenant=command.tenant, body=body)
            )

        match body:
            case ForwardBackward() | Embed() | OptimStep() | GradientStep():
                train(body)
            case CreateRun():
                train(work.CreateRun(spec=body.spec))
            case LoadFolder():
                state = self._engine.pool.submit(folders.read_state, self._blobs, body.folder)
                train(work.LoadState(state=state, with_optimizer=body.with_optimizer))
                state.add_done_callback(self._engine.wake)
            case SaveFolder():
                self._saving[command.id] = (command, body, epoch)
                train(work.ExportState(gradients=body.gradients, optimizer=body.optimizer))
            case ExportFolder():
                self._saving[command.id] = (command, body, epoch)
                train(work.ExportState(gradients=False, optimizer=False))
            case DropRun():
                self._engine.post(lambda: self._drop(command))
            case Sample():
                request = packing.unpack(body.request)
                self._samples.add(command.id)
                self._engine.sample(
                    interface.SampleWork(
                        id=command.id,
                        tenant=command.tenant,
                        request=request,
                        adapter=body.adapter,
                        watch=self._watch(command.id, request) if body.watched else None,
                    )
                )
            case Cancel():
                self._samples.discard(body.command_id)
                self._parts.end(body.command_id)
                self._engine.cancel_sample(body.command_id)
                self._complete(command.id, None)
            case _:
                raise ServiceFault(f"Hosts do not know {type(body).__name__}.")

    def _watch(self, command_id: str, request: SampleRequest) -> "interface.Watch":
        from twinkle_dask.sampler.text_stream import TextStream

        sampler = self._engine.sampler
        tokenizer = None if sampler is None else sampler.tokenizer
        if tokenizer is None:
            return self._parts.watch(command_id, None)
        prompt = request.prompt[-8:].tolist()
        return self._parts.watch(command_id, lambda: TextStream(tokenizer, prompt))

    def _on_done(self, command_id: str, outcome: object) -> None:
        saving = self._saving.pop(command_id, None)
        if saving is not None and isinstance(outcome, RunState):
            self._engine.writer.submit(self._save, *saving, outcome)
            return
        self._complete(command_id, outcome)

    def _save(
        self, command: Command, body: SaveFolder | ExportFolder, epoch: int, state: RunState
    ) -> None:
        """Write a run's state to its folder; on the pool."""
        try:
            if isinstance(body, ExportFolder):
                size = exports.write_export(
                    self._blobs,
                    body.folder,
                    state.adapter,
                    base_model=body.base_model,
                    recipients=body.recipients,
                )
            else:
                size = folders.write_state(
                    self._blobs, body.folder, state, base_model=body.base_model
                )
                if self._config.role is Role.BOTH and not body.optimizer:
                    self._engine.offer_adapter(body.folder, state.adapter)
        except Exception as error:  # noqa: BLE001 - becomes this command's answer
            self._complete(command.id, error, epoch)
        else:
            self._complete(command.id, FolderSaved(num_bytes=size), epoch)

    def _complete(self, command_id: str, outcome: object, epoch: int | None = None) -> None:
        """Have a command's answer sent, unless it is of another epoch. Any thread."""
        from twinkle_dask.cluster.engine_thread import as_error

        error = as_error(outcome)
        if error is not None:
            completion = Completion(id=command_id, failure=Failure.of(error))
        else:
            result = b"" if outcome is None else packing.pack(outcome)
            completion = Completion(id=command_id, result=result)
        self._samples.discard(command_id)
        with self._lock:
            if epoch is not None and epoch != self._epoch:
                return
            self._completions.append(completion)
        self._wake()

    def _wake(self) -> None:
        """There is something to send. Any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._arrived.set)


async def _body_of(command: Command) -> object:
    if len(command.body) > _UNPACK_ASIDE_BYTES:
        # Still in order: one batch is accepted after the other.
        return await asyncio.to_thread(packing.unpack, command.body)
    return packing.unpack(command.body)
