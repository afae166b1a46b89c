"""Answers of the hot routes, written straight as bytes."""

from typing import Any

import orjson
from fastapi import Request, Response

from twinkle_dask.errors import RequestError
from twinkle_dask.operations.values import Done, Failed, Result, Ticket, Waiting
from twinkle_dask.types import ForwardBackwardResult, SampleResult
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.faults import message_of
from twinkle_dask_gateway.reading import PROTOBUF, aside
from twinkle_dask_gateway.tinker import codec, codec_json, codec_proto, codec_sampling


def json_answer(body: dict[str, Any], status: int = 200) -> Response:
    """A JSON body as it is."""
    return Response(orjson.dumps(body), status, media_type="application/json")


def promise(ticket: Ticket) -> Response:
    """The result to come; for samples with an id for each of them, in their order."""
    body: dict[str, Any] = {"request_id": ticket.id}
    if ticket.sequence_ids:
        body["sample_sequence_ids"] = ticket.sequence_ids
    return json_answer(body)


def not_yet(outcome: Waiting) -> Response:
    """408: poll again. The client does so at once, and quietly."""
    return json_answer(
        {
            "type": "try_again",
            "queue_state": str(outcome.queue_state),
            "queue_state_reason": outcome.reason,
        },
        status=408,
    )


def failed(outcome: Failed) -> Response:
    """A failed result. Not an error status: the client would take that for a failed poll."""
    category = "user" if isinstance(outcome.error, RequestError) else "server"
    return json_answer({"error": message_of(outcome.error), "category": category})


def metadata_only(num_bytes: int) -> Response:
    """The result is there, and so large; the client asks again when it has room."""
    return json_answer({"status": "complete_metadata", "response_payload_size": num_bytes})


def size_of(outcome: Done) -> int:
    """About how large the answer to a finished request is: its numbers, as protobuf has them."""
    return _num_bytes(outcome.result)


async def done(outcome: Done, request: Request, config: GatewayConfig) -> Response:
    """A result: samples and logprobs as protobuf to whoever accepts it, all else as JSON."""
    result = outcome.result
    if not isinstance(result, ForwardBackwardResult | SampleResult):
        return json_answer(codec.small_result(result))
    protobuf = PROTOBUF in request.headers.get("accept", "")
    content = await aside(_num_bytes(result), config, lambda: _encode(result, protobuf=protobuf))
    return Response(content, media_type=PROTOBUF if protobuf else "application/json")


def _encode(result: ForwardBackwardResult | SampleResult, *, protobuf: bool) -> bytes:
    if isinstance(result, SampleResult):
        return (codec_sampling.sample_bytes if protobuf else codec_sampling.sample_json)(result)
    encode = codec_proto.forward_backward_bytes if protobuf else codec_json.forward_backward_json
    return encode(result)


def _num_bytes(result: Result) -> int:
    match result:
        case ForwardBackwardResult():
            return sum(array.nbytes for array in result.logprobs)
        case SampleResult():
            return codec_sampling.num_bytes(result)
        case _:
            return 0
