"""What an operator may name as a model, told apart by a look at the files.

Imports no torch, so that the gateway can refuse a bad ``--model`` before it starts any worker.
"""

import json
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from twinkle_dask.errors import StartupError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_GGUF_MAGIC = b"GGUF"


class SourceKind(StrEnum):
    """How a model's weights are stored."""

    FOLDER = "folder"
    GGUF = "gguf"
    HUB = "hub"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A place that a model can be loaded from.

    Attributes:
        location: An absolute folder, or a hub id.
        gguf_file: Name of the GGUF file in the folder; None for the other kinds.
    """

    kind: SourceKind
    location: str
    gguf_file: str | None = None


def check_source(source: str) -> ModelSource:
    """Tell what ``source`` is: a Hugging Face folder, a GGUF file or its folder, or a hub id.

    Looks at names and a few bytes only. A hub id is not looked up.

    Raises:
        StartupError: It is none of these; the message says what is missing.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _gguf(path)
    if path.is_dir():
        return _folder(path)
    if _HUB_ID.fullmatch(source):
        return ModelSource(kind=SourceKind.HUB, location=source)
    raise StartupError(f"Model source {source!r} does not exist.")


def hub_is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids downloads."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _folder(path: Path) -> ModelSource:
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise StartupError(f"Model folder {path} cannot be read: {error.strerror}.") from error
    if "config.json" not in names:
        return _only_gguf(path, [name for name in names if name.endswith(".gguf")])
    _read_config(path / "config.json")
    if any(name.endswith(".safetensors") for name in names):
        return ModelSource(kind=SourceKind.FOLDER, location=str(path.resolve()))
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise StartupError(
            f"Model folder {path} holds pickled weights, which are not loaded for safety; save the "
            "model as safetensors."
        )
    raise StartupError(f"Model folder {path} has a config.json but no *.safetensors weights.")


def _only_gguf(path: Path, names: list[str]) -> ModelSource:
    if not names:
        raise StartupError(
            f"Folder {path} is no model: it has neither a config.json nor a .gguf file."
        )
    if len(names) > 1:
        raise StartupError(
            f"Folder {path} has {len(names)} GGUF files ({', '.join(names[:3])}, ...); "
            "name one of them."
        )
    return _gguf(path / names[0])


def _gguf(path: Path) -> ModelSource:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise StartupError(f"Model file {path} cannot be read: {error.strerror}.") from error
    if magic != _GGUF_MAGIC:
        raise StartupError(f"File {path} is no GGUF model; name a GGUF file or a model's folder.")
    path = path.resolve()
    return ModelSource(kind=SourceKind.GGUF, location=str(path.parent), gguf_file=path.name)


def _read_config(path: Path) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"Model file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise StartupError(f"Model file {path} is no valid JSON: {error}.") from error
    if not isinstance(config, dict) or "model_type" not in cast("dict[str, Any]", config):
        raise StartupError(f"Model file {path} names no model_type: this is no Transformers model.")
