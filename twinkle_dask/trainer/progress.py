"""What one open work that is made of rows has gathered so far."""

from collections.abc import Sequence
from math import isfinite
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.trainer.batch import Part
from twinkle_dask.trainer.gradient import Gradient
from twinkle_dask.trainer.loss_metrics import custom_metrics, loss_metrics
from twinkle_dask.trainer.mixed_loss import OfDatum
from twinkle_dask.trainer.passes import Result
from twinkle_dask.trainer.run import Run
from twinkle_dask.trainer.work import RowsBody, Work
from twinkle_dask.types import (
    CustomLoss,
    Datum,
    Embed,
    EmbedResult,
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
)

_NO_TARGETS = np.empty(0, np.int64)


class BatchProgress:
    """Results of the rows that are done, and their gradient until the last one succeeded.

    Throwing it away undoes the work: nothing reaches the run before ``finish``.
    """

    def __init__(self, work: Work, body: ForwardBackward, run: Run) -> None:
        self.work = work
        self.body = body
        self.run = run
        self.gradient = _gradient(body, run)
        self._logprobs: dict[int, Float32Array] = {}
        self._losses: dict[int, float] = {}
        self._custom: dict[int, OfDatum] = {}
        self._correct: dict[int, NDArray[np.bool_]] = {}

    @property
    def done(self) -> bool:
        """Whether all rows are there."""
        return len(self._logprobs) == len(self.body.data)

    def part(self, rows: Sequence[int]) -> Part:
        """These rows as a part of a pass."""
        return Part(
            adapter=self.run.adapter if self.body.adapter else None,
            gradient=self.gradient,
            loss=self.body.loss,
            data=[self.body.data[row] for row in rows],
            owner=self.work.tenant,
            temperature=self.body.temperature,
            raw_scores=self.body.raw_scores,
            want_correct=self.body.want_correct,
            dropout_seed=self.body.dropout_seed,
            rows=rows,
        )

    def add(self, row: int, result: Result) -> None:
        """Note a row's results.

        Raises:
            InvalidRequest: The loss is not finite, or a custom loss has failed.
        """
        if result.custom is not None:
            self._add_custom(row, result.custom)
        if not isfinite(result.loss):
            raise InvalidRequest(
                f"The loss of datum {row} is {result.loss}; nothing was added to the run. Look for "
                "extreme values in its inputs, or a learning rate that made the weights diverge."
            )
        self._logprobs[row] = result.logprobs
        self._losses[row] = result.loss
        if result.correct is not None:
            self._correct[row] = result.correct

    def _add_custom(self, row: int, said: OfDatum) -> None:
        if said.failure is not None and isinstance(self.body.loss, CustomLoss):
            raise InvalidRequest(
                f"Custom loss {self.body.loss.name!r} failed on datum {row}: {said.failure}. "
                "Nothing was added to the run."
            )
        self._custom[row] = said

    def finish(self) -> ForwardBackwardResult:
        """Add the gradient to the run and give the result.

        Raises:
            InvalidRequest: The gradient is not finite; nothing was added.
        """
        data = self.body.data
        logprobs = tuple(self._logprobs[row] for row in range(len(data)))
        losses = [self._losses[row] for row in range(len(data))]
        if isinstance(self.body.loss, CustomLoss):
            said = [self._custom[row].metrics for row in range(len(data))]
            metrics = custom_metrics(data, losses, said)
        else:
            metrics = loss_metrics(self.body.loss, data, logprobs, losses)
        if self.gradient is not None:
            self.run.add_gradient(self.gradient, self.body.num_counted)
        correct = None
        if self.body.want_correct:
            correct = tuple(self._correct[row] for row in range(len(data)))
        return ForwardBackwardResult(logprobs=logprobs, metrics=metrics, correct=correct)


class EmbedProgress:
    """As ``BatchProgress``, of rows that are embedded."""

    def __init__(self, work: Work, body: Embed, run: Run) -> None:
        self.work = work
        self.body = body
        self.run = run
        self.gradient = _gradient(body, run)
        self._embeddings: dict[int, Float32Array] = {}

    @property
    def done(self) -> bool:
        """Whether all rows are there."""
        return len(self._embeddings) == len(self.body.rows)

    def part(self, rows: Sequence[int]) -> Part:
        """These rows as a part of a pass.

        Raises:
            InvalidRequest: There are not as many slopes as rows.
        """
        slopes = self.body.slopes
        if slopes is not None and len(slopes) != len(self.body.rows):
            raise InvalidRequest(f"There are {len(slopes)} slopes for {len(self.body.rows)} rows.")
        return Part(
            adapter=self.run.adapter if self.body.adapter else None,
            gradient=self.gradient,
            loss=None,
            data=[
                Datum(tokens=self.body.rows[row], target_tokens=_NO_TARGETS, loss_inputs={})
                for row in rows
            ],
            owner=self.work.tenant,
            slopes=None if slopes is None else [slopes[row] for row in rows],
            dropout_seed=self.body.dropout_seed,
            rows=rows,
        )

    def add(self, row: int, result: Result) -> None:
        """Note a row's embedding.

        Raises:
            InvalidRequest: It is not finite.
        """
        if result.embedding is None or not np.isfinite(result.embedding).all():
            raise InvalidRequest(
                f"The embedding of row {row} is not finite; nothing was added to the run. The "
                "adapter's weights may have diverged."
            )
        self._embeddings[row] = result.embedding

    def finish(self) -> EmbedResult:
        """Add the gradient, if any, to the run and give the embeddings.

        Raises:
            InvalidRequest: The gradient is not finite; nothing was added.
        """
        if self.gradient is not None:
            self.run.add_gradient(self.gradient, self.body.num_counted)
        rows = [self._embeddings[row] for row in range(len(self.body.rows))]
        return EmbedResult(embeddings=np.stack(rows))


Progress: TypeAlias = BatchProgress | EmbedProgress


def progress_of(work: Work, body: RowsBody, run: Run) -> Progress:
    """A work of which nothing is there yet."""
    if isinstance(body, Embed):
        return EmbedProgress(work, body, run)
    return BatchProgress(work, body, run)


def _gradient(body: RowsBody, run: Run) -> Gradient | None:
    if body.backward and not body.adapter:
        raise InvalidRequest("The base model alone has no gradient: it is frozen.")
    return run.new_gradient() if body.backward else None
