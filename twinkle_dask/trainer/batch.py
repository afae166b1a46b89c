"""From rows of many runs to the tensors of one slice of a pass.

Shapes: B rows, L longest row, P positions that are scored and no padding, T target tokens, E rows
that are embedded, D hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.attention import Rows
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.dropout import Dropout
from twinkle_dask.model.lora import BatchPlan, LoraTensors, Segment
from twinkle_dask.model.vision import Patch
from twinkle_dask.trainer.gradient import Gradient
from twinkle_dask.trainer.head import Targets
from twinkle_dask.trainer.mixed_loss import MixedLoss, on_device
from twinkle_dask.types import Datum, Float32Array, Int64Array, Loss


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One work's rows in a pass.

    Attributes:
        adapter: None for the base model alone.
        gradient: What its adapter's gradients are added to in the end; None for forward only.
        loss: None for rows that are embedded; they have no targets.
        owner: The tenant.
        temperature: What logits are divided by.
        raw_scores: The scores of targets are logits.
        want_correct: Tell where the likeliest token is the target.
        slopes: Of rows that are embedded, a loss's derivatives by their embeddings.
        dropout_seed: None leaves out nothing.
        rows: Each row's index in its work, for what is left out of it.
    """

    adapter: LoraTensors | None
    gradient: Gradient | None
    loss: Loss | None
    data: Sequence[Datum]
    owner: str = ""
    temperature: float = 1.0
    raw_scores: bool = False
    want_correct: bool = False
    slopes: Sequence[Float32Array] | None = None
    dropout_seed: int | None = None
    rows: Sequence[int] = ()

    def only(self, rows: Sequence[int]) -> "Part":
        """Some of the rows, as a part."""
        slopes = None if self.slopes is None else [self.slopes[row] for row in rows]
        indices = [self.rows[row] for row in rows] if self.rows else ()
        return replace(self, data=[self.data[row] for row in rows], slopes=slopes, rows=indices)

    @property
    def num_tokens(self) -> int:
        """Input tokens of its rows."""
        return sum(len(datum.tokens) for datum in self.data)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the positions of a batch are while they go through the body.

    Attributes:
        rows: If rows lie one after another in one sequence, where each begins.
        tokens: int64; (positions,) if packed, else (B, L), padded on the right.
        patches: Images, in place of some of the tokens.
    """

    rows: Rows | None
    tokens: Tensor
    patches: Sequence[Patch]


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """The rows of a batch that are embedded.

    Attributes:
        last_E: Place of each one's last token in the flattened tokens; int64.
        slopes_ED: Derivatives by their embeddings, float32, 0 for rows without; None if no row has
            any.
    """

    last_E: Tensor
    slopes_ED: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The tensors of one slice of a pass; each part is one range of rows, of P and of T.

    Attributes:
        plan: Segments over positions as they go through the body.
        segments: Segments over P, for the head.
        place_P: Each scored position's place in the flattened tokens; None if that is all of them.
        embedded: None if all rows are scored.
    """

    layout: Layout
    plan: BatchPlan
    segments: Sequence[Segment]
    targets: Targets
    loss: MixedLoss
    place_P: Tensor | None
    embedded: Embedded | None

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
        tokens = np.concatenate([datum.tokens for datum in data], dtype=np.int64)
        token_T = np.concatenate([datum.target_tokens.ravel() for datum in data])
        if not lengths.all():
            raise InvalidRequest("A datum holds no tokens.")
        vocab_size = base.facts.vocab_size
        for some in (tokens, token_T):
            if len(some) and (some.min() < 0 or some.max() >= vocab_size):
                raise InvalidRequest(f"A token is outside of the vocabulary of {vocab_size}.")
        device = base.device
        sizes: list[int] = lengths.tolist()
        segments = _segments(parts, grads, sizes, device)
        if base.mixes_only_by_attention:
            rows = Rows.of(sizes, device)
            starts = np.cumsum(lengths) - lengths
            place, over = None, segments
            layout = Layout(rows, on_device(device, tokens), ())
        else:
            layout, place = _padded(tokens, lengths, device)
            length = layout.tokens.shape[1]
            starts = np.arange(len(data)) * length
            over = _segments(parts, grads, [length] * len(data), device)
        if looks:
            layout = replace(layout, patches=_patches(data, starts, looks))
        embedded = None
        if embeds := [part.loss is None for part in parts for _ in part.data if part.loss is None]:
            scored = np.array([part.loss is not None for part in parts for _ in part.data])
            embedded = _embedded(parts, (starts + lengths - 1)[~scored], base)
            place = np.arange(len(tokens)) if place is None else place
            place = place[np.repeat(scored, lengths)]
            sizes = np.where(scored, lengths, 0).tolist()
            segments = _segments(parts, grads, sizes, device)
            lengths, data = lengths[scored], [d for d, s in zip(data, scored, strict=True) if s]
        parts = [part for part in parts if part.loss is not None] if embeds else parts
        return cls(
            layout=layout,
            plan=BatchPlan(over, over_positions=True),
            segments=segments,
            targets=_targets(parts, data, lengths, token_T, device),
            loss=MixedLoss.of([(part.loss, part.data) for part in parts if part.loss], device),
            place_P=None if place is None else on_device(device, place),
            embedded=embedded,
        )


