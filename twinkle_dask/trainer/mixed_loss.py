"""The losses of one pass: data of different losses lie one after another.

Shapes: T target tokens of the pass or of a range of it, M tokens marked as making up the ratio of
their sequence, S sequences (data).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinkle_dask.losses import LOSSES, SEQUENCE_RATIO_MASK
from twinkle_dask.trainer.custom_loss import CustomLossFailed, evaluate
from twinkle_dask.trainer.losses import (
    SEQUENCE_LOG_RATIO,
    ValueAndSlope,
    sequence_log_ratios,
    token_loss,
)
from twinkle_dask.types import CustomLoss, Datum, Float32Array, Int64Array, Loss, LossSpec


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Which tokens of a range make up the ratio of each datum.

    Attributes:
        marked_M: Indices within the range, increasing; int64, on the host.
        sequence_M: Datum that each of them belongs to.
        sequence_T: Datum that each token of the range belongs to.
        count: Number of data.
    """

    marked_M: Int64Array
    sequence_M: Tensor
    sequence_T: Tensor
    count: int

    @classmethod
    def of(cls, data: Sequence[Datum], device: torch.device) -> "Sequences":
        """The tokens that ``sequence_ratio_mask`` marks."""
        sequence_T = np.repeat(np.arange(len(data)), [datum.target_tokens.size for datum in data])
        masks = [datum.loss_inputs[SEQUENCE_RATIO_MASK] for datum in data]
        marked_M = np.flatnonzero(np.concatenate(masks))
        return cls(
            marked_M,
            on_device(device, sequence_T[marked_M]),
            on_device(device, sequence_T),
            len(data),
        )


