"""The losses of one pass: data of different losses lie one after another.

Shapes: T target tokens of the pass or of a range of it, M tokens marked as making up the ratio of
their sequence, S sequences (data).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinkle_dask.losses import LOSSES, SEQUENCE_RATIO_MASK
from twinkle_dask.trainer.losses import (
    SEQUENCE_LOG_RATIO,
    ValueAndSlope,
    sequence_log_ratios,
    token_loss,
)
from twinkle_dask.types import Datum, Float32Array, Int64Array, LossSpec


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


@dataclass(frozen=True, slots=True, eq=False)
class MixedLoss:
    """The losses of a pass, each on its range of T; a ``head.LossOfPart`` that may look ahead."""

    ranges: Sequence[LossRange]

    @classmethod
    def of(
        cls, parts: Iterable[tuple[LossSpec, Sequence[Datum]]], device: torch.device
    ) -> "MixedLoss":
        """Lay out the loss inputs of data in order; neighbours of one loss become one range."""
        ranges: list[LossRange] = []
        start = 0
        for spec, group in groupby(parts, key=lambda part: part[0]):
            data = [datum for _, some in group for datum in some]
            names = {name for datum in data for name in datum.loss_inputs}
            inputs = {name: on_device(device, joined_input(data, name, spec)) for name in names}
            stop = start + sum(datum.target_tokens.size for datum in data)
            sequence_level = LOSSES[spec.name].sequence_level
            sequences = Sequences.of(data, device) if sequence_level else None
            ranges.append(LossRange(start, stop, spec, inputs, sequences))
            start = stop
        return cls(ranges)

    @property
    def ahead_M(self) -> Int64Array:
        """Indices of T whose logprobs must be known before any slope; see ``head.LooksAhead``."""
        marked = [r.start + r.sequences.marked_M for r in self.ranges if r.sequences is not None]
        return np.concatenate(marked) if marked else np.empty(0, np.int64)

    def knowing(self, lp_M: Tensor) -> "MixedLoss":
        """The same losses after the logprobs of ``ahead_M`` are known."""
        ranges: list[LossRange] = []
        begin = 0
        for r in self.ranges:
            if r.sequences is None:
                ranges.append(r)
                continue
            end = begin + len(r.sequences.marked_M)
            q_M = r.inputs["logprobs"][on_device(lp_M.device, r.sequences.marked_M)]
            log_ratio_S = sequence_log_ratios(
                lp_M[begin:end], q_M, r.sequences.sequence_M, r.sequences.count
            )
            known = {SEQUENCE_LOG_RATIO: log_ratio_S[r.sequences.sequence_T]}
            ranges.append(replace(r, inputs={**r.inputs, **known}))
            begin = end
        return MixedLoss(ranges)

    def __call__(self, part: slice, lp_T: Tensor) -> ValueAndSlope:
        """Values and slopes of a part of T."""
        values: list[Tensor] = []
        slopes: list[Tensor] = []
        for r in self.ranges:
            start, stop = max(r.start, part.start), min(r.stop, part.stop)
            if start < stop:
                inputs = {k: v[start - r.start : stop - r.start] for k, v in r.inputs.items()}
                here_T = lp_T[start - part.start : stop - part.start]
                value_T, slope_T = token_loss(r.spec, here_T, inputs)
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
