"""From rows of many runs to the tensors of one pass.

Shapes: B rows, L longest row, P positions that are no padding, T target tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.lora import BatchPlan, LoraTensors, Segment
from twinkle_dask.trainer.head import Targets
from twinkle_dask.trainer.losses import ValueAndSlope, token_loss
from twinkle_dask.types import Datum, Float32Array, LossSpec


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One work's rows in a pass.

    Attributes:
        grads: Where its adapter's gradients go; None for forward only.
    """

    adapter: LoraTensors
    grads: Mapping[str, Tensor] | None
    loss: LossSpec
    data: Sequence[Datum]


@dataclass(frozen=True, slots=True, eq=False)
class _LossRange:
    """A range of T under one loss."""

    start: int
    stop: int
    spec: LossSpec
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class MixedLoss:
    """The losses of a pass, each on its range of T; called as ``head.LossOfPart``."""

    ranges: Sequence[_LossRange]

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


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The tensors of one pass; each part is one slice of rows, of positions and of T.

    Attributes:
        plan: Segments over rows, for the body.
        place_P: Each position's place in the flattened (B, L); None if there is no padding.
        segments: Segments over positions, for the head.
    """

    tokens_BL: Tensor
    plan: BatchPlan
    place_P: Tensor | None
    segments: Sequence[Segment]
    targets: Targets
    loss: MixedLoss

    @classmethod
    def of(cls, parts: Sequence[Part], vocab_size: int, device: torch.device) -> "Batch":
        """Lay the rows out, padded on the right.

        Raises:
            InvalidRequest: A row is empty, or a token or target is outside of the vocabulary.
                Faces check that too; here it would be another tenant's pass that breaks.
        """
        data = [datum for part in parts for datum in part.data]
        lengths = np.array([len(datum.tokens) for datum in data])
        longest = int(lengths.max())
        tokens_BL = np.zeros((len(data), longest), np.int64)
        for row, datum in zip(tokens_BL, data, strict=True):
            row[: len(datum.tokens)] = datum.tokens
        token_T = np.concatenate([datum.target_tokens.ravel() for datum in data])
        if not lengths.all():
            raise InvalidRequest("A datum holds no tokens.")
        for tokens in (tokens_BL, token_T):
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                raise InvalidRequest(f"A token is outside of the vocabulary of {vocab_size}.")

        place_P = None
        if lengths.min() < longest:
            place_P = _on(device, np.flatnonzero(np.arange(longest) < lengths[:, None]))
        per_position_P = np.repeat(
            [datum.target_tokens.size // len(datum.tokens) for datum in data], lengths
        )
        position_T = np.repeat(np.arange(len(per_position_P)), per_position_P)
        first = np.concatenate([[0], np.cumsum(per_position_P)])
        targets = Targets(_on(device, token_T), _on(device, position_T), first)
        return cls(
            tokens_BL=_on(device, tokens_BL),
            plan=BatchPlan(_segments(parts, [1] * len(data))),
            place_P=place_P,
            segments=_segments(parts, lengths.tolist()),
            targets=targets,
            loss=_mixed_loss(parts, device),
        )


def length_groups(lengths: Sequence[int], padding_tokens: int) -> list[slice]:
    """Cut rows, longest first, into passes that waste little on padding.

    A pass is closed when one more row would bring its padding above ``padding_tokens``, which
    should be what a pass of its own costs, in tokens.
    """
    groups: list[slice] = []
    start = padding = 0
    for row, length in enumerate(lengths):
        padding += lengths[start] - length
        if padding > padding_tokens:
            groups.append(slice(start, row))
            start, padding = row, 0
    return [*groups, slice(start, len(lengths))]


def _segments(parts: Sequence[Part], sizes: Sequence[int]) -> tuple[Segment, ...]:
    """One segment for each part, over units of which each datum takes its size."""
    segments: list[Segment] = []
    row = start = 0
    for part in parts:
        stop = start + sum(sizes[row : row + len(part.data)])
        segments.append(Segment(slice(start, stop), part.adapter, part.grads))
        row, start = row + len(part.data), stop
    return tuple(segments)


def _mixed_loss(parts: Sequence[Part], device: torch.device) -> MixedLoss:
    ranges: list[_LossRange] = []
    start = 0
    for spec, group in groupby(parts, key=lambda part: part.loss):
        data = [datum for part in group for datum in part.data]
        names = {name for datum in data for name in datum.loss_inputs}
        inputs = {name: _on(device, _input(data, name)) for name in names}
        stop = start + sum(datum.target_tokens.size for datum in data)
        ranges.append(_LossRange(start, stop, spec, inputs))
        start = stop
    return MixedLoss(ranges)


def _input(data: Sequence[Datum], name: str) -> Float32Array:
    """A loss input over all data; an optional one that a datum leaves out is 1 there."""
    arrays = [
        datum.loss_inputs[name].ravel()
        if name in datum.loss_inputs
        else np.ones(datum.target_tokens.size, np.float32)
        for datum in data
    ]
    return np.concatenate(arrays, dtype=np.float32)


def _on(device: torch.device, array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array).to(device)  # pyright: ignore[reportUnknownMemberType]
