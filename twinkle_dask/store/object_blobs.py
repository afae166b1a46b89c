"""Blobs in any fsspec file system: single objects are written whole, folders marker last."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol, TypeAlias, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]  # fsspec ships no types

from twinkle_dask.errors import StartupError

Bytes: TypeAlias = bytes | bytearray | memoryview


class _FileSystem(Protocol):
    """The part of ``fsspec.AbstractFileSystem`` used here."""

    def pipe_file(self, path: str, value: bytes) -> None: ...
    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes: ...
    def size(self, path: str) -> int: ...
    def rm_file(self, path: str) -> None: ...
    def rm(self, path: str, recursive: bool) -> None: ...
    def find(self, path: str, *, withdirs: bool, detail: bool) -> list[str]: ...
    def makedirs(self, path: str, exist_ok: bool) -> None: ...
    def invalidate_cache(self) -> None: ...


def open_object_blobs(url: str) -> "ObjectBlobs":
    """Open the file system that ``url`` names.

    Raises:
        StartupError: It is unknown, misconfigured, or its package is not installed.
    """
    try:
        file_system, root = fsspec.core.url_to_fs(url)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]  # untyped
    except (ImportError, ValueError, OSError) as error:
        raise StartupError(f"The blob store {url!r} cannot be opened: {error}") from error
    return ObjectBlobs(cast(_FileSystem, file_system), cast(str, root))


class ObjectBlobs:
    """See ``blobs.BlobStore``; this class only moves bytes and raises OSErrors."""

    def __init__(self, file_system: _FileSystem, root: str) -> None:
        self._fs = file_system
        self._root = root.rstrip("/")

    def put(self, path: str, data: Bytes, *, durable: bool) -> None:
        """Write one object; object stores are durable and show it only when whole."""
        target = self._at(path)
        self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        self._fs.pipe_file(target, bytes(data))

    def get(self, path: str) -> bytes:
        """Read one object."""
        return self._fs.cat_file(self._at(path))

    def size(self, path: str) -> int:
        """Bytes of one object."""
        return self._fs.size(self._at(path))

    def get_part(self, path: str, start: int, num_bytes: int) -> bytes:
        """Read a range of one object."""
        return self._fs.cat_file(self._at(path), start, start + num_bytes)

    def put_folder(
        self, path: str, files: Mapping[str, Bytes], *, overwrite: bool, marker: str
    ) -> None:
        """Take the marker away, write the files, put the new marker last."""
        former = self.names(path)
        if former and not overwrite:
            raise FileExistsError(f"{path} exists already")
        if marker in former:
            self._fs.rm_file(self._at(f"{path}/{marker}"))
        written: list[str] = []
        try:
            for name in sorted(files, key=lambda name: (name == marker, name)):
                written.append(name)
                self.put(f"{path}/{name}", files[name], durable=True)
        except BaseException:
            for name in written:
                with suppress(OSError):  # the first failure is the one to report
                    self._fs.rm_file(self._at(f"{path}/{name}"))
            raise
        for name in former:
            if name not in files:
                self._fs.rm_file(self._at(f"{path}/{name}"))

    def names(self, path: str) -> tuple[str, ...]:
        """Objects and prefixes directly below a prefix."""
        prefix = self._at(path) + "/"
        self._fs.invalidate_cache()  # another process may have written meanwhile
        found = self._fs.find(self._at(path), withdirs=False, detail=False)
        below = (name.removeprefix(prefix) for name in found if name.startswith(prefix))
        return tuple(sorted({name.split("/")[0] for name in below}))

    def remove(self, path: str) -> None:
        """Remove an object or a prefix."""
        with suppress(FileNotFoundError):
            self._fs.rm(self._at(path), recursive=True)

    def clean_temporary(self, older_than_s: float) -> int:
        """Nothing to do: nothing is written under a temporary name."""
        return 0

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"
