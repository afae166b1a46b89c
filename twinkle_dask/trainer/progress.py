"""What one open ForwardBackward has gathered so far."""

from collections.abc import Sequence
from math import isfinite

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.trainer.batch import Part
from twinkle_dask.trainer.loss_metrics import custom_metrics, loss_metrics
from twinkle_dask.trainer.mixed_loss import OfDatum
from twinkle_dask.trainer.passes import Result
from twinkle_dask.trainer.run import Run
from twinkle_dask.trainer.work import Work
from twinkle_dask.types import CustomLoss, Float32Array, ForwardBackward, ForwardBackwardResult


class Progress:
    """Results of the rows that are done, and their gradient until the last one succeeded.

    Throwing it away undoes the work: nothing reaches the run before ``finish``.
    """

    def __init__(self, work: Work, body: ForwardBackward, run: Run) -> None:
        self.work = work
        self.body = body
        self.run = run
        self.gradient = run.new_gradient() if body.backward else None
        self._logprobs: dict[int, Float32Array] = {}
        self._losses: dict[int, float] = {}
        self._custom: dict[int, OfDatum] = {}

    @property
    def done(self) -> bool:
        """Whether all rows are there."""
        return len(self._logprobs) == len(self.body.data)

    def part(self, rows: Sequence[int]) -> Part:
        """These rows as a part of a pass."""
        return Part(
            adapter=self.run.adapter,
            gradient=self.gradient,
            loss=self.body.loss,
            data=[self.body.data[row] for row in rows],
            owner=self.work.tenant,
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
            self.run.add_gradient(self.gradient)
        return ForwardBackwardResult(logprobs=logprobs, metrics=metrics)
