"""Where training data say that their tokens come from, and whether that is so.

A datum may carry two lists of *spans*. The one covers its input tokens, the other its targets,
each without a gap: a span is as long as it says and begins where the one before it ends. It names
a sequence that was sampled, and the part of that sequence's prompt, or of what was drawn after it,
that the datum repeats there.

Samples are recorded where the client asked for it (``Recording``). A loss that relies on spans
takes nothing but recorded sequences; for the others a span that names something unknown says
nothing, but one that names a recorded sequence must tell the truth.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.recording import RecordedSample, Recording, sequence_of
from twinkle_dask.types import (
    Datum,
    ForwardBackward,
    Int32Array,
    LossName,
    SessionId,
    TenantId,
    TicketId,
)

#: Losses that take no span of which nothing is known.
_STRICT = frozenset({LossName.STABLE_REINFORCE})
#: Larger batches, or those of more spans, are checked on a thread.
_ASIDE_TOKENS = 20_000
_ASIDE_SPANS = 1_000


class SpanKind(StrEnum):
    """Which tokens of a sequence a span repeats."""

    PROMPT = "prompt"
    SAMPLED = "sampled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """``length`` tokens of a sequence's prompt or drawn tokens, from ``offset``."""

    kind: SpanKind
    sequence_id: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatumSpans:
    """Both lists of one datum: over its input tokens, and over its targets."""

    model_input: tuple[Span, ...]
    loss_inputs: tuple[Span, ...]


BatchSpans: TypeAlias = Mapping[int, DatumSpans]
"""The spans of those data, by their place in the batch, that have any."""

_Known: TypeAlias = Mapping[TicketId, RecordedSample]


class Provenance:
    """Holds what training data claim against what was recorded."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    async def check(
        self, tenant: TenantId, session: SessionId, batch: ForwardBackward, spans: BatchSpans
    ) -> None:
        """Check the spans of a batch whose data are valid.

        Raises:
            InvalidRequest: A list does not cover its datum, or a span is not true; names both.
            StorageFailed: What was recorded cannot be read.
        """
        check_cover(batch, spans)
        named = (sequence_of(span.sequence_id) for _, span in _all(spans))
        known = await self._recording.find(
            tenant, session, dict.fromkeys(name[0] for name in named if name is not None)
        )
        if batch.num_tokens > _ASIDE_TOKENS or len(_all(spans)) > _ASIDE_SPANS:
            await asyncio.to_thread(check_tokens, batch, spans, known)
        else:
            check_tokens(batch, spans, known)


def check_cover(batch: ForwardBackward, spans: BatchSpans) -> None:
    """Check that the lists cover their data exactly.

    Raises:
        InvalidRequest: One does not.
    """
    for index, of_datum in spans.items():
        datum = batch.data[index]
        for name, some, length in (
            ("model_input_spans", of_datum.model_input, len(datum.tokens)),
            ("loss_fn_input_spans", of_datum.loss_inputs, len(datum.target_tokens)),
        ):
            where = f"Datum {index}: {name}"
            if not some:
                raise InvalidRequest(
                    f"{where} is empty. Both lists of spans are needed, or none of them."
                )
            for place, span in enumerate(some):
                if span.offset < 0 or span.length < 0:
                    raise InvalidRequest(
                        f"{where}[{place}] has offset {span.offset} and length {span.length}; "
                        "neither may be negative."
                    )
                if not span.sequence_id:
                    raise InvalidRequest(f"{where}[{place}] names no sequence.")
            covered = sum(span.length for span in some)
            if covered != length:
                raise InvalidRequest(
                    f"{where} covers {covered} positions, but there are {length}; each position "
                    "must be in exactly one span."
                )


def check_tokens(batch: ForwardBackward, spans: BatchSpans, known: _Known) -> None:
    """Compare each span of a recorded sequence with what was recorded.

    Raises:
        InvalidRequest: They differ, or the loss needs a record where there is none.
    """
    strict = batch.loss.name in _STRICT
    for index, of_datum in spans.items():
        datum = batch.data[index]
        for name, some in (
            ("model_input_spans", of_datum.model_input),
            ("loss_fn_input_spans", of_datum.loss_inputs),
        ):
            start = 0
            for place, span in enumerate(some):
                where = f"Datum {index}: {name}[{place}]"
                recorded = _recorded(span, known)
                if recorded is not None:
                    actual = _tokens_of(datum, name)[start : start + span.length]
                    # What stands where a target is a prompt's token is of no account: nothing
                    # drawn there is to be learned, and the cookbook's loop writes zeros.
                    padding = name == "loss_fn_input_spans" and span.kind is SpanKind.PROMPT
                    _compare(where, span, recorded, None if padding else actual)
                elif strict:
                    raise InvalidRequest(
                        f"{where} names sequence {span.sequence_id[:80]!r}, which was not "
                        f"recorded in this session. {batch.loss.name} needs samples of a client "
                        "that was created with record_stability_info."
                    )
                start += span.length


def _all(spans: BatchSpans) -> Sequence[tuple[int, Span]]:
    return [
        (index, span)
        for index, of_datum in spans.items()
        for span in (*of_datum.model_input, *of_datum.loss_inputs)
    ]


def _tokens_of(datum: Datum, name: str) -> NDArray[Any]:
    return datum.tokens if name == "model_input_spans" else datum.target_tokens


def _recorded(span: Span, known: _Known) -> Int32Array | None:
    """The tokens that a span is a part of; None if nothing is known of its sequence."""
    named = sequence_of(span.sequence_id)
    if named is None:
        return None
    ticket, place = named
    sample = known.get(ticket)
    if sample is None or place >= len(sample.sequences):
        return None
    return sample.prompt if span.kind is SpanKind.PROMPT else sample.sequences[place]


def _compare(where: str, span: Span, recorded: Int32Array, actual: NDArray[Any] | None) -> None:
    end = span.offset + span.length
    if end > len(recorded):
        raise InvalidRequest(
            f"{where} ends at {end}, but sequence {span.sequence_id!r} has {len(recorded)} "
            f"{span.kind} tokens."
        )
    if actual is None:
        return
    expected = recorded[span.offset : end]
    # Of several targets at a position one is the token that was drawn.
    same = expected == actual if actual.ndim == 1 else (expected[:, None] == actual).any(axis=1)
    if not same.all():
        at = int(np.argmin(same))
        raise InvalidRequest(
            f"{where} does not hold what sequence {span.sequence_id!r} does: its {span.kind} token "
            f"{span.offset + at} is {expected[at]}, not {actual[at]}."
        )
