"""Answers of the processor service."""

from typing import Any

from twinkle_dask_gateway.twinkle.replies.base import Answer


class ProcessorCreated(Answer):
    """What calls name the processor by."""

    processor_id: str


class ProcessorCalled(Answer):
    """What the function answered: JSON without NaN and infinities."""

    result: Any
