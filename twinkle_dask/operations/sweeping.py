"""Removing blobs: many at a time, and those that no record names."""

import asyncio
from collections.abc import Iterable

import structlog

from twinkle_dask.errors import StorageFailed
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.store import Store

log = structlog.stdlib.get_logger(__name__)


async def sweep(store: Store, blobs: BlobStore) -> None:
    """Remove what a server before us wrote and died before it could record, or un-record.

    To be called before anything is accepted: a blob is written before its record.

    Raises:
        StorageFailed: The records or the folders cannot be read.
    """
    known = await store.journal.blob_paths() | await store.runs.snapshot_folders()
    known |= await store.recorded.blob_paths() | await store.run_settings.pending_paths()
    known |= {f"processors/{name}" for name in await store.processors.folders()}
    known |= await store.processors.saved_paths()
    orphans = await asyncio.to_thread(_orphans, blobs, known)
    if orphans:
        log.info("orphans_removed", number=len(orphans))
        await remove_all(blobs, orphans)


async def remove_all(blobs: BlobStore, paths: Iterable[str]) -> None:
    """Remove blobs that no record names any more, on a thread.

    What cannot be removed is logged; the next start sweeps it up.
    """

    def remove() -> None:
        for path in paths:
            try:
                blobs.remove(path)
            except StorageFailed as error:
                log.warning("blob_not_removed", error=error.message)

    await asyncio.to_thread(remove)


def _orphans(blobs: BlobStore, known: frozenset[str]) -> list[str]:
    flat = ("journal", "results", "recorded", "pending")
    orphans = [path for folder in flat for path in _unknown(blobs, folder, known)]
    orphans += _unknown(blobs, "processors", known)
    for tenant in blobs.names("saved-data"):
        orphans += _unknown(blobs, f"saved-data/{tenant}", known)
    for run in blobs.names("snapshots"):
        folder = f"snapshots/{run}"
        unknown = _unknown(blobs, folder, known)
        is_whole = len(unknown) == len(blobs.names(folder))
        orphans += [folder] if is_whole else unknown
    return orphans


def _unknown(blobs: BlobStore, folder: str, known: frozenset[str]) -> list[str]:
    paths = (f"{folder}/{name}" for name in blobs.names(folder))
    return [path for path in paths if path not in known]
