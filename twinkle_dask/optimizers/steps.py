"""Checks of a ``GradientStep`` as a whole."""

from dataclasses import replace
from typing import Final, cast

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.optimizers.schedules import check_together, schedule_spec
from twinkle_dask.optimizers.table import optimizer_spec
from twinkle_dask.types import ClipGradient, GradientStep

_LARGEST: Final = 2.0**100  # what is compared with it is a float32 number


def clip_gradient(max_norm: object, norm_type: object = 2.0) -> ClipGradient:
    """Read what a tenant says of clipping; ``"inf"`` is infinity, which JSON has no word for.

    Raises:
        InvalidRequest: The first is no number above 0, or the second none of at least 1.
    """
    return ClipGradient(
        max_norm=_positive("The largest gradient norm", max_norm, "above 0"),
        norm_type=_positive("The norm's type", norm_type, "of at least 1", 1.0),
    )


def _positive(what: str, value: object, wanted: str, least: float = 0.0) -> float:
    number = float("inf") if value == "inf" else value
    if (
        isinstance(number, bool)
        or not isinstance(number, int | float)
        or not number > 0
        or number < least
        or _LARGEST < number < float("inf")
    ):
        raise InvalidRequest(
            f"{what} must be a number {wanted} or 'inf', not {str(value)[:60]}. A largest norm of "
            "'inf' clips nothing."
        )
    return float(number)


def checked_step(step: GradientStep) -> GradientStep:
    """The step with all settings filled in.

    Raises:
        InvalidRequest: Part of it is wrong.
    """
    accumulation = cast(object, step.accumulation)
    if isinstance(accumulation, bool) or not isinstance(accumulation, int) or accumulation < 1:
        raise InvalidRequest(
            f"gradient_accumulation_steps must be a whole number of at least 1, not {accumulation}."
        )
    given = step.step or step.optimizer
    optimizer = None if given is None else optimizer_spec(given.name, given.settings)
    schedule = step.schedule
    if schedule is not None:
        schedule = schedule_spec(schedule.name, schedule.settings)
        if optimizer is not None:
            check_together(optimizer, schedule)
    clip = step.clip
    if clip is not None:
        clip = clip_gradient(clip.max_norm, clip.norm_type)
    return replace(
        step,
        clip=clip,
        step=None if step.step is None else optimizer,
        optimizer=optimizer,
        schedule=schedule,
    )
