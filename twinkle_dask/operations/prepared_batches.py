"""A batch and its loss, checked before a pass: what the core is sent and what it says."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from twinkle_dask import batch_losses, metrics
from twinkle_dask.batch_losses import (
    IGNORED_LABEL,
    BatchLossSpec,
    Evaluated,
    Float64Array,
    LabelledBatch,
    Objective,
    objective,
)
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import (
    Datum,
    Float32Array,
    ForwardBackwardResult,
    Int32Array,
    Int64Array,
    Json,
)

#: Larger batches are worked on in a thread, so that the event loop keeps turning.
INLINE_TOKENS: Final = 4_000


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """One row of a batch.

    Attributes:
        tokens: int32 (N,).
        labels: int64 (N,), shifted already: ``labels[i]`` is predicted at position i; -100 where
            there is no target.
    """

    tokens: Int32Array
    labels: Int64Array


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """What a pass over a batch gave.

    Attributes:
        loss: Computed from the scores, in float64; may be NaN or infinite if the weights are. None
            without a loss.
        logprobs: Of each row, float32 (N,): of the label, and of token 0 where there is no target.
            Empty after losses of logits (MSELoss, GKDLoss), which leave none.
        correct: If asked for: of each row, bool (N,), whether the likeliest token is the label;
            False where there is no target. None after GKDLoss, which scores other tokens.
        num_counted: What the gradient was counted for: tokens for losses that are sums, else 1.
    """

    loss: float | None
    logprobs: tuple[Float32Array, ...]
    correct: tuple[NDArray[np.bool_], ...] | None = None
    num_counted: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedBatch:
    """A batch whose rows and arguments are checked, as far as that goes without the model."""

    rows: Sequence[BatchRow]
    batch: LabelledBatch
    objective: Objective

    @property
    def scores_labels(self) -> bool:
        """Whether the labels are what is scored, not tokens that an argument names."""
        return self.objective.targets_TK is None

    def data(self, inputs: Mapping[str, Sequence[Float32Array]]) -> tuple[Datum, ...]:
        """The rows as the core takes them."""
        if (targets_TK := self.objective.targets_TK) is not None:
            targets = self.batch.scatter(targets_TK)
        else:
            labels = self.batch.labels_S
            targets = [
                np.where(m, row, 0) for m, row in zip(self.batch.masks_S, labels, strict=True)
            ]
        return tuple(
            Datum(
                tokens=row.tokens,
                target_tokens=target,
                loss_inputs={name: values[index] for name, values in inputs.items()},
            )
            for index, (row, target) in enumerate(zip(self.rows, targets, strict=True))
        )

    def scattered(self, inputs: Mapping[str, Float64Array]) -> dict[str, Sequence[Float32Array]]:
        """Values of the targets as rows of all positions, for a pass with a gradient.

        Raises:
            InvalidRequest: One is too large for it.
        """
        for name, values_T in inputs.items():
            self.batch.refuse_non_finite(values_T, _SENT.get(name, name), most=_LARGEST)
        return {name: self.batch.scatter(v.astype(np.float32)) for name, v in inputs.items()}

    async def evaluate(
        self, scores: Sequence[Float32Array], *, finite: bool = False
    ) -> tuple[float, Float64Array]:
        """The loss, and its slopes by the scores of the targets.

        Raises:
            InvalidRequest: ``finite``, and something is not.
        """
        if sum(row.size for row in scores) > INLINE_TOKENS:
            return await asyncio.to_thread(self._evaluate, scores, finite)
        return self._evaluate(scores, finite)

    def result(self, loss: float | None, seen: ForwardBackwardResult) -> BatchResult:
        """What a caller is told."""
        correct = seen.correct
        if correct is not None:
            correct = tuple(row & m for row, m in zip(correct, self.batch.masks_S, strict=True))
        return BatchResult(
            loss=loss,
            logprobs=() if self.objective.raw_scores else seen.logprobs,
            correct=correct,
            num_counted=0.0 if loss is None else self.objective.num_counted,
        )

    def _evaluate(self, scores: Sequence[Float32Array], finite: bool) -> tuple[float, Float64Array]:
        scores_T = self.batch.gather(scores)
        if finite:
            self.batch.refuse_non_finite(scores_T, _BROKEN)
        # What overflows here is found right below, or told as it is.
        with np.errstate(over="ignore", invalid="ignore"):
            evaluated = self.objective.evaluate(scores_T)
        if finite:
            self.batch.refuse_non_finite(evaluated.slopes_T, _TOO_FAR, most=_LARGEST)
            if not np.isfinite(evaluated.value):
                raise InvalidRequest("The loss of this batch is NaN or infinite.")
        return evaluated.value, evaluated.slopes_T


#: ``micro_batch_size`` says how Twinkle splits a batch; here memory decides, for the same gradient.
_ARGUMENTS = batch_losses.ARGUMENTS | metrics.ARGUMENTS | {"micro_batch_size"}
#: Arguments with many values for each token.
_MANY_VALUES = frozenset({"teacher_logits", "teacher_topk_logprobs"})
#: Engines compute in float32 (up to 3e38), and a gradient's square must be finite too. Otherwise it
#: would be found at the optimizer step, which drops the gradients of all batches before.
_LARGEST: Final = 1e15
#: Inputs of the core's losses by what clients call them.
_SENT: Final = {"logprobs": "old_logps", "weights": "a weight (advantages)"}
_BROKEN = "a score of the model (its weights may not be finite any more; load a checkpoint)"
_TOO_FAR = "the derivative of the loss (the numbers you sent may be of other tokens)"


def prepare(
    rows: Sequence[BatchRow], loss: BatchLossSpec | None, arguments: Json, vocab_size: int
) -> PreparedBatch:
    """Bind a loss to rows and to the arguments of a call.

    Raises:
        InvalidRequest: There are no rows, labels do not fit their tokens or are none, or the loss
            or an argument does not fit the rows.
    """
    if not rows:
        raise InvalidRequest("The batch is empty; send at least one row.")
    for index, row in enumerate(rows):
        if row.tokens.shape != row.labels.shape:
            raise InvalidRequest(
                f"Row {index} has {len(row.tokens)} tokens and {len(row.labels)} labels; there "
                "must be a label for each token, -100 where there is no target."
            )
    ignored = IGNORED_LABEL if loss is None else loss.settings.get("ignore_index", IGNORED_LABEL)
    batch = LabelledBatch(tuple(row.labels for row in rows), ignored)
    if loss is None:
        _refuse_no_tokens(batch, vocab_size)
        return PreparedBatch(rows=rows, batch=batch, objective=_NO_LOSS)
    if unknown := sorted(arguments.keys() - _ARGUMENTS):
        raise InvalidRequest(
            f"Unknown argument {unknown[0][:60]!r}; losses and metrics here know: "
            f"{', '.join(sorted(_ARGUMENTS))}."
        )
    if loss.embeds:
        raise InvalidRequest(
            f"{loss.name} is a loss of embeddings: call forward_backward with task='embedding'."
        )
    bound = objective(loss, batch, arguments, vocab_size)
    if bound.targets_TK is None:
        _refuse_no_tokens(batch, vocab_size)
    return PreparedBatch(rows=rows, batch=batch, objective=bound)


def _refuse_no_tokens(batch: LabelledBatch, vocab_size: int) -> None:
    for index, (labels, mask) in enumerate(zip(batch.labels_S, batch.masks_S, strict=True)):
        wrong = labels[mask & ((labels < 0) | (labels >= vocab_size))]
        if len(wrong):
            raise InvalidRequest(
                f"Row {index}: labels have token {wrong[0]}, but the vocabulary runs from 0 to "
                f"{vocab_size - 1}; {IGNORED_LABEL} marks what is no target."
            )


def _no_loss(_scores_T: Float64Array) -> Evaluated:
    raise AssertionError  # nobody asks for a loss where there is none


_NO_LOSS = Objective(evaluate=_no_loss)


def has_many_values(arguments: Json) -> bool:
    """Whether there may be thousands of values for each token."""
    return not _MANY_VALUES.isdisjoint(arguments)
