"""The files of a model's source on this machine, and its tokenizer. Imports no torch itself."""

import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers

from twinkle_dask.errors import StartupError
from twinkle_dask.model.source import ModelSource, SourceKind, check_source, hub_is_offline

log = logging.getLogger(__name__)

# These libraries' methods are untyped or partly so; they are used through Any on purpose.
_tokenizer_class: Any = transformers.AutoTokenizer
_hub: Any = huggingface_hub

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# Other layouts of the same weights that some hub repositories carry as well.
_NOT_FROM_HUB = ["*/*", "consolidated*"]


def to_local(place: ModelSource) -> ModelSource:
    """The same model on this machine: a hub id becomes a folder of the hub's cache.

    Raises:
        StartupError: The hub gave no such model.
    """
    if place.kind is not SourceKind.HUB:
        return place
    try:
        folder: str = _hub.snapshot_download(
            place.location, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_FROM_HUB
        )
    # Network, permission, spelling, disk: each has its own class, and the operator one way to act.
    except Exception as error:
        offline = " HF_HUB_OFFLINE is set, so nothing is downloaded." if hub_is_offline() else ""
        raise StartupError(
            f"Model {place.location!r} is no local path, and the Hugging Face hub gave no model of "
            f"that id.{offline} ({first_line(error)})"
        ) from error
    return check_source(folder)


def load_tokenizer(place: ModelSource) -> Any | None:
    """The source's tokenizer, or None: token ids in and out are a use of their own.

    Args:
        place: On this machine.

    Raises:
        StartupError: Its files cannot be read.
    """
    # Asked without its files, transformers makes an empty tokenizer for some model types.
    if place.gguf_file is None and not any(
        Path(place.location, name).exists() for name in _TOKENIZER_FILES
    ):
        log.info("No tokenizer in %s", place.location)
        return None
    try:
        return _tokenizer_class.from_pretrained(place.location, **file_arguments(place))
    except Exception as error:  # as many kinds as there are tokenizer formats
        raise StartupError(
            f"The tokenizer of model {place.location} cannot be loaded: {first_line(error)}"
        ) from error


def file_arguments(place: ModelSource) -> dict[str, Any]:
    """What every ``from_pretrained`` of this source is told."""
    # Unless told not to, transformers asks on the terminal whether to run a model's own code.
    return {"trust_remote_code": False} | (
        {} if place.gguf_file is None else {"gguf_file": place.gguf_file}
    )


def first_line(error: Exception) -> str:
    """Of its message, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
