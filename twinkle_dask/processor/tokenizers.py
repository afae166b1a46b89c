"""Tokenizers of the served models, each loaded once in a process."""

import functools
import logging
from typing import Any

from twinkle_dask.errors import NotSupported, ServiceFault, StartupError, new_incident
from twinkle_dask.model.source import check_source
from twinkle_dask.model.tokenizer import load_tokenizer, to_local

log = logging.getLogger(__name__)


def tokenizer_of(source: str) -> Any:
    """The Hugging Face tokenizer of a served model's source, also out of a GGUF file.

    It is shared by all tasks of the process: nothing of it may be changed.

    Raises:
        NotSupported: The source has none.
        ServiceFault: It cannot be loaded on this worker.
    """
    try:
        tokenizer = _load(source)
    except StartupError as error:
        incident = new_incident()
        log.exception("No tokenizer; incident %s", incident)
        raise ServiceFault("The model's tokenizer cannot be loaded.", incident) from error
    if tokenizer is None:
        raise NotSupported("This model has no tokenizer; send tokens (input_ids), not messages.")
    return tokenizer


@functools.cache
def _load(source: str) -> Any | None:
    return load_tokenizer(to_local(check_source(source)))
