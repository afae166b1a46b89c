"""Where a batch's tokens come from, out of protobuf. Errors name the datum and the span."""

from collections.abc import Iterable

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.provenance import BatchSpans, DatumSpans, Span, SpanKind
from twinkle_dask_gateway.tinker import tinker_pb2 as pb
from twinkle_dask_gateway.tinker.wire.base import MAX_ID_LENGTH


def spans_of(message: pb.ForwardBackwardRequest) -> BatchSpans:
    """Decode the spans of those data that have any.

    Raises:
        InvalidRequest: One is of no known kind, or its sequence has an impossible name.
    """
    return {
        index: DatumSpans(
            model_input=_spans(f"Datum {index}: model_input_spans", datum.model_input_spans),
            loss_inputs=_spans(f"Datum {index}: loss_fn_input_spans", datum.loss_fn_input_spans),
        )
        for index, datum in enumerate(message.data)
        if datum.model_input_spans or datum.loss_fn_input_spans
    }


def _spans(where: str, spans: Iterable[pb.ProvenanceSpan]) -> tuple[Span, ...]:
    return tuple(_span(f"{where}[{place}]", span) for place, span in enumerate(spans))


def _span(where: str, span: pb.ProvenanceSpan) -> Span:
    match span.WhichOneof("span"):
        case "prompt_tokens":
            kind, content = SpanKind.PROMPT, span.prompt_tokens
        case "sampled_tokens":
            kind, content = SpanKind.SAMPLED, span.sampled_tokens
        case _:
            raise InvalidRequest(f"{where} is neither prompt_tokens nor sampled_tokens.")
    if len(content.sequence_id) > MAX_ID_LENGTH:
        raise InvalidRequest(f"{where}: sequence_id is longer than {MAX_ID_LENGTH} characters.")
    return Span(
        kind=kind,
        sequence_id=content.sequence_id,
        offset=content.offset,
        length=content.length,
    )
