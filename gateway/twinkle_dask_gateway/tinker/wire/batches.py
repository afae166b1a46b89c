"""``forward_backward`` in JSON, as SDKs before 0.25 send it."""

from typing import Annotated, Any, ClassVar, cast

from pydantic import Field, ValidationInfo, field_validator

from twinkle_dask.types import LossName
from twinkle_dask_gateway.tinker.counting import check_num_data
from twinkle_dask_gateway.tinker.wire.base import Asked, Id, RunSeq
from twinkle_dask_gateway.tinker.wire.values import ModelInput, TensorData


class Datum(Asked):
    """Provenance spans are read by no loss here, but RL loops always attach them."""

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData]
    model_input_spans: Any = None
    loss_fn_input_spans: Any = None


class ForwardBackwardInput(Asked):
    """A batch and its loss."""

    data: list[Datum]
    loss_fn: Annotated[str, Field(json_schema_extra={"enum": [*LossName]})]
    loss_fn_config: dict[str, float | str] | None = None

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
