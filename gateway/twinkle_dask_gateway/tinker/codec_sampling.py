"""Requests for samples to the core's values, and samples to protobuf, or to JSON for old SDKs."""

from typing import Any, assert_never

import numpy as np
import orjson

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.types import (
    CsrLayout,
    Float32Array,
    Int32Array,
    SampledSequence,
    SampleRequest,
    SampleResult,
    SamplingParams,
    ScoredTokens,
    Stop,
    StopReason,
    TargetLogprobs,
    TargetTokens,
)
from twinkle_dask_gateway.tinker import tinker_pb2 as pb
from twinkle_dask_gateway.tinker import wire
from twinkle_dask_gateway.tinker.chunks import row_of_json
from twinkle_dask_gateway.tinker.tensors import check_csr, dense, integers

# What clients take for no logprob in a matrix of them; the token beside it is 0.
_NO_LOGPROB = np.float32(-99999.0)


def sample_request_of(body: wire.Sample) -> SampleRequest:
    """Decode a request for samples.

    Raises:
        InvalidRequest: The prompt's tokens are no 32-bit integers, an image is no file, or the
            targets are no tensor.
        NotSupported: The prompt holds audio, or something else that is not served.
    """
    params = body.sampling_params
    try:
        row = row_of_json(body.prompt)
    except (InvalidRequest, NotSupported) as error:
        raise type(error)(f"The prompt: {error.message}.") from None
    return SampleRequest(
        prompt=row.tokens,
        params=SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            # Clients may send any 64 bits, and hash functions give negative ones too.
            seed=None if params.seed is None else params.seed % 2**63,
            stop=stop_of(params.stop),
        ),
        num_samples=body.num_samples,
        prompt_logprobs=bool(body.prompt_logprobs),
        prompt_logprobs_last_n=body.prompt_logprobs_last_n,
        topk_prompt_logprobs=body.topk_prompt_logprobs or 0,
        topk_sample_logprobs=body.topk_sample_logprobs or 0,
        target_prompt_logprobs=_targets_of(body.target_prompt_logprobs),
        prompt_alt_tokens_k=body.prompt_alt_tokens_k or 0,
        images=row.images,
        recorded=bool(body.record_stability_info),
    )


def stop_of(stop: str | list[str] | list[int] | None) -> Stop:
    """What ends a sample. An empty list ends it nowhere, not even at the end of the sequence."""
    match stop:
        case None:
            return Stop()
        case str():
            return Stop(strings=(stop,))
        case _:
            return Stop(
                strings=tuple(s for s in stop if isinstance(s, str)),
                tokens=tuple(t for t in stop if isinstance(t, int)),
                end_of_sequence=bool(stop),
            )


def _targets_of(tensor: wire.TensorData | None) -> TargetTokens | None:
    """A sparse tensor stays sparse: what it does not list asks for nothing."""
    if tensor is None:
        return None
    try:
        if tensor.dtype != "int64":
            raise InvalidRequest(f"token ids are int64, not {tensor.dtype}")
        tokens, layout = integers(tensor.data, "data"), None
        if tensor.sparse_crow_indices is None and tensor.sparse_col_indices is None:
            tokens = dense(tokens, tensor.shape)
        else:
            crow = integers(tensor.sparse_crow_indices, "sparse_crow_indices")
            col = integers(tensor.sparse_col_indices, "sparse_col_indices")
            _, num_columns = check_csr(len(tokens), crow, col, tensor.shape)
            layout = CsrLayout(crow=crow, col=col, num_columns=num_columns)
    except InvalidRequest as error:
        raise InvalidRequest(f"target_prompt_logprobs: {error.message}.") from None
    return TargetTokens(tokens=tokens.astype(np.int64, copy=False), layout=layout)


def num_bytes(result: SampleResult) -> int:
    """About how much there is to encode."""
    arrays = [result.prompt_logprobs]
    scored = [result.topk_prompt_logprobs, result.prompt_alt_tokens]
    for sequence in result.sequences:
        arrays.append(sequence.logprobs)
        scored.append(sequence.topk_logprobs)
    if result.target_prompt_logprobs is not None:
        arrays.append(result.target_prompt_logprobs.logprobs)
    arrays += [tokens.logprobs for tokens in scored if tokens is not None]
    return sum(array.nbytes for array in arrays if array is not None) * 2


# ---- protobuf


