"""Learning rates by the schedule: what torch's own scheduler objects say, step after step.

A schedule is a function of the optimizer's settings and the number of steps it has made. Most of
torch's go from one value to the next, so a new object is replayed from its beginning: then a run
that was set up again has the same rates as one that never stopped, bit for bit. The values that
were found are kept, since runs come and go between steps (a step of a schedule takes 4 us).
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import cos, isfinite, pi
from typing import Any, Final

import torch
from torch.optim import lr_scheduler

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.trainer.stepping import CLASSES
from twinkle_dask.types import OptimizerSpec, SchedulerSpec

_KEPT: Final = 256

_TORCHS: Final[Mapping[str, type[Any]]] = {
    "LinearLR": lr_scheduler.LinearLR,
    "ConstantLR": lr_scheduler.ConstantLR,
    "StepLR": lr_scheduler.StepLR,
    "MultiStepLR": lr_scheduler.MultiStepLR,
    "ExponentialLR": lr_scheduler.ExponentialLR,
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": lr_scheduler.CosineAnnealingLR,
    "CosineAnnealingWarmRestarts": lr_scheduler.CosineAnnealingWarmRestarts,
    "CyclicLR": lr_scheduler.CyclicLR,
    "OneCycleLR": lr_scheduler.OneCycleLR,
}


class Schedules:
    """Settings of optimizers under schedules. Used by one thread."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Schedule] = OrderedDict()

    def settings_at(
        self, optimizer: OptimizerSpec, schedule: SchedulerSpec | None, steps: int
    ) -> dict[str, Any]:
        """An optimizer's settings after so many steps of its schedule, at least 0.

        Raises:
            InvalidRequest: The schedule has no such step, or no finite rate there.
        """
        if schedule is None:
            return dict(optimizer.settings)
        key = f"{optimizer.name} {sorted(optimizer.settings.items())} {schedule.name} "
        key += repr(sorted(schedule.settings.items()))
        if key not in self._known:
            self._known[key] = _Schedule(optimizer, schedule)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key].settings_at(steps)


class _Schedule:
    """One schedule from its beginning to as far as somebody has asked."""

    def __init__(self, optimizer: OptimizerSpec, schedule: SchedulerSpec) -> None:
        self._optimizer = optimizer
        self._schedule = schedule
        self._rates = array("d")
        self._momenta = array("d")
        self._torchs: Any = None
        self._last_word: str | None = None

    def settings_at(self, steps: int) -> dict[str, Any]:
        while len(self._rates) <= steps:
            self._move_on()
        settings = dict(self._optimizer.settings)
        settings["lr"] = self._rates[steps]
        if not isfinite(settings["lr"]):
            raise InvalidRequest(
                f"After {steps} steps {self._schedule.name} gives a learning rate that is not "
                "finite. Nothing was done; choose other settings for it."
            )
        if "betas" in settings:
            settings["betas"] = (self._momenta[steps], *settings["betas"][1:])
        elif "momentum" in settings:
            settings["momentum"] = self._momenta[steps]
        return settings

    def _move_on(self) -> None:
        name = self._schedule.name
        if self._last_word is None:
            try:
                self._step()
            except (ValueError, ArithmeticError) as error:  # torch's words for what cannot be
                self._last_word = str(error)
        if self._last_word is not None:
            raise InvalidRequest(
                f"{name} has no step {len(self._rates)}: {self._last_word}. Nothing was done; set "
                "another scheduler."
            )

    def _step(self) -> None:
        if self._torchs is None:
            weight = torch.zeros(1, 1)
            settings = dict(self._optimizer.settings)
            optimizer: Any = CLASSES[self._optimizer.name]([weight], **settings)
            self._torchs = _scheduler(self._schedule, optimizer)
            optimizer.step()  # without gradient; torch warns of schedules that come before it
        else:
            self._torchs.step()
        group = self._torchs.optimizer.param_groups[0]
        momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
        self._momenta.append(float(momentum))
        self._rates.append(float(group["lr"]))


def _scheduler(schedule: SchedulerSpec, optimizer: Any) -> Any:
    settings = schedule.settings
    factor: Callable[[int], float]
    match schedule.name:
        case "CosineWarmupScheduler":
            warm, total = int(settings["num_warmup_steps"]), int(settings["num_training_steps"])
            factor = cosine_after_warm_up(warm, total, float(settings["num_cycles"]))
        case "LinearWarmupScheduler":
            warm, total = int(settings["num_warmup_steps"]), int(settings["num_training_steps"])
            factor = linear_after_warm_up(warm, total)
        case name:
            return _TORCHS[name](optimizer, **settings)
    return lr_scheduler.LambdaLR(optimizer, factor)


def cosine_after_warm_up(warm: int, total: int, num_cycles: float) -> Callable[[int], float]:
    """From 0 up to 1 in ``warm`` steps, then down along cosines, 0 at ``total`` by half a cycle.

    As transformers' ``get_cosine_schedule_with_warmup`` and Twinkle's ``CosineWarmupScheduler``.
    """

    def factor(step: int) -> float:
        if step < warm:
            return step / max(1, warm)
        progress = (step - warm) / max(1, total - warm)
        return max(0.0, 0.5 * (1.0 + cos(pi * num_cycles * 2.0 * progress)))

    return factor


def linear_after_warm_up(warm: int, total: int) -> Callable[[int], float]:
    """From 0 up to 1 in ``warm`` steps, then straight down to 0 at ``total``."""

    def factor(step: int) -> float:
        if step < warm:
            return step / max(1, warm)
        return max(0.0, (total - step) / max(1, total - warm))

    return factor
