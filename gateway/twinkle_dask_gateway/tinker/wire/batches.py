"""``forward_backward`` in JSON, as SDKs before 0.25 send it."""

from typing import Annotated, Any, ClassVar, cast

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from twinkle_dask.types import LossName
from twinkle_dask_gateway.tinker.counting import check_num_data
from twinkle_dask_gateway.tinker.wire.base import Asked, Id, RunSeq
from twinkle_dask_gateway.tinker.wire.values import ModelInput, TensorData

_MAX_NAMED = 64


def _few(value: Any) -> Any:
    # Before they are looked at one by one.
    if isinstance(value, dict) and len(cast(dict[str, Any], value)) > _MAX_NAMED:
        raise ValueError(f"it may have {_MAX_NAMED} fields")
    return cast(Any, value)


_Few = (BeforeValidator(_few), Field(json_schema_extra={"maxProperties": _MAX_NAMED}))


class Datum(Asked):
    """One row of a batch. Provenance spans come with protobuf only."""

    model_input: ModelInput
    loss_fn_inputs: Annotated[dict[str, TensorData], *_Few]


class ForwardBackwardInput(Asked):
    """A batch and its loss."""

    data: list[Datum]
    loss_fn: Annotated[str, Field(json_schema_extra={"enum": [*LossName]})]
    loss_fn_config: Annotated[dict[str, float | str], *_Few] | None = None

    @field_validator("data", mode="before")
    @classmethod
    def _not_too_many(cls, data: Any, info: ValidationInfo) -> Any:
        # Before the data are looked at one by one.
        max_data = cast(dict[str, int | None], info.context or {}).get("max_data")
        if max_data is not None and isinstance(data, list):
            check_num_data(len(cast(list[Any], data)), max_data)
        return cast(Any, data)


class ForwardBackward(Asked):
    """``POST forward_backward``."""

    model_id: Id
    seq_id: RunSeq | None = None
    batch: ForwardBackwardInput = Field(alias="forward_backward_input")
    backward: ClassVar[bool] = True


class Forward(Asked):
    """``POST forward``."""

    model_id: Id
    seq_id: RunSeq | None = None
    batch: ForwardBackwardInput = Field(alias="forward_input")
    backward: ClassVar[bool] = False
