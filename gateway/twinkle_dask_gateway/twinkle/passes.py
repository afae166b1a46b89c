"""What a pass is asked for, and its inputs as rows of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.operations.adapter_batches import AdapterBatch
from twinkle_dask.operations.adapter_settings import accumulation_of
from twinkle_dask.operations.adapters import Adapter
from twinkle_dask.operations.service import Service
from twinkle_dask.operations.values import ServedModel, Tenant
from twinkle_dask.types import Json
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.reading import aside
from twinkle_dask_gateway.twinkle.features import Row, elements, is_trajectory, rows_of

_TASKS: Final = ("causal_lm", "embedding")


@dataclass(frozen=True, slots=True, kw_only=True)
class PassArguments:
    """What stands beside the inputs of a pass.

    Attributes:
        loss: What is left for the loss and the metrics.
        accumulation: None if the call does not say.
    """

    loss: Json
    embeds: bool = False
    temperature: float = 1.0
    use_adapter: bool = True
    want_logits: bool = False
    accumulation: int | None = None

    @classmethod
    def of(
        cls, extra: Mapping[str, Any] | None, *, gradient: bool = False, may_disable: bool = False
    ) -> Self:
        """Read them.

        Raises:
            InvalidRequest: One has a value that it cannot have.
            NotSupported: One is known and not here.
        """
        left = dict(extra or {})
        task = left.pop("task", None) or "causal_lm"
        if task == "fused_lm_ce":
            raise NotSupported(
                "task='fused_lm_ce' names a GPU kernel; leave it out: logits are made in chunks "
                "here whatever the loss."
            )
        if task not in _TASKS:
            raise InvalidRequest(f"task must be {' or '.join(_TASKS)}, not {str(task)[:60]!r}.")
        if left.pop("router_replay_action", None) is not None:
            raise NotSupported("router_replay_action is not offered; experts are chosen anew.")
        left.pop("router_replay_manual_cleanup", None)
        disable = _flag(left, "disable_lora")
        if disable and not may_disable:
            raise InvalidRequest("disable_lora is for forward_only; the base model is not trained.")
        want_logits = _flag(left, "return_logits")
        if want_logits and gradient:
            raise NotSupported("return_logits is for forward_only and forward.")
        if want_logits and task == "embedding":
            raise InvalidRequest("An embedding has no logits; leave return_logits out.")
        accumulation = left.pop("gradient_accumulation_steps", None)
        return cls(
            loss=left,
            embeds=task == "embedding",
            temperature=_temperature(left.pop("temperature", None)),
            use_adapter=not disable,
            want_logits=want_logits,
            accumulation=None if accumulation is None else accumulation_of(accumulation),
        )


def batch_of(rows: Sequence[Row], given: PassArguments) -> AdapterBatch:
    """Rows as a pass takes them.

    Raises:
        InvalidRequest: Some rows have labels and others none, or labels of the wrong kind.
    """
    labels: list[Any] = []
    for index, row in enumerate(rows):
        if given.embeds:
            if row.group is None and row.labels is not None:
                raise InvalidRequest(
                    f"Row {index} has a label for each token; with task='embedding' each row has "
                    "one: 1 for an anchor, 0 for what belongs to the anchor before."
                )
            if row.group is not None:
                labels.append(np.asarray([row.group], np.int64))
        elif row.labels is not None:
            labels.append(row.labels)
        elif row.group is not None:
            raise InvalidRequest(
                f"Row {index} has one label for {len(row.tokens)} tokens; there is one for each "
                "token, already shifted."
            )
    if labels and len(labels) != len(rows):
        raise InvalidRequest("Some rows have labels and others none.")
    return AdapterBatch(
        tokens=tuple(row.tokens for row in rows),
        labels=tuple(labels),
        embeds=given.embeds,
        temperature=given.temperature,
    )


async def encoded(
    service: Service,
    tenant: Tenant,
    model: ServedModel,
    adapter: Adapter,
    inputs: Any,
    num_bytes: int,
    config: GatewayConfig,
) -> list[Row]:
    """Inputs as rows: trajectories by the adapter's template, in their places among features.

    Raises:
        InvalidRequest: They are empty or not what their fields say, or no template is set.
    """
    listed = elements(inputs)
    if len(listed) > config.max_data:
        raise InvalidRequest(
            f"There are {len(listed)} inputs; send at most {config.max_data} at a time."
        )
    features = listed
    if places := [index for index, one in enumerate(listed) if is_trajectory(one)]:
        template = adapter.settings.template
        if template is None:
            raise InvalidRequest(
                f"inputs[{places[0]}] has no input_ids, so it is a trajectory; call set_template "
                "to say how messages are encoded."
            )
        spec = service.templates.spec(model.name, template.name, template.settings)
        made = await service.templates.encode(
            tenant, model.name, spec, [listed[index] for index in places]
        )
        if len(made) == len(places):
            features = list(listed)
            for index, feature in zip(places, made, strict=True):
                features[index] = feature
        elif len(places) == len(listed):
            features = made  # the template has split long ones, or left them out
        else:
            raise InvalidRequest(
                "A template that splits or deletes long trajectories makes another number of rows; "
                "send trajectories apart from features then."
            )
    return await aside(num_bytes, config, lambda: rows_of(features))


def _flag(arguments: Json, name: str) -> bool:
    value = arguments.pop(name, None)
    if not isinstance(value, bool | None):
        raise InvalidRequest(f"{name} must be true or false, not {str(value)[:60]!r}.")
    return bool(value)


def _temperature(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise InvalidRequest(f"temperature must be a number above 0, not {str(value)[:60]!r}.")
    return float(value)
