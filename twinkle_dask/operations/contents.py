"""Where the bytes of requests and results lie.

Small ones are in their row of the journal, which takes them along in its own transaction. Others
are in blobs beside it; such a file costs a visit to a thread and six system calls.
"""

import asyncio
from dataclasses import dataclass

from twinkle_dask.errors import StorageFailed
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import OperationRecord, RecordedRecord

#: SQLite writes a whole row anew when its state changes, so larger ones are better off as files.
INLINE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes for a row that is about to be written: in it, or under the name of a blob."""

    inline: bytes | None
    path: str | None


async def keep(blobs: BlobStore, path: str, data: bytes) -> Content:
    """Make ``data`` ready for its row; ``path`` is used only if it needs a blob.

    Raises:
        StorageFailed: The blob could not be written.
    """
    if len(data) <= INLINE_BYTES:
        return Content(data, None)
    await asyncio.to_thread(blobs.put, path, data)
    return Content(None, path)


async def discard(blobs: BlobStore, content: Content) -> None:
    """Remove the blob, if there is one, of a row that was not written after all."""
    if content.path is not None:
        await asyncio.to_thread(blobs.remove, content.path)


async def payload_of(blobs: BlobStore, record: OperationRecord) -> bytes:
    """The packed request of a record that has one (``has_payload``).

    Raises:
        StorageFailed: It cannot be read.
    """
    return await _read(blobs, record.payload, record.payload_path)


async def result_of(blobs: BlobStore, record: OperationRecord) -> bytes:
    """The packed result of a record that is done.

    Raises:
        StorageFailed: It cannot be read.
    """
    return await _read(blobs, record.result, record.result_path)


async def recorded_of(blobs: BlobStore, record: RecordedRecord) -> bytes:
    """A packed recorded sample.

    Raises:
        StorageFailed: It cannot be read.
    """
    return await _read(blobs, record.content, record.content_path)


async def _read(blobs: BlobStore, inline: bytes | None, path: str | None) -> bytes:
    if inline is not None:
        return inline
    if path is None:
        raise StorageFailed("The store lacks the bytes of an operation.")
    return await asyncio.to_thread(blobs.get, path)
