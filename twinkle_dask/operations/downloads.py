"""A checkpoint's adapter files for other programs.

Whoever was granted a file comes back for it without a key, with what the face has signed; so a file
is named by its checkpoint's id and its own name, and nothing else can be reached.
"""

import asyncio
import tarfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final, TypeAlias

from twinkle_dask.checkpoints.exports import ADAPTER_FILES
from twinkle_dask.errors import InvalidRequest, NotFound, StorageFailed
from twinkle_dask.operations.audit import Audit
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.values import CheckpointAddress, Tenant
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import CheckpointKind, CheckpointRecord
from twinkle_dask.store.store import Store

#: All adapter files of a checkpoint in one; no adapter file has this name.
ARCHIVE: Final = "archive.tar"

_PART_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """What may be downloaded: these files of the checkpoint with this id."""

    checkpoint: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blob:
    path: str
    num_bytes: int


_Piece: TypeAlias = _Blob | bytes


class Download:
    """A file to be sent. ``num_bytes`` is its whole length."""

    def __init__(self, blobs: BlobStore, pieces: tuple[_Piece, ...]) -> None:
        self._blobs = blobs
        self._pieces = pieces
        self.num_bytes = sum(_length(piece) for piece in pieces)

    async def read(self, start: int, stop: int) -> AsyncGenerator[bytes]:
        """The bytes from ``start`` up to but without ``stop``, in parts of a bounded size.

        Raises:
            StorageFailed: It was removed meanwhile, or cannot be read.
        """
        at = 0
        for piece in self._pieces:
            end = at + _length(piece)
            first, last = max(start, at) - at, min(stop, end) - at
            at = end
            if first >= last:
                continue
            if isinstance(piece, bytes):
                yield piece[first:last]
                continue
            while first < last:
                wanted = min(last - first, _PART_BYTES)
                part = await asyncio.to_thread(self._blobs.get_part, piece.path, first, wanted)
                if not part:
                    raise StorageFailed(f"{piece.path} is shorter than it was.")
                yield part
                first += len(part)


class Downloads:
    """Which files there are, and their bytes. That somebody may have them, the face makes sure."""

    def __init__(
        self, store: Store, blobs: BlobStore, checkpoints: Checkpoints, audit: Audit
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._checkpoints = checkpoints
        self._audit = audit

    async def files(self, tenant: Tenant, address: CheckpointAddress) -> Granted:
        """Let a tenant download the files of exported weights.

        Raises:
            NotFound: None that the tenant may read.
            InvalidRequest: They were not exported.
        """
        if address.kind is not CheckpointKind.EXTERNAL:
            raise InvalidRequest(
                f"{address.kind}/{address.name} was not exported; only external weights have "
                "addresses for their files. Export them with save_weights_external."
            )
        record = await self._checkpoints.readable(tenant.id, address)
        return await self._grant(tenant, record, await asyncio.to_thread(self._names, record))

    async def archive(self, tenant: Tenant, address: CheckpointAddress) -> Granted:
        """Let a tenant download all adapter files of a checkpoint as one tar file.

        Raises:
            NotFound: None that the tenant may read.
        """
        record = await self._checkpoints.readable(tenant.id, address)
        return await self._grant(tenant, record, (ARCHIVE,))

    async def open(self, checkpoint: str, file: str) -> Download:
        """A file that was granted.

        Raises:
            NotFound: The checkpoint is not there any more, or has no such file.
        """
        record = await self._store.checkpoints.by_id(checkpoint)
        if record is None:
            raise NotFound("The checkpoint was deleted or has expired.")
        if file == ARCHIVE:
            pieces = await asyncio.to_thread(self._archive, record)
        elif file in ADAPTER_FILES:
            pieces = (await asyncio.to_thread(self._blob, record, file),)
        else:
            raise NotFound("The checkpoint has no such file.")
        return Download(self._blobs, pieces)

    async def _grant(
        self, tenant: Tenant, record: CheckpointRecord, files: tuple[str, ...]
    ) -> Granted:
        await self._audit.record(
            tenant,
            "checkpoints.urls_signed",
            path=f"{record.run_id}/{record.kind}/{record.name}",
            files=" ".join(files),
        )
        return Granted(checkpoint=record.id, files=files)

    def _names(self, record: CheckpointRecord) -> tuple[str, ...]:
        return tuple(name for name in self._blobs.names(record.path) if name in ADAPTER_FILES)

    def _blob(self, record: CheckpointRecord, name: str) -> _Blob:
        path = f"{record.path}/{name}"
        return _Blob(path=path, num_bytes=self._blobs.size(path))

    def _archive(self, record: CheckpointRecord) -> tuple[_Piece, ...]:
        pieces: list[_Piece] = []
        for name in self._names(record):
            blob = self._blob(record, name)
            entry = tarfile.TarInfo(name)
            entry.size = blob.num_bytes
            entry.mtime = int(record.created_at.timestamp())
            pieces += [entry.tobuf(), blob, bytes(-blob.num_bytes % tarfile.BLOCKSIZE)]
        return (*pieces, bytes(2 * tarfile.BLOCKSIZE))


def _length(piece: _Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece.num_bytes
