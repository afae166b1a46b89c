"""Templates as functions of the table in ``commands``: values unpacked, tokenizers found."""

from typing import Any

from twinkle_dask.processor import templates
from twinkle_dask.processor.tokenizers import tokenizer_of
from twinkle_dask.types import Json


def encode(value: Any) -> list[Json]:
    """``{source, spec, trajectories, add_generation_prompt}`` to features."""
    return templates.encode(
        tokenizer_of(value["source"]),
        value["spec"],
        value["trajectories"],
        add_generation_prompt=value["add_generation_prompt"],
    )


def continued(value: Any) -> list[tuple[str, Json]]:
    """``{source, features, tokens}``, as many of both, to texts and new features."""
    tokenizer = tokenizer_of(value["source"])
    return [
        templates.continued(tokenizer, feature, tokens)
        for feature, tokens in zip(value["features"], value["tokens"], strict=True)
    ]


def decode(value: Any) -> list[str]:
    """``{source, tokens, skip_special_tokens}`` to texts."""
    return templates.decode(
        tokenizer_of(value["source"]),
        value["tokens"],
        skip_special_tokens=value["skip_special_tokens"],
    )