def _targets(
    parts: Sequence[Part],
    data: Sequence[Datum],
    lengths: Int64Array,
    token_T: Int64Array,
    device: torch.device,
) -> Targets:
    per_row = [datum.target_tokens.size // len(datum.tokens) for datum in data]
    per_position_P = np.repeat(np.array(per_row, np.int64), lengths)
    position_T = np.repeat(np.arange(len(per_position_P)), per_position_P)
    first = np.pad(np.cumsum(per_position_P), (1, 0))

    def per_position(values: Sequence[float | bool], usual: float | bool) -> Tensor | None:
        if all(value == usual for value in values):
            return None
        per_row = np.repeat(np.array(values), [len(part.data) for part in parts])
        return on_device(device, np.repeat(per_row, lengths))

    temperature_P = per_position([part.temperature for part in parts], 1.0)
    return Targets(
        on_device(device, token_T),
        on_device(device, position_T),
        first,
        None if temperature_P is None else temperature_P.float(),
        per_position([part.raw_scores for part in parts], False),
        per_position([part.want_correct for part in parts], False),
    )


def _embedded(parts: Sequence[Part], last_E: Int64Array, base: BaseModel) -> Embedded:
    parts = [part for part in parts if part.loss is None]
    slopes = None
    if any(part.slopes is not None for part in parts):
        zero_D = np.zeros(base.head.weight_VD.shape[1], np.float32)
        rows = [row for part in parts for row in part.slopes or [zero_D] * len(part.data)]
        slopes = on_device(base.device, np.stack(rows))
    return Embedded(on_device(base.device, last_E), slopes)


def _padded(
    tokens: Int64Array, lengths: Int64Array, device: torch.device
) -> tuple[Layout, Int64Array | None]:
    """Rows of one length, and where what is no padding stands among them; None if that is all."""
    longest = int(lengths.max())
    there_BL = np.arange(longest) < lengths[:, None]
    tokens_BL = np.zeros((len(lengths), longest), np.int64)
    tokens_BL[there_BL] = tokens
    place = None if there_BL.all() else np.flatnonzero(there_BL)
    return Layout(None, on_device(device, tokens_BL), ()), place


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


def _dropout(part: Part, sizes: Sequence[int], device: torch.device) -> Dropout | None:
    if part.dropout_seed is None or part.adapter is None or not part.adapter.spec.dropout:
        return None
    share = part.adapter.spec.dropout
    return Dropout.of(share, part.dropout_seed, part.rows, sizes, device)


def _segments(
    parts: Sequence[Part],
    grads: Sequence[Mapping[str, Tensor] | None],
    sizes: Sequence[int],
    device: torch.device,
) -> tuple[Segment, ...]:
    """One segment for each part with an adapter, over units of which each datum takes its size."""
    segments: list[Segment] = []
    row = start = 0
    for part, of_part in zip(parts, grads, strict=True):
        stop = start + sum(sizes[row : row + len(part.data)])
        if part.adapter is not None and stop > start:
            here = slice(start, stop)
            dropout = _dropout(part, sizes[row : row + len(part.data)], device)
            segments.append(Segment(here, part.adapter, of_part, dropout))
        row, start = row + len(part.data), stop
    return tuple(segments)
