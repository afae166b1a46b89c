"""The trainable tokens of a batch, and what a client says about them.

Shapes: T trainable tokens of a batch, one row's after the other's; S rows (sequences); K scores
per token.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_dask.batch_losses.specs import IGNORED_LABEL
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import Int64Array, LossSpec

Float64Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class LabelledBatch:
    """Which positions of which rows are targets.

    Attributes:
        labels_S: Of each row, int64 (N,): ``labels[i]`` is predicted at position i.
        ignored: A label that is no target, besides -100.
    """

    labels_S: tuple[Int64Array, ...]
    ignored: int = IGNORED_LABEL

    @property
    def num_rows(self) -> int:
        """S."""
        return len(self.labels_S)

    @cached_property
    def masks_S(self) -> tuple[NDArray[np.bool_], ...]:
        """Where each row's targets are."""
        return tuple((row != IGNORED_LABEL) & (row != self.ignored) for row in self.labels_S)

    @cached_property
    def counts_S(self) -> Int64Array:
        """Targets of each row."""
        return np.array([np.count_nonzero(mask) for mask in self.masks_S], dtype=np.int64)

    @cached_property
    def row_T(self) -> Int64Array:
        """The row of each target."""
        return np.repeat(np.arange(self.num_rows, dtype=np.int64), self.counts_S)

    @cached_property
    def padded_length(self) -> int:
        """Of the longest row: what a client has that pads its rows on the right."""
        return max((len(row) for row in self.labels_S), default=0)

    @property
    def num_targets(self) -> int:
        """T."""
        return len(self.row_T)

    def sums_S(self, values_T: Float64Array) -> Float64Array:
        """Sum by row."""
        sums_S = np.bincount(self.row_T, weights=values_T, minlength=self.num_rows)
        return sums_S.astype(np.float64)

    def gather(self, rows: Sequence[NDArray[Any]]) -> Float64Array:
        """The targets' values out of rows of N positions each; (T,) or (T, K)."""
        picked = [row[mask] for row, mask in zip(rows, self.masks_S, strict=True)]
        return np.concatenate(picked).astype(np.float64)

    def scatter(self, values_T: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        """The inverse: rows of N positions, 0 where there is no target."""
        rows: list[NDArray[Any]] = []
        for mask, part in zip(self.masks_S, self._split(values_T), strict=True):
            row = np.zeros((len(mask), *values_T.shape[1:]), dtype=values_T.dtype)
            row[mask] = part
            rows.append(row)
        return tuple(rows)

    def refuse_non_finite(
        self, values_T: NDArray[Any], what: str, *, most: float = math.inf
    ) -> None:
        """Numbers everywhere, and none of more than ``most`` to either side.

        Raises:
            InvalidRequest: Names the first row that has another.
        """
        finite_T = np.isfinite(values_T)
        for good_T, wrong in (
            (finite_T, "NaN or infinite"),
            (finite_T & (np.abs(values_T) <= most), f"beyond {most:g}, too large to train on"),
        ):
            if not good_T.all():
                first = int(np.argmin(good_T.reshape(len(good_T), -1).all(axis=1)))
                raise InvalidRequest(f"Row {self.row_T[first]}: {what} is {wrong}.")

    def align(self, values: Any, what: str, *, broadcast: bool = False) -> Float64Array:
        """What a client sent for the rows, at the targets alone.

        Of a row it may be one value for every target (``broadcast``), one for each target, or at
        least one for each position: of the row itself, or of the longest one. Filler at other
        positions is not looked at.

        Returns:
            Finite, (T,).

        Raises:
            InvalidRequest: It is none of these; names the row and the lengths.
        """
        rows = _rows(values, self.num_rows, what)
        parts: list[Float64Array] = []
        for index, (row, mask) in enumerate(zip(rows, self.masks_S, strict=True)):
            given = _numbers(row, f"Row {index}: {what}").reshape(-1)
            count = int(self.counts_S[index])
            if broadcast and len(given) == 1:
                parts.append(np.full(count, given[0]))
            elif len(given) == count:
                parts.append(given)
            elif len(given) == len(mask) or len(given) >= self.padded_length:
                parts.append(given[: len(mask)][mask])
            else:
                single = "1 value for all of them, " if broadcast else ""
                raise InvalidRequest(
                    f"Row {index}: {what} has {len(given)} values, but the row has {count} "
                    f"targets (labels that are not ignored) among {len(mask)} positions. Send "
                    f"{single}{count} values, or one for every position of the padded batch "
                    f"({self.padded_length})."
                )
        values_T = np.concatenate(parts) if parts else np.zeros(0)
        self.refuse_non_finite(values_T, what)
        return values_T

    def align_many(self, values: Any, what: str) -> Float64Array:
        """The same for K values a position: (T, K).

        Raises:
            InvalidRequest: Another shape, or K differs between rows.
        """
        rows = _rows(values, self.num_rows, what)
        parts: list[Float64Array] = []
        for index, (row, mask) in enumerate(zip(rows, self.masks_S, strict=True)):
            given = _numbers(row, f"Row {index}: {what}")
            count = int(self.counts_S[index])
            if given.ndim != 2 and not (count == 0 and given.size == 0):
                raise InvalidRequest(
                    f"Row {index}: {what} must be a list of lists, K values at each position."
                )
            if count == 0:
                continue
            if len(given) == len(mask) or len(given) >= self.padded_length:
                parts.append(given[: len(mask)][mask])
            elif len(given) == count:
                parts.append(given)
            else:
                raise InvalidRequest(
                    f"Row {index}: {what} has {len(given)} positions, but the row has {len(mask)} "
                    f"({self.padded_length} in the padded batch), {count} of them targets."
                )
        widths = sorted({part.shape[1] for part in parts})
        if len(widths) > 1:
            raise InvalidRequest(f"{what} must have as many values everywhere, not {widths}.")
        return np.concatenate(parts) if parts else np.zeros((0, 1))

    def _split(self, values_T: NDArray[Any]) -> list[NDArray[Any]]:
        return np.split(values_T, np.cumsum(self.counts_S)[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A loss, and its derivative by each score: (T,) or (T, K)."""

    value: float
    slopes_T: Float64Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Direct:
    """A loss of the core whose sum over the batch has the same slopes.

    Attributes:
        inputs: By name, (T,); elsewhere they are 0.
    """

    loss: LossSpec
    inputs: Mapping[str, Float64Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A loss with everything but the model's scores.

    Attributes:
        evaluate: Takes the scores of the targets, (T,) or (T, K).
        num_counted: What its gradient counts for where a step divides by what was gathered.
        direct: None if there is none, or none that is exact.
        raw_scores: The scores are logits, not log-probabilities.
        targets_TK: Tokens to score in place of the labels.
    """

    evaluate: Callable[[Float64Array], Evaluated]
    num_counted: float = 1.0
    direct: Direct | None = None
    raw_scores: bool = False
    targets_TK: Int64Array | None = field(default=None)


def _rows(values: Any, num_rows: int, what: str) -> Sequence[Any]:
    """One entry for each row; a single number is that of a batch of one row."""
    if isinstance(values, int | float) and not isinstance(values, bool) and num_rows == 1:
        return [values]
    if not isinstance(values, list | tuple | np.ndarray):
        raise InvalidRequest(f"{what} must be a list with an entry for each row.")
    rows: list[Any] = list(values)  # pyright: ignore[reportUnknownArgumentType]  # JSON
    if len(rows) != num_rows:
        raise InvalidRequest(f"{what} has {len(rows)} entries, but the batch has {num_rows} rows.")
    return rows


def _numbers(row: Any, what: str) -> Float64Array:
    try:
        array = np.asarray(row)
    except ValueError:
        array = None
    if array is not None and array.size == 0:
        return np.zeros(array.shape)
    if array is None or array.dtype.kind not in "iuf":
        raise InvalidRequest(f"{what} must be numbers.")
    return array.astype(np.float64)
