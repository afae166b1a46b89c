"""JSON bodies to the core's values, and results to JSON for SDKs from before protobuf."""

from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.losses import loss_spec
from twinkle_dask.types import (
    AdamParams,
    Datum,
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
    Int32Array,
    SampleRequest,
    SampleResult,
    SamplingParams,
    Stop,
)
from twinkle_dask_gateway.tinker import wire
from twinkle_dask_gateway.tinker.tensors import Array, Growth, datum_of, dense, sparse

_INT32 = np.iinfo(np.int32)
# What old SDKs leave out: the kind of a chunk follows from its content's key.
_CHUNK_KEYS = {"tokens": "encoded_text", "location": "image_asset_pointer", "data": "image"}


def adam_of(params: wire.AdamParams) -> AdamParams:
    """The settings of a step; a negative clip norm means none, like 0."""
    return AdamParams(
        learning_rate=params.learning_rate,
        beta1=params.beta1,
        beta2=params.beta2,
        eps=params.eps,
        weight_decay=params.weight_decay,
        grad_clip_norm=max(0.0, params.grad_clip_norm),
    )


def sample_request_of(body: wire.Sample) -> SampleRequest:
    """Decode a request for samples.

    Raises:
        InvalidRequest: The prompt's tokens are no 32-bit integers.
        NotSupported: The prompt holds images or audio.
    """
    params = body.sampling_params
    try:
        prompt = tokens_of(body.prompt)
    except (InvalidRequest, NotSupported) as error:
        raise type(error)(f"The prompt: {error.message}.") from None
    return SampleRequest(
        prompt=prompt,
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


def tokens_of(model_input: wire.ModelInput) -> Int32Array:
    """Put a prompt's chunks together.

    Raises:
        InvalidRequest: A token is no 32-bit integer.
        NotSupported: A chunk is not text.
    """
    parts: list[NDArray[np.int64]] = []
    for chunk in model_input.chunks:
        kind = chunk.get("type") or next(
            (kind for key, kind in _CHUNK_KEYS.items() if key in chunk), "unknown"
        )
        if kind != "encoded_text":
            raise NotSupported(f"chunks of kind {str(kind)[:40]!r} are not supported; send tokens")
        tokens = _integers(chunk.get("tokens"), "tokens")
        if len(tokens) and not (_INT32.min <= tokens.min() and tokens.max() <= _INT32.max):
            raise InvalidRequest("a token is not within 32 bits")
        parts.append(tokens)
    return np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)


def batch_of(
    batch: wire.ForwardBackwardInput, *, backward: bool, growth: Growth
) -> ForwardBackward:
    """Decode a batch.

    Raises:
        InvalidRequest: Something in it contradicts itself, or the loss is unknown.
        NotSupported: It holds images or audio.
    """
    config: dict[str, float] = {}
    for name, value in (batch.loss_fn_config or {}).items():
        if isinstance(value, str):
            raise InvalidRequest(f"Setting {name[:60]!r} of the loss must be a number.")
        config[name] = value
    loss = loss_spec(batch.loss_fn, config)
    data: list[Datum] = []
    for index, datum in enumerate(batch.data):
        try:
            tokens = tokens_of(datum.model_input)
            inputs = {
                name: _named(name, tensor, growth) for name, tensor in datum.loss_fn_inputs.items()
            }
            data.append(datum_of(tokens, inputs))
        except (InvalidRequest, NotSupported) as error:
            raise type(error)(f"Datum {index}: {error.message}.") from None
    return ForwardBackward(data=tuple(data), loss=loss, backward=backward)


def _named(name: str, tensor: wire.TensorData, growth: Growth) -> Array:
    try:
        return _array_of(tensor, growth)
    except InvalidRequest as error:
        raise InvalidRequest(f"loss input {name[:60]!r}: {error.message}") from None


def _array_of(tensor: wire.TensorData, growth: Growth) -> Array:
    values: Array
    if tensor.dtype == "int64":
        values = _integers(tensor.data, "data")
    else:
        with np.errstate(over="ignore"):  # becomes infinite, which is refused by name
            values = _numbers(tensor.data, "data").astype(np.float32)
    if tensor.sparse_crow_indices is None and tensor.sparse_col_indices is None:
        return dense(values, tensor.shape)
    crow = _integers(tensor.sparse_crow_indices, "sparse_crow_indices")
    col = _integers(tensor.sparse_col_indices, "sparse_col_indices")
    return sparse(values, crow, col, tensor.shape, growth)


def _integers(values: Any, what: str) -> NDArray[np.int64]:
    array = _numbers(values, what)
    if array.dtype != np.int64 and array.size:
        raise InvalidRequest(f"{what} must be a flat list of integers of 64 bits")
    return array.astype(np.int64, copy=False)


def _numbers(values: Any, what: str) -> NDArray[Any]:
    # Without a dtype numpy tells us what it found, where with one it would read "7" as 7.
    try:
        array: NDArray[Any] = np.asarray(values)
    except (ValueError, OverflowError):  # ragged, or larger than any number
        array = np.empty((), object)
    if array.ndim != 1 or array.dtype.kind not in "if":
        raise InvalidRequest(f"{what} must be a flat list of numbers")
    return array


# ---- results


def forward_backward_json(result: ForwardBackwardResult) -> bytes:
    """Encode a result, a tensor per datum."""
    return _dumps(
        {
            "loss_fn_output_type": "ArrayRecord",
            "loss_fn_outputs": [{"logprobs": _tensor(array)} for array in result.logprobs],
            "metrics": dict(result.metrics),
        }
    )


def sample_json(result: SampleResult) -> bytes:
    """Encode a result; what has no logprob is null."""
    return _dumps(
        {
            "type": "sample",
            "sequences": [
                {
                    "stop_reason": str(sequence.stop_reason),
                    "tokens": np.ascontiguousarray(sequence.tokens),
                    "logprobs": np.ascontiguousarray(sequence.logprobs),
                }
                for sequence in result.sequences
            ],
            "prompt_logprobs": result.prompt_logprobs,
        }
    )


def _tensor(array: Float32Array) -> dict[str, Any]:
    return {
        "data": np.ascontiguousarray(array).reshape(-1),
        "dtype": "float32",
        "shape": array.shape,
    }


def _dumps(body: dict[str, Any]) -> bytes:
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
