"""Folders on the server below which clients may have adapters written, and nowhere else."""

import hashlib
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from twinkle_dask.errors import InvalidRequest, StorageFailed
from twinkle_dask.types import TenantId

_UNUSUAL = re.compile(r"[^A-Za-z0-9._-]")


class SaveRoots:
    """What a client may call ``save_dir``.

    A folder counts by where it really is: a link that leads out of a root is outside. Each tenant
    has a folder of its own below each ``save_dir``, so that nobody can write over another's files.

    Args:
        roots: Configured; there may be none.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(Path(os.path.realpath(root)) for root in roots)

    def check(self, save_dir: str) -> str:
        """A folder's real path; it must exist below a root. Blocks for a moment.

        Raises:
            InvalidRequest: It does not exist, or lies elsewhere; both are told in the same words.
        """
        if not self._roots:
            raise InvalidRequest(
                "This server has no folders for save_dir (setting save_roots); checkpoints are "
                "kept without one, and can be downloaded."
            )
        real = None if "\0" in save_dir else Path(os.path.realpath(save_dir))
        if real is None or not self._is_inside(real) or not real.is_dir():
            raise InvalidRequest(
                f"save_dir {save_dir[:200]!r} does not exist on the server below one of the "
                "folders that its operator allows."
            )
        return str(real)

    def folder(self, tenant: TenantId, save_dir: str, *parts: str) -> Path:
        """Where something of a tenant goes below a ``save_dir`` that was checked before.

        Raises:
            InvalidRequest: The folder has gone, or leads elsewhere by now.
        """
        return Path(self.check(save_dir), tenant_folder(tenant), *(plain(part) for part in parts))

    def write(self, folder: Path, files: Mapping[str, bytes]) -> None:
        """Write files as one folder, which takes the place of a former one. Blocks.

        Raises:
            StorageFailed: Nothing was written.
        """
        aside = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not self._is_inside(Path(os.path.realpath(folder.parent))):
                raise StorageFailed("The folder of save_dir leads out of it.")
            aside.mkdir()
            for name, data in files.items():
                (aside / name).write_bytes(data)
            remove_folder(folder)
            aside.rename(folder)
        except OSError as error:
            remove_folder(aside)
            raise StorageFailed(f"save_dir could not be written: {error.strerror}.") from error

    def _is_inside(self, real: Path) -> bool:
        return any(real.is_relative_to(root) for root in self._roots)


def remove_folder(folder: Path) -> None:
    """Remove a flat folder of ours, if it is there; one of others is left as it is.

    Raises:
        OSError: It cannot be removed.
    """
    if not folder.is_dir() or folder.is_symlink():
        return
    for entry in folder.iterdir():
        entry.unlink()
    folder.rmdir()


def tenant_folder(tenant: TenantId) -> str:
    """A folder's name that no other tenant has, whatever becomes of unusual characters."""
    return f"{plain(tenant)}-{hashlib.sha256(tenant.encode()).hexdigest()[:8]}"


def plain(part: str) -> str:
    """A name without anything that a path or a shell could take for more; never a hidden one."""
    return _UNUSUAL.sub("_", part).lstrip(".") or "_"
