"""The two front doors: a service as its tenant sees it."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from twinkle_dask_client.addresses import Address
from twinkle_dask_client.archives import new_archive, unpack
from twinkle_dask_client.calls import datasets as dataset_calls
from twinkle_dask_client.calls import service as calls
from twinkle_dask_client.dataset import AsyncDataset, Dataset
from twinkle_dask_client.door import AsyncDoor, Door, ServiceAddress, SessionSettings
from twinkle_dask_client.inputs import Lora, Rows, Source
from twinkle_dask_client.models import Capabilities, Checkpoint, RunInfo, RunPage
from twinkle_dask_client.progress import Display
from twinkle_dask_client.retrying import RetryPolicy
from twinkle_dask_client.run import AsyncRun, Run
from twinkle_dask_client.sampler import AsyncSampler, Sampler

_LORA = Lora()


class Service:
    """A service as its tenant sees it. Use it in a ``with`` block, or ``close`` it.

    Runs, samplers and data sets belong to a session, which is opened when the first of them is
    made, kept alive in the background, and ended by ``close``. Several threads may use one
    instance.

    Args:
        url: Address of the service; else ``TWINKLE_DASK_URL``, else ``http://127.0.0.1:8000``.
        api_key: The tenant's key; else ``TWINKLE_DASK_API_KEY``. ``health`` needs none.
        timeout_s: Longest silence within one attempt, in seconds; calls that wait for work have
            600 at least.
        retry: How patient to be with what failed for reasons which pass.
        metadata: Kept with the session.
        heartbeat_s: Seconds between two heartbeats of the session.
        progress: Show on stderr what takes long; None does so on a terminal.
        transport: Another way to send, for tests.

    Raises:
        NotConfigured: The address or key cannot be used.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        metadata: Mapping[str, Any] | None = None,
        heartbeat_s: float = 10.0,
        progress: bool | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._door = Door(
            ServiceAddress.resolve(url, api_key),
            timeout_s=timeout_s,
            retry=retry,
            session=SessionSettings(metadata=metadata or {}, heartbeat_s=heartbeat_s),
            display=Display(progress),
            transport=transport,
        )
        self.url = self._door.url

    def health(self) -> None:
        """Return if the service answers and is well.

        Raises:
            ClientError: It is not.
        """
        self._door.ask(calls.health())

    def capabilities(self) -> Capabilities:
        """The base models that are served."""
        return self._door.ask(calls.capabilities())

    def create_run(
        self, base_model: str, *, name: str = "default", lora: Lora = _LORA, **settings: Any
    ) -> Run:
        """Make a run with a fresh adapter.

        Args:
            base_model: A served one.
            name: What to call it in this session.
            lora: Its shape.
            **settings: For example ``gradient_accumulation_steps=4``.

        Raises:
            Conflict: The session has a run of this name.
        """
        return Run(self._door, base_model, name).create(lora, **settings)

    def sampler(self, base_model: str, *, checkpoint: str | None = None) -> Sampler:
        """Something to sample with: the base model, or the weights of a checkpoint of it."""
        return Sampler(self._door, base_model, checkpoint)

    def dataset(
        self,
        path: str | None = None,
        *,
        rows: Sequence[Mapping[str, Any]] | None = None,
        part: Rows | None = None,
        split: str = "train",
    ) -> Dataset:
        """Rows of a file that the service can reach, or rows sent along: exactly one of them."""
        return Dataset(self._door, _source(path, rows, part, split))

    def runs(self, *, limit: int = 20, offset: int = 0) -> RunPage:
        """One page of this key's runs, the newest first.

        Args:
            limit: Runs in the page at most.
            offset: Runs to pass over; ``page.next_offset`` names the next page's.
        """
        return self._door.ask(calls.runs(limit=limit, offset=offset))

    def iter_runs(self, *, page_size: int = 100) -> Iterator[RunInfo]:
        """All of this key's runs, the newest first, asked for page by page as they are used.

        A run that is made meanwhile moves the others down, so one of them may come twice.
        """
        offset: int | None = 0
        while offset is not None:
            page = self.runs(limit=page_size, offset=offset)
            yield from page.runs
            offset = page.next_offset

    def run_info(self, run_id: str) -> RunInfo:
        """One run, also of another session of this key."""
        return self._door.ask(calls.run(run_id))

    def checkpoints(self, run_id: str) -> tuple[Checkpoint, ...]:
        """A run's checkpoints, oldest first."""
        return self._door.ask(calls.checkpoints(run_id)).checkpoints

    def delete_checkpoint(self, address: str) -> None:
        """Remove a checkpoint for good."""
        self._door.ask(calls.delete_checkpoint(Address.parse(address)))

    def download(self, address: str, folder: Path | str) -> tuple[Path, ...]:
        """Fetch a checkpoint's files into a folder, made if need be.

        Returns:
            The files. Nothing is left behind if the download fails.

        Raises:
            FileExistsError: One of them is there already.
        """
        where = Address.parse(address)
        with new_archive() as archive:
            with self._door.download(f"{where.path}/archive") as answer:
                total = int(answer.headers.get("content-length", 0)) or None
                with self._door.display.downloading(where.name, total) as arrived:
                    for piece in answer.iter_bytes():
                        archive.write(piece)
                        arrived.add(len(piece))
            return unpack(archive, Path(folder))

    def close(self) -> None:
        """End the session and give the connections back."""
        self._door.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncService:
    """``Service`` with ``await``, for one event loop; the arguments mean the same."""

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        metadata: Mapping[str, Any] | None = None,
        heartbeat_s: float = 10.0,
        progress: bool | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._door = AsyncDoor(
            ServiceAddress.resolve(url, api_key),
            timeout_s=timeout_s,
            retry=retry,
            session=SessionSettings(metadata=metadata or {}, heartbeat_s=heartbeat_s),
            display=Display(progress),
            transport=transport,
        )
        self.url = self._door.url

    async def health(self) -> None:
        """See ``Service.health``."""
        await self._door.ask(calls.health())

    async def capabilities(self) -> Capabilities:
        """See ``Service.capabilities``."""
        return await self._door.ask(calls.capabilities())

    async def create_run(
        self, base_model: str, *, name: str = "default", lora: Lora = _LORA, **settings: Any
    ) -> AsyncRun:
        """See ``Service.create_run``."""
        return await AsyncRun(self._door, base_model, name).create(lora, **settings)

    def sampler(self, base_model: str, *, checkpoint: str | None = None) -> AsyncSampler:
        """See ``Service.sampler``; nothing is asked yet."""
        return AsyncSampler(self._door, base_model, checkpoint)

    async def dataset(
        self,
        path: str | None = None,
        *,
        rows: Sequence[Mapping[str, Any]] | None = None,
        part: Rows | None = None,
        split: str = "train",
    ) -> AsyncDataset:
        """See ``Service.dataset``."""
        meta = _source(path, rows, part, split).meta()
        call = dataset_calls.create("dataset", "Dataset", {"dataset_meta": meta})
        return AsyncDataset(self._door, (await self._door.ask_in_session(call)).processor_id)

    async def runs(self, *, limit: int = 20, offset: int = 0) -> RunPage:
        """See ``Service.runs``."""
        return await self._door.ask(calls.runs(limit=limit, offset=offset))

    async def iter_runs(self, *, page_size: int = 100) -> AsyncIterator[RunInfo]:
        """See ``Service.iter_runs``."""
        offset: int | None = 0
        while offset is not None:
            page = await self.runs(limit=page_size, offset=offset)
            for run in page.runs:
                yield run
            offset = page.next_offset

    async def run_info(self, run_id: str) -> RunInfo:
        """See ``Service.run_info``."""
        return await self._door.ask(calls.run(run_id))

    async def checkpoints(self, run_id: str) -> tuple[Checkpoint, ...]:
        """See ``Service.checkpoints``."""
        return (await self._door.ask(calls.checkpoints(run_id))).checkpoints

    async def delete_checkpoint(self, address: str) -> None:
        """See ``Service.delete_checkpoint``."""
        await self._door.ask(calls.delete_checkpoint(Address.parse(address)))

    async def download(self, address: str, folder: Path | str) -> tuple[Path, ...]:
        """See ``Service.download``."""
        where = Address.parse(address)
        with new_archive() as archive:
            async with self._door.download(f"{where.path}/archive") as answer:
                total = int(answer.headers.get("content-length", 0)) or None
                with self._door.display.downloading(where.name, total) as arrived:
                    async for piece in answer.aiter_bytes():
                        archive.write(piece)
                        arrived.add(len(piece))
            return unpack(archive, Path(folder))

    async def close(self) -> None:
        """See ``Service.close``."""
        await self._door.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


def _source(
    path: str | None, rows: Sequence[Mapping[str, Any]] | None, part: Rows | None, split: str
) -> Source:
    sent = None if rows is None else [dict(row) for row in rows]
    return Source(path=path, rows=sent, part=part, split=split)
