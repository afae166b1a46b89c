"""Failures of the disk, told in plain words."""

import errno
from collections.abc import Generator
from contextlib import contextmanager

from twinkle_dask.errors import StorageFailed

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_WORDS = {
    errno.EFBIG: "file too large for the store",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the store is read-only",
    errno.ENOENT: "it does not exist",
    errno.EEXIST: "it exists already",
    errno.ENOTEMPTY: "it exists already",
    errno.EIO: "input/output error of the disk",
}


def storage_failed(action: str, error: OSError) -> StorageFailed:
    """Say in one sentence what could not be done and why, without server paths."""
    if error.errno in _DISK_FULL:
        why = "disk full"
    elif isinstance(error, FileNotFoundError):  # object stores raise these without a number
        why = _WORDS[errno.ENOENT]
    elif isinstance(error, FileExistsError):
        why = _WORDS[errno.EEXIST]
    elif error.errno is None:
        why = type(error).__name__
    else:
        why = _WORDS.get(error.errno) or error.strerror or type(error).__name__
    return StorageFailed(f"The store could not {action}: {why}.")


@contextmanager
def plain_faults(action: str) -> Generator[None]:
    """Turn any ``OSError`` of the body into ``StorageFailed``; ``action`` follows "could not"."""
    try:
        yield
    except OSError as error:
        raise storage_failed(action, error) from error
