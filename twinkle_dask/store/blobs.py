"""Blobs by relative path: payloads, results, snapshots, checkpoints.

A ``BlobStore`` checks names and words failures; where the bytes lie is the business of one of two
backends: a local folder (``local_blobs``) or any fsspec file system (``object_blobs``).
"""

import os
import re
from collections.abc import Mapping
from typing import TypeAlias

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.store.faults import plain_faults
from twinkle_dask.store.local_blobs import LocalBlobs
from twinkle_dask.store.object_blobs import ObjectBlobs, open_object_blobs

Bytes: TypeAlias = bytes | bytearray | memoryview

#: The file of a folder that is written last where a folder cannot be renamed into place.
MARKER = "state.json"

# No leading dot (hidden and staging names are ours), nothing a glob or a URL would interpret.
_SEGMENT = re.compile(r"[A-Za-z0-9_@+=,:~-][A-Za-z0-9._@+=,:~-]{0,199}")
_MAX_PATH_LENGTH = 900  # object stores allow 1024 bytes with their own prefix


def check_path(path: str) -> str:
    """Return ``path`` if it can only lie inside the store.

    Raises:
        InvalidRequest: A segment is empty, hidden, ``..``, too long, or has unusual characters.
    """
    segments = path.split("/")
    if len(path) > _MAX_PATH_LENGTH or not all(_SEGMENT.fullmatch(s) for s in segments):
        raise InvalidRequest(f"{path[:80]!r} is not a usable storage name.")
    return path


class BlobStore:
    """Blobs in a local folder or an fsspec URL. Blocking; safe to share between threads.

    Opening does no I/O, so a worker may open the same store again from ``url``. Every write is
    all or nothing for readers, and a failed one leaves nothing behind.

    Args:
        url_or_dir: A folder (made on first write) or a URL such as ``memory://x``, ``s3://b/p``.

    Raises:
        StartupError: The URL's file system is unknown or its package is not installed.
    """

    def __init__(self, url_or_dir: str | os.PathLike[str]) -> None:
        text = os.fspath(url_or_dir).removeprefix("file://")
        self._backend: LocalBlobs | ObjectBlobs
        if "://" in text:
            self.url = text.rstrip("/")
            self._backend = open_object_blobs(self.url)
        else:
            self.url = os.path.abspath(text)
            self._backend = LocalBlobs(self.url)

    def __repr__(self) -> str:
        return f"BlobStore({self.url!r})"

    def __reduce__(self) -> tuple[type["BlobStore"], tuple[str]]:
        return BlobStore, (self.url,)

    def put(self, path: str, data: Bytes, *, durable: bool = False) -> None:
        """Write one blob, replacing what was there.

        With ``durable`` it also survives a power cut (fsync). Without, it survives the death of
        any process, which is what a journal entry needs.

        Raises:
            StorageFailed: Nothing was written; the former blob, if any, is unharmed.
        """
        check_path(path)
        with plain_faults(f"write {path}"):
            self._backend.put(path, data, durable=durable)

    def get(self, path: str) -> bytes:
        """Read one blob.

        Raises:
            StorageFailed: It is missing or cannot be read.
        """
        check_path(path)
        with plain_faults(f"read {path}"):
            return self._backend.get(path)

    def size(self, path: str) -> int:
        """Bytes of one blob.

        Raises:
            StorageFailed: It is missing or cannot be read.
        """
        check_path(path)
        with plain_faults(f"read {path}"):
            return self._backend.size(path)

    def get_part(self, path: str, start: int, num_bytes: int) -> bytes:
        """Read part of one blob; less where it ends earlier.

        Raises:
            StorageFailed: It is missing or cannot be read.
        """
        check_path(path)
        with plain_faults(f"read {path}"):
            return self._backend.get_part(path, start, num_bytes)

    def put_folder(
        self,
        path: str,
        files: Mapping[str, Bytes],
        *,
        overwrite: bool = False,
        marker: str = MARKER,
    ) -> None:
        """Write a flat folder of files as one thing, durably.

        In a local folder it appears by a rename; with ``overwrite`` the old one is renamed aside
        first, and ``clean_temporary`` puts it back if the process dies between the two renames.
        An object store has no rename: ``marker`` is removed first and written last, so a folder
        without its marker is not whole. Where readers may come at any time, give each version a
        path of its own and switch the record.

        Raises:
            StorageFailed: Nothing was written, or the folder exists and ``overwrite`` is off.
        """
        for name in files:
            check_path(f"{path}/{name}" if "/" not in name else "")
        check_path(path)
        with plain_faults(f"write {path}"):
            self._backend.put_folder(path, files, overwrite=overwrite, marker=marker)

    def names(self, folder: str) -> tuple[str, ...]:
        """Names of what is directly in a folder, sorted; empty if there is no such folder.

        Names that this class would not have written (hidden files, say) are passed over.
        """
        check_path(folder)
        with plain_faults(f"list {folder}"):
            return tuple(name for name in self._backend.names(folder) if _SEGMENT.fullmatch(name))

    def remove(self, path: str) -> None:
        """Remove a blob or a folder with everything in it; nothing there is fine.

        Raises:
            StorageFailed: It is there and could not be removed.
        """
        check_path(path)
        with plain_faults(f"remove {path}"):
            self._backend.remove(path)

    def clean_temporary(self, *, older_than_s: float = 3600.0) -> int:
        """Finish what dead writers left behind: remove halves, put back a folder set aside.

        Args:
            older_than_s: Leave younger ones alone, for their writer may be alive (a worker that
                outlived the gateway). 0 where every writer is known to be dead.

        Returns:
            Number of leftovers dealt with.
        """
        with plain_faults("clean up temporary files"):
            return self._backend.clean_temporary(older_than_s)
