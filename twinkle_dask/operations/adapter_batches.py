"""What an adapter's pass goes over and what it gives: rows for the core, measures for metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinkle_dask import packing
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.adapter_metrics import Measured, known_arguments
from twinkle_dask.operations.batch_training import EmbedRow
from twinkle_dask.operations.prepared_batches import BatchRow
from twinkle_dask.types import Float32Array, Int32Array, Int64Array, Json


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBatch:
    """What a pass goes over.

    Attributes:
        tokens: Of each row, int32 (N,).
        labels: Of each row, int64 (N,), shifted, -100 where nothing is predicted; for embeddings
            int64 (1,), 1 where a group begins. Empty if none were sent.
        embeds: The pass makes embeddings, not logprobs.
        temperature: Divides the logits.
    """

    tokens: tuple[Int32Array, ...]
    labels: tuple[Int64Array, ...]
    embeds: bool = False
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """What a pass gave; what it does not make is None.

    Attributes:
        logprobs: Of each row, float32 (N,).
        embeddings: float32 (B, D).
        logits: Of each row, float32 (N, V), divided by the temperature.
    """

    loss: float | None = None
    logprobs: tuple[Float32Array, ...] | None = None
    embeddings: Float32Array | None = None
    logits: tuple[Float32Array, ...] | None = None


packing.register(AdapterBatch)


def token_rows(batch: AdapterBatch, *, needed: bool = True) -> list[BatchRow]:
    """The rows of a pass that gives logprobs.

    Args:
        batch: What to go over.
        needed: Labels are; without them nothing is predicted.

    Raises:
        InvalidRequest: There are no labels and they are needed.
    """
    if not batch.labels:
        if needed:
            raise InvalidRequest("The inputs have no labels, so there is no loss.")
        nothing = [np.full(len(tokens), -100, np.int64) for tokens in batch.tokens]
        return _paired(batch.tokens, nothing)
    return _paired(batch.tokens, batch.labels)


def _paired(tokens: Sequence[Int32Array], labels: Sequence[Int64Array]) -> list[BatchRow]:
    return [BatchRow(tokens=row, labels=own) for row, own in zip(tokens, labels, strict=True)]


def embed_rows(batch: AdapterBatch, *, needed: bool = True) -> list[EmbedRow]:
    """The rows of a pass that gives embeddings.

    Args:
        batch: What to go over.
        needed: Labels are; without them every row goes on with the group before.

    Raises:
        InvalidRequest: There are no labels and they are needed.
    """
    if not batch.labels:
        if needed:
            raise InvalidRequest(
                "The inputs have no labels; each row has one, 1 for an anchor and 0 for what "
                "belongs to the anchor before."
            )
        return [EmbedRow(tokens=tokens) for tokens in batch.tokens]
    pairs = zip(batch.tokens, batch.labels, strict=True)
    return [EmbedRow(tokens=tokens, label=int(labels[0])) for tokens, labels in pairs]


def measured(
    batch: AdapterBatch,
    arguments: Json,
    loss: float | None,
    logprobs: Sequence[Float32Array] = (),
    correct: Sequence[Any] | None = None,
    *,
    embeddings: Float32Array | None = None,
    num_counted: float = 0.0,
) -> Measured:
    """What the metrics are told of a pass; what it did not make is left out."""
    return Measured(
        labels=batch.labels,
        logprobs=tuple(logprobs),
        correct=None if correct is None else tuple(correct),
        embeddings=embeddings,
        loss=loss,
        num_counted=num_counted,
        arguments=known_arguments(arguments),
    )
