"""Runs' buffers away from the device: in the host's memory, then in files; written and read back.

A computer without an accelerator has one memory, so there runs go straight to files. Files hold
bare float32 bytes; what they mean stays in memory, since nobody reads them after this process.
They are no store: when this process dies, runs are set up again from snapshot and journal.
"""

import logging
import shutil
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from twinkle_dask.trainer.run import Buffers

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PagingConfig:
    """How much of the runs' buffers may lie where.

    Attributes:
        folder: For this trainer alone; removed when it is closed.
        device_bytes: Most bytes on the device.
        host_bytes: Most bytes in the host's memory; None if the device computes in it.
    """

    folder: Path
    device_bytes: int
    host_bytes: int | None = None


@dataclass(slots=True, eq=False)
class Paged:
    """A run's buffers that are not on the device.

    Attributes:
        buffers: On torch's ``meta`` device, which has shapes and no bytes.
        tensors: The buffers in the host's memory; None once they are in a file.
        checksum: Of the file.
        taken: It was read back or discarded; no file of it may stay.
    """

    buffers: Buffers
    tensors: list[Tensor] | None = None
    file: Path | None = None
    checksum: int = 0
    taken: bool = False


class Pager:
    """Moves buffers on threads of its own; its methods are for the engine's, and return at once.

    Args:
        config: Bounds and place.
        device: Where runs compute.
        num_threads: Moves at a time.
    """

    def __init__(self, config: PagingConfig, device: torch.device, *, num_threads: int = 2) -> None:
        self._folder = config.folder
        self._host_bytes = config.host_bytes
        self._device = device
        self._pool = ThreadPoolExecutor(
            num_threads,
            thread_name_prefix="paging",
            initializer=partial(torch.set_num_threads, 1),  # no teams beside the engine's
        )
        self._names = count()
        self._lock = threading.Lock()
        # In the host's memory, the one that came longest ago first.
        self._in_host: OrderedDict[Paged, None] = OrderedDict()
        self._in_host_bytes = 0
        self._streams = threading.local()

    def run(self, job: Callable[[], T]) -> "Future[T]":
        """Have something else done on the threads."""
        return self._pool.submit(job)

    def page_out(self, buffers: Buffers) -> "Future[Paged]":
        """Copy buffers away; nobody may change them meanwhile.

        The future raises OSError if there is no room for them; then nothing has changed.
        """
        return self._pool.submit(self._out, buffers, self._mark())

    def page_in(self, paged: Paged) -> "Future[Buffers]":
        """Copy buffers to the device, bit for bit; their file is gone afterwards.

        The future raises OSError if they cannot be read back; then they are lost.

        Raises:
            MemoryError: The device has no memory for them now; nothing has changed.
        """
        # Here, so that the memory belongs to the engine's stream like that of any other tensor.
        try:
            places = [torch.empty(len(t), device=self._device) for t in paged.buffers.tensors]
        except RuntimeError as error:  # torch's, on whatever device
            raise MemoryError(str(error)) from error
        return self._pool.submit(self._in, paged, paged.buffers.with_tensors(places), self._mark())

    def discard(self, paged: Paged) -> None:
        """Free what a run that is dropped has left."""
        self._take(paged)
        if paged.file is not None:
            self._pool.submit(_remove, paged.file)

    def close(self) -> None:
        """Wait for moves that have begun, then remove the folder with everything in it."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _mark(self) -> Any:  # a torch.cuda.Event or None; torch types it as two classes
        """A place in the engine's stream that a copy on another stream must come after."""
        return (
            torch.cuda.current_stream(self._device).record_event()
            if self._device.type == "cuda"
            else None
        )

    def _out(self, buffers: Buffers, mark: Any) -> Paged:
        paged = Paged(buffers.with_tensors([t.to("meta") for t in buffers.tensors]))
        if self._host_bytes is None:
            self._write(paged, buffers.tensors)
            return paged
        with self._after(mark):
            paged.tensors = [tensor.cpu() for tensor in buffers.tensors]
        with self._lock:
            self._in_host[paged] = None
            self._in_host_bytes += buffers.num_bytes
        try:
            self._shrink(self._host_bytes)
        except OSError:
            self._take(paged)
            raise
        return paged

    def _shrink(self, limit: int) -> None:
        """Write out what came to the host's memory longest ago, until the rest fits."""
        while True:
            with self._lock:
                if self._in_host_bytes <= limit:
                    return
                oldest, _ = self._in_host.popitem(last=False)
                tensors = oldest.tensors
                assert tensors is not None
                self._in_host_bytes -= oldest.buffers.num_bytes
            try:
                self._write(oldest, tensors)
            except OSError:
                with self._lock:
                    if not oldest.taken:
                        self._in_host[oldest] = None
                        self._in_host.move_to_end(oldest, last=False)
                        self._in_host_bytes += oldest.buffers.num_bytes
                raise

    def _write(self, paged: Paged, tensors: list[Tensor]) -> None:
        file = self._folder / f"{next(self._names)}.run"
        checksum = 0
        try:
            with file.open("xb", buffering=0) as output:
                for tensor in tensors:
                    data = _bytes_of(tensor)
                    checksum = zlib.crc32(data, checksum)
                    while data:
                        data = data[output.write(data) :]
        except OSError:
            _remove(file)
            raise
        with self._lock:
            paged.checksum = checksum
            paged.tensors = None
            if not paged.taken:
                paged.file = file
                return
        _remove(file)

    def _in(self, paged: Paged, places: Buffers, mark: Any) -> Buffers:
        tensors = self._take(paged)
        if tensors is None and self._host_bytes is None:
            self._read(paged, places.tensors)
            return places
        if tensors is None:
            tensors = [torch.empty(len(tensor)) for tensor in paged.buffers.tensors]
            self._read(paged, tensors)
        with self._after(mark):
            for place, tensor in zip(places.tensors, tensors, strict=True):
                place.copy_(tensor)
        return places

    def _read(self, paged: Paged, into: list[Tensor]) -> None:
        file = paged.file
        assert file is not None
        checksum = 0
        try:
            with file.open("rb", buffering=0) as source:
                for tensor in into:
                    left = data = _bytes_of(tensor)
                    while left:
                        got = source.readinto(left)
                        if not got:
                            raise OSError(f"{file} is too short")
                        left = left[got:]
                    checksum = zlib.crc32(data, checksum)
        finally:
            _remove(file)
        if checksum != paged.checksum:
            raise OSError(f"{file} does not hold what was written")

    def _take(self, paged: Paged) -> list[Tensor] | None:
        """Take buffers out of the host's memory; None if they are in a file."""
        with self._lock:
            paged.taken = True
            if paged in self._in_host:
                del self._in_host[paged]
                self._in_host_bytes -= paged.buffers.num_bytes
            tensors, paged.tensors = paged.tensors, None
            return tensors

    @contextmanager
    def _after(self, mark: Any) -> Generator[None]:
        """Copy on a stream of this thread, behind ``mark``; what was begun has ended behind it."""
        if mark is None:
            yield
            return
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self._device)
        stream: torch.cuda.Stream = self._streams.own
        mark.wait(stream)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's memory in the host."""
    return memoryview(cast(Any, tensor.numpy())).cast("B") if len(tensor) else memoryview(b"")


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("A run's file could not be removed: %s", error)
