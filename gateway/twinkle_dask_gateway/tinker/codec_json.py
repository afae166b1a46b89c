"""JSON bodies to the core's values, and results to JSON for SDKs from before protobuf."""

from typing import Any

import numpy as np
import orjson

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.types import (
    AdamParams,
    CustomLoss,
    Datum,
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
)
from twinkle_dask_gateway.tinker import wire
from twinkle_dask_gateway.tinker.chunks import row_of_json
from twinkle_dask_gateway.tinker.loss_configs import custom_loss_id, loss_of
from twinkle_dask_gateway.tinker.tensors import (
    Array,
    Growth,
    datum_of,
    dense,
    integers,
    numbers,
    sparse,
)


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


def loss_id_of(batch: wire.ForwardBackwardInput) -> str | None:
    """The custom loss that a batch is under; None if it is under one of ours."""
    return custom_loss_id(batch.loss_fn, batch.loss_fn_config or {})


def batch_of(
    batch: wire.ForwardBackwardInput,
    *,
    backward: bool,
    growth: Growth,
    custom: CustomLoss | None = None,
) -> ForwardBackward:
    """Decode a batch. ``custom`` is the loss that ``loss_id_of`` names.

    Raises:
        InvalidRequest: Something in it contradicts itself, or the loss is unknown.
        NotSupported: It holds audio, or something else that is not served.
    """
    loss = loss_of(batch.loss_fn, batch.loss_fn_config or {}, custom)
    data: list[Datum] = []
    for index, datum in enumerate(batch.data):
        try:
            row = row_of_json(datum.model_input)
            inputs = {
                name: _named(name, tensor, growth) for name, tensor in datum.loss_fn_inputs.items()
            }
            data.append(datum_of(row.tokens, inputs, row.images, custom))
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
        values = integers(tensor.data, "data")
    else:
        with np.errstate(over="ignore"):  # becomes infinite, which is refused by name
            values = numbers(tensor.data, "data").astype(np.float32)
    if tensor.sparse_crow_indices is None and tensor.sparse_col_indices is None:
        return dense(values, tensor.shape)
    crow = integers(tensor.sparse_crow_indices, "sparse_crow_indices")
    col = integers(tensor.sparse_col_indices, "sparse_col_indices")
    return sparse(values, crow, col, tensor.shape, growth)


# ---- results


def forward_backward_json(result: ForwardBackwardResult) -> bytes:
    """Encode a result, a tensor per datum."""
    return _dumps(
        {
            "loss_fn_output_type": "ArrayRecord",
            "loss_fn_outputs": [{"logprobs": _tensor(array)} for array in result.logprobs],
            # A custom loss may say anything, and JSON has no NaN or infinity.
            "metrics": {k: v for k, v in result.metrics.items() if abs(v) < float("inf")},
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
