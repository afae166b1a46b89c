"""Adapters written for other programs: PEFT's two files and nothing else, encrypted if wanted."""

from collections.abc import Sequence

from twinkle_dask.checkpoints import encryption
from twinkle_dask.checkpoints.folders import ADAPTER_FILE, CONFIG_FILE, Blobs, adapter_files
from twinkle_dask.types import AdapterState

#: What of a checkpoint's folder, of whatever kind, other programs load.
ADAPTER_FILES = frozenset(
    name + suffix for name in (CONFIG_FILE, ADAPTER_FILE) for suffix in ("", encryption.SUFFIX)
)


def write_export(
    blobs: Blobs,
    path: str,
    adapter: AdapterState,
    *,
    base_model: str,
    recipients: Sequence[str] = (),
) -> int:
    """Write an adapter as a new folder; all or nothing, and writing it again replaces it.

    Args:
        blobs: Where to.
        path: The folder.
        adapter: The weights.
        base_model: The name under which the base model is served; PEFT shows it to users.
        recipients: Public keys of age. Given any, each file is encrypted for all of them and its
            name ends in ``.age``.

    Returns:
        Bytes of all files.

    Raises:
        InvalidRequest: A recipient is none.
        StorageFailed: Nothing was written.
    """
    files = adapter_files(adapter, base_model)
    marker = ADAPTER_FILE
    if recipients:
        files = encryption.encrypted(files, encryption.parse(recipients))
        marker += encryption.SUFFIX
    blobs.put_folder(path, files, overwrite=True, marker=marker)
    return sum(len(data) for data in files.values())