def sample_bytes(result: SampleResult) -> bytes:
    """Encode a result."""
    message = pb.SampleResponse()
    for sequence in result.sequences:
        written = message.sequences.add(
            stop_reason=_stop_reason(sequence.stop_reason),
            tokens=_int32_bytes(sequence.tokens),
            logprobs=_float32_bytes(sequence.logprobs),
        )
        if sequence.topk_logprobs is not None:
            written.topk_sampled_logprobs.CopyFrom(_topk(sequence.topk_logprobs))
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = _float32_bytes(result.prompt_logprobs)
    if result.topk_prompt_logprobs is not None:
        message.topk_prompt_logprobs.CopyFrom(_topk(result.topk_prompt_logprobs))
    if result.target_prompt_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(_targets(result.target_prompt_logprobs))
    if (drawn := result.prompt_alt_tokens) is not None:
        shape = drawn.tokens.shape
        message.prompt_alt_tokens.tokens.CopyFrom(
            pb.Tensor(dense=_int32_bytes(drawn.tokens), dtype=pb.DTYPE_INT32, shape=shape)
        )
        message.prompt_alt_tokens.logprobs.CopyFrom(
            pb.Tensor(dense=_float32_bytes(drawn.logprobs), dtype=pb.DTYPE_FLOAT32, shape=shape)
        )
    return message.SerializeToString()


def _topk(scored: ScoredTokens) -> pb.TopkLogprobs:
    length, width = scored.tokens.shape
    logprobs = np.where(np.isnan(scored.logprobs), _NO_LOGPROB, scored.logprobs)
    return pb.TopkLogprobs(
        token_ids=_int32_bytes(scored.tokens),
        logprobs=_float32_bytes(logprobs),
        k=width,
        length=length,
    )


def _targets(found: TargetLogprobs) -> pb.Tensor:
    values, layout = _float32_bytes(found.logprobs), found.layout
    if layout is None:
        return pb.Tensor(dense=values, dtype=pb.DTYPE_FLOAT32, shape=found.logprobs.shape)
    csr = pb.SparseCsr(
        values=values,
        crow_indices=layout.crow.astype("<i8", copy=False).tobytes(),
        col_indices=layout.col.astype("<i8", copy=False).tobytes(),
    )
    return pb.Tensor(sparse_csr=csr, dtype=pb.DTYPE_FLOAT32, shape=_shape(layout))


def _int32_bytes(array: Int32Array) -> bytes:
    return array.astype("<i4", copy=False).tobytes()


def _float32_bytes(array: Float32Array) -> bytes:
    return array.astype("<f4", copy=False).tobytes()


def _stop_reason(reason: StopReason) -> pb.StopReason:
    match reason:
        case StopReason.STOP:
            return pb.STOP_REASON_STOP
        case StopReason.LENGTH:
            return pb.STOP_REASON_LENGTH
        case _:
            assert_never(reason)


# ---- JSON


def sample_json(result: SampleResult) -> bytes:
    """Encode a result; what has no logprob is null. Newer fields are there if asked for."""
    body: dict[str, Any] = {
        "type": "sample",
        "sequences": [_sequence_json(sequence) for sequence in result.sequences],
        "prompt_logprobs": result.prompt_logprobs,
        "topk_prompt_logprobs": _topk_json(result.topk_prompt_logprobs),
    }
    if (found := result.target_prompt_logprobs) is not None:
        body["target_prompt_logprobs"] = _tensor_json(found.logprobs)
        if found.layout is not None:
            body["target_prompt_logprobs"] |= {
                "shape": _shape(found.layout),
                "sparse_crow_indices": found.layout.crow,
                "sparse_col_indices": found.layout.col,
            }
    if (drawn := result.prompt_alt_tokens) is not None:
        body["prompt_alt_tokens"] = {
            "tokens": _tensor_json(drawn.tokens),
            "logprobs": _tensor_json(drawn.logprobs),
        }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _sequence_json(sequence: SampledSequence) -> dict[str, Any]:
    body: dict[str, Any] = {
        "stop_reason": str(sequence.stop_reason),
        "tokens": np.ascontiguousarray(sequence.tokens),
        "logprobs": np.ascontiguousarray(sequence.logprobs),
    }
    if sequence.topk_logprobs is not None:
        body["topk_logprobs"] = _topk_json(sequence.topk_logprobs)
    return body


def _topk_json(scored: ScoredTokens | None) -> orjson.Fragment | None:
    """Pairs of token and logprob, row by row: all of them as Python objects would be too many."""
    if scored is None:
        return None
    rows: list[bytes] = []
    for tokens, logprobs in zip(scored.tokens, scored.logprobs, strict=True):
        # JSON has no infinity, and null is nothing that clients take in a pair.
        finite = np.where(np.isfinite(logprobs), logprobs, _NO_LOGPROB)
        pairs = list(zip(tokens.tolist(), finite.tolist(), strict=True))
        rows.append(b"null" if np.isnan(logprobs).all() else orjson.dumps(pairs))
    return orjson.Fragment(b"[" + b",".join(rows) + b"]")


def _tensor_json(array: Int32Array | Float32Array) -> dict[str, Any]:
    return {
        "data": np.ascontiguousarray(array).reshape(-1),
        "dtype": "int64" if array.dtype.kind == "i" else "float32",
        "shape": array.shape,
    }


def _shape(layout: CsrLayout) -> tuple[int, int]:
    return len(layout.crow) - 1, layout.num_columns
