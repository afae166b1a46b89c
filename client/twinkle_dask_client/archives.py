"""Checkpoints on their way to a disk."""

import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import IO

from twinkle_dask_client.errors import BadReply


def new_archive() -> IO[bytes]:
    """Room for an archive; gone when it is closed."""
    return tempfile.TemporaryFile()


def unpack(archive: IO[bytes], folder: Path) -> tuple[Path, ...]:
    """Write the archive's files into a folder: all of them or none.

    Raises:
        FileExistsError: One of them is there already.
        BadReply: It is no archive, or would write elsewhere.
    """
    archive.seek(0)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as aside:
        try:
            with tarfile.open(fileobj=archive) as tar:
                tar.extractall(aside, filter="data")
        except tarfile.TarError as error:
            raise BadReply(f"The checkpoint's archive cannot be read: {error}") from error
        return _move(Path(aside), folder)


def _move(aside: Path, folder: Path) -> tuple[Path, ...]:
    names = sorted(path.relative_to(aside) for path in aside.rglob("*") if path.is_file())
    for name in names:
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} is there already.")
    moved: list[Path] = []
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(aside / name, folder / name)
        moved.append(folder / name)
    return tuple(moved)