@dataclass(frozen=True, slots=True, eq=False)
class LossRange:
    """A range of T under one loss.

    Attributes:
        inputs: By name, over the range.
        sequences: None unless the loss is one at sequence level.
    """

    start: int
    stop: int
    spec: LossSpec
    inputs: Mapping[str, Tensor]
    sequences: Sequences | None

    @property
    def ahead_M(self) -> Int64Array:
        """Indices of T that must be known before; the log ratio of a sequence needs them."""
        if self.sequences is None:
            return np.empty(0, np.int64)
        return self.start + self.sequences.marked_M

    def knowing(self, lp_M: Tensor, *, backward: bool) -> "LossRange":
        """The same, its log ratios known."""
        sequences = self.sequences
        if sequences is None:
            return self
        q_M = self.inputs["logprobs"][on_device(lp_M.device, sequences.marked_M)]
        log_ratio_S = sequence_log_ratios(lp_M, q_M, sequences.sequence_M, sequences.count)
        known = {SEQUENCE_LOG_RATIO: log_ratio_S[sequences.sequence_T]}
        return replace(self, inputs={**self.inputs, **known})

    def __call__(self, here: slice, lp_T: Tensor) -> ValueAndSlope:
        """Values and slopes of a part of the range."""
        return token_loss(self.spec, lp_T, {k: v[here] for k, v in self.inputs.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class OfDatum:
    """What a custom loss said about a datum.

    Attributes:
        failure: Why it has no value; None if it has.
    """

    loss: float
    metrics: Mapping[str, float]
    failure: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CustomRange:
    """A range of T under one custom loss, which needs all logprobs of a datum at once.

    Attributes:
        value_T: Each datum's loss stands at its first target; None before it is known.
        slope_T: Derivatives; likewise.
        custom: By the datum's place in T, what the loss said.
    """

    start: int
    stop: int
    loss: CustomLoss
    data: Sequence[Datum]
    value_T: Tensor | None = None
    slope_T: Tensor | None = None
    custom: Mapping[int, OfDatum] = field(default_factory=dict[int, OfDatum])

    @property
    def ahead_M(self) -> Int64Array:
        """All of the range."""
        return np.arange(self.start, self.stop)

    def knowing(self, lp_M: Tensor, *, backward: bool) -> "CustomRange":
        """The same, evaluated. A loss that fails on a datum has a value of NaN and no slope."""
        lp_T = lp_M.cpu()
        value_T, slope_T = torch.zeros_like(lp_T), torch.zeros_like(lp_T)
        custom: dict[int, OfDatum] = {}
        place = 0
        for datum in self.data:
            here = slice(place, place + datum.target_tokens.size)
            inputs = {k: torch.tensor(datum.custom_inputs[k]) for k in self.loss.inputs}
            lp = lp_T[here].reshape(datum.target_tokens.shape)
            try:
                found = evaluate(self.loss, lp, inputs, backward=backward)
            except CustomLossFailed as failed:
                said = OfDatum(loss=float("nan"), metrics={}, failure=str(failed))
            else:
                said = OfDatum(loss=found.value, metrics=found.metrics)
                slope_T[here] = found.slope.reshape(-1)
            value_T[place] = said.loss
            custom[self.start + place] = said
            place = here.stop
        return replace(
            self, value_T=value_T.to(lp_M.device), slope_T=slope_T.to(lp_M.device), custom=custom
        )

    def __call__(self, here: slice, lp_T: Tensor) -> ValueAndSlope:
        """Values and slopes of a part of the range."""
        if self.value_T is None or self.slope_T is None:
            raise ValueError("a custom loss is asked for slopes before it knows the logprobs")
        return self.value_T[here], self.slope_T[here]


@dataclass(frozen=True, slots=True, eq=False)
class MixedLoss:
    """The losses of a pass, each on its range of T; a ``head.LossOfPart`` that may look ahead."""

    ranges: Sequence[LossRange | CustomRange]

    @classmethod
    def of(cls, parts: Iterable[tuple[Loss, Sequence[Datum]]], device: torch.device) -> "MixedLoss":
        """Lay out the loss inputs of data in order; neighbours of one loss become one range."""
        ranges: list[LossRange | CustomRange] = []
        start = 0
        for loss, group in groupby(parts, key=lambda part: part[0]):
            data = [datum for _, some in group for datum in some]
            stop = start + sum(datum.target_tokens.size for datum in data)
            if isinstance(loss, CustomLoss):
                ranges.append(CustomRange(start, stop, loss, data))
            else:
                names = {name for datum in data for name in datum.loss_inputs}
                inputs = {name: on_device(device, joined_input(data, name, loss)) for name in names}
                sequence_level = LOSSES[loss.name].sequence_level
                sequences = Sequences.of(data, device) if sequence_level else None
                ranges.append(LossRange(start, stop, loss, inputs, sequences))
            start = stop
        return cls(ranges)

    @property
    def ahead_M(self) -> Int64Array:
        """Indices of T whose logprobs must be known before any slope; see ``head.LooksAhead``."""
        return np.concatenate([np.empty(0, np.int64), *(r.ahead_M for r in self.ranges)])

    def knowing(self, lp_M: Tensor, *, backward: bool) -> "MixedLoss":
        """The same losses after the logprobs of ``ahead_M`` are known."""
        known: list[LossRange | CustomRange] = []
        begin = 0
        for r in self.ranges:
            end = begin + len(r.ahead_M)
            known.append(r.knowing(lp_M[begin:end], backward=backward))
            begin = end
        return MixedLoss(known)

    @property
    def custom(self) -> Mapping[int, OfDatum]:
        """What custom losses said, by the place of a datum's first target in T."""
        return {
            place: said
            for r in self.ranges
            if isinstance(r, CustomRange)
            for place, said in r.custom.items()
        }

    def __call__(self, part: slice, lp_T: Tensor) -> ValueAndSlope:
        """Values and slopes of a part of T."""
        values: list[Tensor] = []
        slopes: list[Tensor] = []
        for r in self.ranges:
            start, stop = max(r.start, part.start), min(r.stop, part.stop)
            if start < stop:
                here_T = lp_T[start - part.start : stop - part.start]
                value_T, slope_T = r(slice(start - r.start, stop - r.start), here_T)
                values.append(value_T)
                slopes.append(slope_T)
        return (
            (values[0], slopes[0]) if len(values) == 1 else (torch.cat(values), torch.cat(slopes))
        )


def on_device(device: torch.device, array: NDArray[np.generic]) -> Tensor:
    """The array as a tensor there."""
    return torch.from_numpy(array).to(device)  # pyright: ignore[reportUnknownMemberType]


def joined_input(data: Sequence[Datum], name: str, spec: LossSpec) -> Float32Array:
    """A loss input over T, filled up where a datum leaves an optional one out."""
    fill = LOSSES[spec.name].fill(name, spec.config)
    arrays = [
        datum.loss_inputs[name].ravel()
        if name in datum.loss_inputs
        else np.full(datum.target_tokens.size, fill, np.float32)
        for datum in data
    ]
    return np.concatenate(arrays, dtype=np.float32)
