"""Evaluating a custom loss on one datum, within bounds, and its slope by each logprob.

The graph was checked when it was created (``twinkle_dask.custom_losses``); what depends on shapes
and values is checked here, node by node, before anything is computed. The bound is work, counted
in numbers and not in seconds: a loss that was computed once is computed again by a replay, on
however busy a machine.

All of it happens on the processor, as in the client's own evaluation; an index out of bounds on a
GPU would end the process.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor

from twinkle_dask.custom_losses import Program, program_of
from twinkle_dask.custom_losses.program import Step
from twinkle_dask.trainer.custom_operators import (
    FUNCTIONS,
    MAX_PIECES,
    SLOW,
    WORK,
    Refused,
    extent,
    largest,
)
from twinkle_dask.types import CustomLoss

# What one node costs however small it is, in numbers of work.
_NODE: Final = 1024
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float64": torch.float64,
    "double": torch.float64,
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "long": torch.int64,
    "int32": torch.int32,
    "int": torch.int32,
    "bool": torch.bool,
}


class CustomLossFailed(Exception):
    """The loss has no usable value on this datum; the message is for the tenant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """A custom loss on one datum.

    Attributes:
        value: Finite.
        slope: Its derivative by each logprob, of their shape, finite; zeros without backward.
        metrics: By name; any number, as the tenant computes it.
    """

    value: float
    slope: Tensor
    metrics: Mapping[str, float]


def work_allowed(num_tokens: int, size: int) -> int:
    """How much work a loss may do on a datum.

    In proportion to its tokens, by which passes are cut and tenants take turns, so that many small
    data take no longer than a large one: 16,384 for each and 64 nodes' worth more, and 64 for each
    number that is given. Up to 2**25, or those 64 if they are more, but 2**27 at the very most,
    1 GiB in float64.

    Args:
        num_tokens: Of the datum.
        size: Numbers that the loss is given: logprobs and inputs.
    """
    most = min(max(2**25, 64 * size), 2**27)
    return min(64 * _NODE + 2**14 * num_tokens + 64 * size, most)


def evaluate(
    loss: CustomLoss, lp: Tensor, inputs: Mapping[str, Tensor], *, backward: bool
) -> Evaluated:
    """Evaluate a loss and its slope.

    Args:
        loss: Checked.
        lp: Logprobs of a datum's targets; float32, on the processor.
        inputs: The other inputs by name.
        backward: Whether the slope is wanted.

    Raises:
        CustomLossFailed: It cannot be computed, is too much work, or is not finite.
    """
    program = program_of(loss.graph)
    with torch.set_grad_enabled(backward):
        leaf = lp.detach().clone().requires_grad_(backward)
        given = [leaf, *(inputs[name] for name in program.inputs[1:])]
        values = _run(program, given)
        value = values[program.loss]
        if not isinstance(value, Tensor) or value.ndim != 0 or not value.is_floating_point():
            raise CustomLossFailed("it must return its loss as a tensor of one float, of no shape")
        number = float(value.detach())
        if not math.isfinite(number):
            raise CustomLossFailed(f"its value is {number}")
        slope = _slope(value, leaf) if backward else torch.zeros_like(leaf)
    metrics = {name: _metric(name, values[at]) for name, at in program.metrics.items()}
    return Evaluated(value=number, slope=slope, metrics=metrics)


def _run(program: Program, given: list[Tensor]) -> list[Any]:
    allowed = work_allowed(len(given[0]), sum(tensor.numel() for tensor in given))
    values: list[Any] = list(given)
    done = 0
    for step in program.steps:
        try:
            args = [_argument(arg, values) for arg in step.args]
            kwargs = {name: _argument(arg, values) for name, arg in step.kwargs.items()}
            work = max(largest(*args, **kwargs), _work(step, args, kwargs))
            done += _NODE + SLOW.get(step.operator, 1) * work
            if done > allowed:
                raise Refused(
                    f"the loss is more work than is allowed for a datum of this size ({allowed} "
                    "numbers over all nodes); make smaller intermediate tensors"
                )
            result = FUNCTIONS[step.operator](*args, **kwargs)
            _check(result, allowed)
        except Exception as error:  # whatever torch raises, it is about the tenant's graph
            raise CustomLossFailed(f"node {step.label}: {_first_line(error)}") from error
        values.append(result)
    return values


def _work(step: Step, args: list[Any], kwargs: dict[str, Any]) -> int:
    work = WORK.get(step.operator)
    return 0 if work is None else work(*args, **kwargs)


def _argument(arg: Any, values: list[Any]) -> Any:
    match arg:
        case {"value": int()}:
            return values[arg["value"]]
        case {"tuple": list()}:
            return tuple(_argument(item, values) for item in cast(list[Any], arg["tuple"]))
        case {"slice": [start, stop, step]}:
            return slice(*(_argument(item, values) for item in (start, stop, step)))
        case {"ellipsis": _}:
            return Ellipsis
        case {"float": str()}:
            return float(arg["float"])
        case {"dtype": str()}:
            return _DTYPES[arg["dtype"]]
        case list():
            return [_argument(item, values) for item in cast(list[Any], arg)]
        case _:
            return arg


def _check(result: Any, allowed: int) -> None:
    """Only values that the operators are made for go on."""
    match result:
        case Tensor():
            if result.layout is not torch.strided or result.is_complex():
                raise Refused("its result is no tensor of real numbers")
            if extent(result.shape) > allowed:  # an empty one may have any shape
                raise Refused("its result has too large a shape")
        case bool() | float() | torch.dtype() | torch.device():
            pass
        case int():
            if not -(2**63) <= result < 2**63:
                raise Refused("an integer is not within 64 bits")
        case tuple() | list():
            items = cast(list[Any], result)
            if len(items) > MAX_PIECES:
                raise Refused(f"its result has more than {MAX_PIECES} parts")
            for item in items:
                _check(item, allowed)
        case _:
            raise Refused("its result is not of a kind that a loss can go on with")


def _slope(value: Tensor, leaf: Tensor) -> Tensor:
    if not value.requires_grad:
        raise CustomLossFailed("it has no gradient: nothing in it can be derived by logprobs")
    try:
        (slope,) = torch.autograd.grad(value, leaf)
    except Exception as error:
        raise CustomLossFailed(f"its gradient: {_first_line(error)}") from error
    bad = torch.nonzero(~torch.isfinite(slope).reshape(len(leaf), -1).all(-1))
    if len(bad):
        raise CustomLossFailed(f"its gradient by logprobs[{int(bad[0])}] is NaN or infinite")
    return slope


def _metric(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    if isinstance(value, int | float):
        return float(value)
    raise CustomLossFailed(f"metric {name!r} must be a single number")


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
