"""From rows of many runs to the tensors of one slice of a pass.

Shapes: B rows, L longest row, P positions that are no padding, T target tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.attention import Rows
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.lora import BatchPlan, LoraTensors, Segment
from twinkle_dask.model.vision import Patch
from twinkle_dask.trainer.gradient import Gradient
from twinkle_dask.trainer.head import Targets
from twinkle_dask.trainer.mixed_loss import MixedLoss, on_device
from twinkle_dask.types import Datum, Int64Array, Loss


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One work's rows in a pass.

    Attributes:
        gradient: What its adapter's gradients are added to in the end; None for forward only.
        owner: The tenant.
    """

    adapter: LoraTensors
    gradient: Gradient | None
    loss: Loss
    data: Sequence[Datum]
    owner: str = ""

    @property
    def num_tokens(self) -> int:
        """Input tokens of its rows."""
        return sum(len(datum.tokens) for datum in self.data)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the positions of a batch are while they go through the body.

    Attributes:
        rows: If rows lie one after another in one sequence, where each begins.
        tokens: int64; (P,) if packed, else (B, L), padded on the right.
        place_P: Each position's place in the flattened tokens; None if there is no padding.
        patches: Images, in place of some of the tokens.
    """

    rows: Rows | None
    tokens: Tensor
    place_P: Tensor | None
    patches: Sequence[Patch]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The tensors of one slice of a pass; each part is one range of rows, of P and of T.

    Attributes:
        plan: Segments over positions as they go through the body.
        segments: Segments over P, for the head.
    """

    layout: Layout
    plan: BatchPlan
    segments: Sequence[Segment]
    targets: Targets
    loss: MixedLoss

    @classmethod
    def of(
        cls,
        parts: Sequence[Part],
        grads: Sequence[Mapping[str, Tensor] | None],
        base: BaseModel,
        looks: Mapping[bytes, Tensor],
    ) -> "Batch":
        """Lay the rows out.

        Args:
            parts: At least one, with at least one datum each.
            grads: For each part, buffers for its gradients.
            base: Packed where its architecture allows it.
            looks: What the rows' images look like, from ``BaseModel.look``.

        Raises:
            InvalidRequest: A row is empty, or a token or target is outside of the vocabulary.
                Faces check that too; here it would be another tenant's pass that breaks.
        """
        data = [datum for part in parts for datum in part.data]
        lengths = np.array([len(datum.tokens) for datum in data])
        tokens_P = np.concatenate([datum.tokens for datum in data], dtype=np.int64)
        token_T = np.concatenate([datum.target_tokens.ravel() for datum in data])
        if not lengths.all():
            raise InvalidRequest("A datum holds no tokens.")
        vocab_size = base.facts.vocab_size
        for tokens in (tokens_P, token_T):
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                raise InvalidRequest(f"A token is outside of the vocabulary of {vocab_size}.")
        sizes: list[int] = lengths.tolist()
        segments = _segments(parts, grads, sizes)
        if base.mixes_only_by_attention:
            rows = Rows.of(sizes, base.device)
            starts = np.cumsum(lengths) - lengths
            patches = _patches(data, starts, looks) if looks else ()
            layout, over = Layout(rows, on_device(base.device, tokens_P), None, patches), segments
        else:
            layout = _padded(tokens_P, lengths, base.device)
            if looks:
                starts = np.arange(len(data)) * layout.tokens.shape[1]
                layout = replace(layout, patches=_patches(data, starts, looks))
            over = _segments(parts, grads, [layout.tokens.shape[1]] * len(data))
        per_position_P = np.repeat(
            [datum.target_tokens.size // len(datum.tokens) for datum in data], lengths
        )
        position_T = np.repeat(np.arange(len(per_position_P)), per_position_P)
        first = np.concatenate([[0], np.cumsum(per_position_P)])
        device = base.device
        return cls(
            layout=layout,
            plan=BatchPlan(over, over_positions=True),
            segments=segments,
            targets=Targets(on_device(device, token_T), on_device(device, position_T), first),
            loss=MixedLoss.of([(part.loss, part.data) for part in parts], device),
        )


def _padded(tokens_P: Int64Array, lengths: Int64Array, device: torch.device) -> Layout:
    longest = int(lengths.max())
    there_BL = np.arange(longest) < lengths[:, None]
    tokens_BL = np.zeros((len(lengths), longest), np.int64)
    tokens_BL[there_BL] = tokens_P
    place_P = None if there_BL.all() else on_device(device, np.flatnonzero(there_BL))
    return Layout(None, on_device(device, tokens_BL), place_P, ())


def _patches(
    data: Sequence[Datum], starts: Int64Array, looks: Mapping[bytes, Tensor]
) -> list[Patch]:
    """The images of rows that begin at these places."""
    return [
        Patch(int(start) + image.position, looks[image.data])
        for datum, start in zip(data, starts, strict=True)
        for image in datum.images
    ]


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


def _segments(
    parts: Sequence[Part], grads: Sequence[Mapping[str, Tensor] | None], sizes: Sequence[int]
) -> tuple[Segment, ...]:
    """One segment for each part, over units of which each datum takes its size."""
    segments: list[Segment] = []
    row = start = 0
    for part, of_part in zip(parts, grads, strict=True):
        stop = start + sum(sizes[row : row + len(part.data)])
        segments.append(Segment(slice(start, stop), part.adapter, of_part))
        row, start = row + len(part.data), stop
    return tuple(segments)
