"""Protobuf to the core's values and back. Errors name the datum they are about."""

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.types import (
    CustomLoss,
    Datum,
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
)
from twinkle_dask_gateway.tinker import tinker_pb2 as pb
from twinkle_dask_gateway.tinker.chunks import row_of_protobuf
from twinkle_dask_gateway.tinker.counting import check_counts
from twinkle_dask_gateway.tinker.loss_configs import custom_loss_id, loss_of
from twinkle_dask_gateway.tinker.tensors import Array, Growth, datum_of, dense, sparse
from twinkle_dask_gateway.tinker.wire.base import MAX_ID_LENGTH

_T = TypeVar("_T", bound=np.generic)


def parse_forward_backward(body: bytes, *, max_data: int) -> pb.ForwardBackwardRequest:
    """Read the message; ``batch_of`` reads what is in it.

    Raises:
        InvalidRequest: The bytes are no such message, for example because some are missing; or it
            has too many data, or an id that is none.
    """
    check_counts(body, max_data)
    try:
        message = pb.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise InvalidRequest(
            f"The body ({len(body)} bytes) is not a complete protobuf ForwardBackwardRequest."
        ) from None
    if not 1 <= len(message.model_id) <= MAX_ID_LENGTH or "\0" in message.model_id:
        raise InvalidRequest(
            f"model_id must have from 1 to {MAX_ID_LENGTH} characters, none of them U+0000."
        )
    return message


def loss_id_of(message: pb.ForwardBackwardRequest) -> str | None:
    """The custom loss that a batch is under; None if it is under one of ours."""
    return custom_loss_id(message.loss_fn, _loss_config(message))


def batch_of(
    message: pb.ForwardBackwardRequest, growth: Growth, custom: CustomLoss | None = None
) -> ForwardBackward:
    """Decode a batch. The arrays may share memory with the message.

    ``custom`` is the loss that ``loss_id_of`` names.

    Raises:
        InvalidRequest: Something in it contradicts itself, or the loss is unknown.
        NotSupported: It holds audio, or something else that is not served.
    """
    loss = loss_of(message.loss_fn, _loss_config(message), custom)
    data: list[Datum] = []
    for index, datum in enumerate(message.data):
        try:
            row = row_of_protobuf(datum.model_input)
            inputs = {
                name: _named(name, tensor, growth) for name, tensor in datum.loss_fn_inputs.items()
            }
            data.append(datum_of(row.tokens, inputs, row.images, custom))
        except (InvalidRequest, NotSupported) as error:
            raise type(error)(f"Datum {index}: {error.message}.") from None
    return ForwardBackward(data=tuple(data), loss=loss, backward=not message.forward_only)


def _named(name: str, tensor: pb.Tensor, growth: Growth) -> Array:
    try:
        return _array_of(tensor, growth)
    except InvalidRequest as error:
        raise InvalidRequest(f"loss input {name[:60]!r}: {error.message}") from None


def _array_of(tensor: pb.Tensor, growth: Growth) -> Array:
    widen = _WIDEN.get(tensor.dtype)
    if widen is None:
        raise InvalidRequest(f"a tensor has no known dtype (number {tensor.dtype})")
    match tensor.WhichOneof("encoding"):
        case "dense":
            return dense(widen(tensor.dense), tensor.shape)
        case "sparse_csr":
            csr = tensor.sparse_csr
            int64 = np.dtype("<i8")
            crow = _numbers(csr.crow_indices, int64, "row pointers")
            col = _numbers(csr.col_indices, int64, "column indices")
            return sparse(widen(csr.values), crow, col, tensor.shape, growth)
        case _:
            raise InvalidRequest("a tensor has no content")


def _bfloat16(data: bytes) -> NDArray[np.float32]:
    upper_half = _numbers(data, np.dtype("<u2"), "bfloat16 values")
    return (upper_half.astype(np.uint32) << 16).view(np.float32)


_WIDEN: Mapping[int, Callable[[bytes], Array]] = {
    pb.DTYPE_FLOAT32: lambda data: _numbers(data, np.dtype("<f4"), "float32 values"),
    pb.DTYPE_BFLOAT16: _bfloat16,
    pb.DTYPE_INT64: lambda data: _numbers(data, np.dtype("<i8"), "int64 values"),
    pb.DTYPE_INT32: lambda data: _numbers(data, np.dtype("<i4"), "int32 values").astype(np.int64),
}


def _numbers(data: bytes, dtype: np.dtype[_T], what: str) -> NDArray[_T]:
    if len(data) % dtype.itemsize:
        raise InvalidRequest(f"{len(data)} bytes are no whole number of {what}")
    return np.frombuffer(data, dtype)


def _loss_config(message: pb.ForwardBackwardRequest) -> dict[str, float | str]:
    if not message.loss_fn_config_v2:
        return dict(message.loss_fn_config)
    config: dict[str, float | str] = {}
    for name, value in message.loss_fn_config_v2.items():
        match value.WhichOneof("value"):
            case "number":
                config[name] = value.number
            case "text":
                config[name] = value.text
            case _:
                raise InvalidRequest(f"Setting {name[:60]!r} of the loss has no value.")
    return config


# ---- results


def forward_backward_bytes(result: ForwardBackwardResult) -> bytes:
    """Encode a result: one record per stretch of data with the same number of targets."""
    message = pb.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord", metrics=dict(result.metrics)
    )
    for trailing_shape, group in groupby(result.logprobs, key=lambda array: array.shape[1:]):
        arrays = list(group)
        offsets = np.zeros(len(arrays) + 1, "<i8")
        np.cumsum([array.nbytes for array in arrays], out=offsets[1:])
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(arrays))
        record.fields["logprobs"].CopyFrom(
            pb.BatchedTensor(
                data=b"".join(_float32_bytes(array) for array in arrays),
                offsets=offsets.tobytes(),
                dtype=pb.DTYPE_FLOAT32,
                trailing_shape=trailing_shape,
            )
        )
    return message.SerializeToString()


def _float32_bytes(array: Float32Array) -> bytes:
    return array.astype("<f4", copy=False).tobytes()
