"""The server's own folder, and the lock that keeps a second server out of it."""

import fcntl
import os
import socket
import tempfile
from pathlib import Path

from twinkle_dask.errors import StartupError
from twinkle_dask.store.store import sqlite_url

_LOCK = "server.lock"
_DATABASE = "twinkle_dask.sqlite3"


class DataDir:
    """An open data folder; holds its lock until ``close``, or until the process ends.

    Attributes:
        path: The absolute folder.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @property
    def database_url(self) -> str:
        """Where the records lie unless the configuration says otherwise."""
        return sqlite_url(self.path / _DATABASE)

    @property
    def blobs_dir(self) -> Path:
        """Where the blobs lie unless the configuration says otherwise."""
        return self.path / "blobs"

    def close(self) -> None:
        """Let another server use the folder. Repeating it is harmless."""
        if self._lock >= 0:
            os.close(self._lock)  # frees the lock; the file stays, or two could hold two locks
            self._lock = -1

    def __enter__(self) -> "DataDir":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def database_url_of(path: str | os.PathLike[str]) -> str:
    """The database in a data folder, for commands that run beside its server.

    Makes the folder if need be, as the server would.

    Raises:
        StartupError: It cannot be made.
    """
    folder = Path(path).expanduser().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"The data directory {folder} cannot be made: {error.strerror}."
        ) from error
    return sqlite_url(folder / _DATABASE)


def open_data_dir(path: str | os.PathLike[str]) -> DataDir:
    """Make the folder if need be, check that it is writable, and lock it.

    Raises:
        StartupError: It is not writable, or another server uses it.
    """
    folder = Path(path).expanduser().absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # an existing one keeps its mode
        with tempfile.TemporaryFile(dir=folder):
            pass
        # Without O_TRUNC: what the holder of the lock wrote must stay readable.
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(
            f"The data directory {folder} is not writable: {error.strerror}."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(lock, 200).decode(errors="replace").strip()
        os.close(lock)
        if not isinstance(error, BlockingIOError):
            raise StartupError(
                f"The data directory {folder} cannot be locked: {error.strerror}."
            ) from error
        raise StartupError(
            f"The data directory {folder} is in use by another server ({holder or 'unknown'}). "
            "Stop it, or choose another directory."
        ) from error
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return DataDir(folder, lock)
