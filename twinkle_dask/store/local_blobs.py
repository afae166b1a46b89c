"""Blobs in a local folder: written in a staging folder beside them, then renamed into place.

Staging lies inside the root, hence on the same file system, and is the only place to look for
leftovers. A folder being replaced goes through ``.staging/<id>/``: ``new`` is complete,
``target`` names the path, ``old`` is the version set aside.
"""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import TypeAlias

Bytes: TypeAlias = bytes | bytearray | memoryview

_STAGING = ".staging"
_EXISTS = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})
_SWAP_ATTEMPTS = 10  # two writers of one path may take turns; each attempt lets the other finish


class LocalBlobs:
    """See ``blobs.BlobStore``; this class only moves bytes and raises OSErrors."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._staging = os.path.join(root, _STAGING)

    def put(self, path: str, data: Bytes, *, durable: bool) -> None:
        """Write beside and rename over."""
        target = self._at(path)
        temporary = self._temporary()
        try:
            _write(temporary, data, sync=durable)
            _rename_making_parents(temporary, target)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        if durable:
            _sync_folder(os.path.dirname(target))

    def get(self, path: str) -> bytes:
        """Read a whole file."""
        with open(self._at(path), "rb") as file:
            return file.read()

    def size(self, path: str) -> int:
        """Bytes of a file."""
        return os.stat(self._at(path)).st_size

    def get_part(self, path: str, start: int, num_bytes: int) -> bytes:
        """Read from the middle of a file."""
        with open(self._at(path), "rb") as file:
            file.seek(start)
            return file.read(num_bytes)

    def put_folder(
        self, path: str, files: Mapping[str, Bytes], *, overwrite: bool, marker: str
    ) -> None:
        """Write a whole folder aside, fsync it, and rename it in. A rename needs no marker."""
        target = self._at(path)
        if not overwrite and os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        stage = self._temporary()
        new = os.path.join(stage, "new")
        try:
            os.makedirs(new)
            for name, data in files.items():
                _write(os.path.join(new, name), data, sync=True)
            _write(os.path.join(stage, "target"), path.encode(), sync=True)
            _sync_folder(new)
            _sync_folder(stage)
            self._move_in(stage, target, overwrite=overwrite)
        finally:
            shutil.rmtree(stage, ignore_errors=True)  # clean_temporary takes what resists
        _sync_folder(os.path.dirname(target))

    def names(self, path: str) -> tuple[str, ...]:
        """What is directly inside a folder."""
        try:
            return tuple(sorted(os.listdir(self._at(path))))
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def remove(self, path: str) -> None:
        """Rename away first, so that nobody sees half a folder."""
        doomed = self._temporary()
        try:
            os.rename(self._at(path), doomed)
        except FileNotFoundError:
            return
        _delete(doomed)

    def clean_temporary(self, older_than_s: float) -> int:
        """Put back folders set aside whose replacement never arrived; delete the rest."""
        try:
            with os.scandir(self._staging) as entries:
                found = [(entry.path, entry.stat().st_mtime) for entry in entries]
        except FileNotFoundError:
            return 0
        newest = time.time() - older_than_s
        old = [path for path, written_at in found if written_at <= newest]
        for stage in old:
            self._put_back(stage)
            _delete(stage)
        return len(old)

    def _at(self, path: str) -> str:
        return os.path.join(self._root, path)

    def _temporary(self) -> str:
        os.makedirs(self._staging, exist_ok=True)
        return os.path.join(self._staging, uuid.uuid4().hex)

    def _move_in(self, stage: str, target: str, *, overwrite: bool) -> None:
        """Rename ``stage/new`` to ``target``; on failure an old version is back in its place."""
        new, old = os.path.join(stage, "new"), os.path.join(stage, "old")
        for attempt in range(_SWAP_ATTEMPTS):
            try:
                _rename_making_parents(new, target)
            except OSError as error:
                if not overwrite or error.errno not in _EXISTS or attempt == _SWAP_ATTEMPTS - 1:
                    self._put_back(stage)
                    raise
            else:
                return
            _delete(old)  # of an earlier attempt: another writer's version has replaced it
            with suppress(FileNotFoundError):  # someone else removed it meanwhile
                os.rename(target, old)

    def _put_back(self, stage: str) -> None:
        try:
            with open(os.path.join(stage, "target"), encoding="utf-8") as file:
                target = self._at(file.read())
        except (FileNotFoundError, NotADirectoryError):
            return
        old = os.path.join(stage, "old")
        if os.path.lexists(old) and not os.path.lexists(target):
            _rename_making_parents(old, target)
            _sync_folder(os.path.dirname(target))


def _write(path: str, data: Bytes, *, sync: bool) -> None:
    with open(path, "xb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def _rename_making_parents(source: str, target: str) -> None:
    try:
        os.rename(source, target)
    except FileNotFoundError:  # cheaper than asking before every write
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.rename(source, target)


def _delete(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):  # Linux says the first, macOS the second
        shutil.rmtree(path)


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
