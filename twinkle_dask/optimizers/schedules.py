"""The learning rate schedules: torch's that need neither a function nor a metric, and Twinkle's."""

from collections.abc import Mapping
from typing import Any, Final

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.optimizers.settings import Choice, Flag, Many, Number, Setting, Table
from twinkle_dask.types import OptimizerSpec, SchedulerSpec

_THIRD: Final = 1.0 / 3
_FACTOR: Final = Number(_THIRD, 0.0, 1.0, above=True)
_GAMMA: Final = Number(0.1)


def _count(default: int | None = None, low: int = 1) -> Number:
    """A required number of steps, or one with a default."""
    return Number(low=low, whole=True) if default is None else Number(default, low, whole=True)


def _optional_count() -> Number:
    return Number(None, 1, whole=True, optional=True)


def _momentum(default: float) -> Number:
    return Number(default, 0.0, 1.0, below=True)


_WARM_UP: Final = {"num_warmup_steps": _count(low=0), "num_training_steps": _count(low=0)}

_ENTRIES: Final[Mapping[str, Mapping[str, Setting]]] = {
    "LinearLR": {
        "start_factor": _FACTOR,
        "end_factor": Number(1.0, 0.0, 1.0),
        "total_iters": _count(5),
    },
    "ConstantLR": {"factor": _FACTOR, "total_iters": _count(5)},
    "StepLR": {"step_size": _count(), "gamma": _GAMMA},
    "MultiStepLR": {"milestones": Many(_count(low=0)), "gamma": _GAMMA},
    "ExponentialLR": {"gamma": Number()},
    "PolynomialLR": {"total_iters": _count(5), "power": Number(1.0)},
    "CosineAnnealingLR": {"T_max": _count(), "eta_min": Number(0.0)},
    "CosineAnnealingWarmRestarts": {
        "T_0": _count(),
        "T_mult": _count(1),
        "eta_min": Number(0.0),
    },
    "CyclicLR": {
        "base_lr": Number(),
        "max_lr": Number(),
        "step_size_up": _count(2000),
        "step_size_down": _optional_count(),
        "mode": Choice(("triangular", "triangular2", "exp_range"), "triangular"),
        "gamma": Number(1.0),
        "scale_mode": Choice(("cycle", "iterations"), "cycle"),
        "cycle_momentum": Flag(True),
        "base_momentum": _momentum(0.8),
        "max_momentum": _momentum(0.9),
    },
    "OneCycleLR": {
        "max_lr": Number(above=True),
        "total_steps": _optional_count(),
        "epochs": _optional_count(),
        "steps_per_epoch": _optional_count(),
        "pct_start": Number(0.3, 0.0, 1.0),
        "anneal_strategy": Choice(("cos", "linear"), "cos"),
        "cycle_momentum": Flag(True),
        "base_momentum": _momentum(0.85),
        "max_momentum": _momentum(0.95),
        "div_factor": Number(25.0, above=True),
        "final_div_factor": Number(1e4, above=True),
        "three_phase": Flag(False),
    },
    "CosineWarmupScheduler": {**_WARM_UP, "num_cycles": Number(0.5)},
    "LinearWarmupScheduler": _WARM_UP,
}

_FUNCTION: Final = "it takes a function, which cannot be sent."
_OTHERS: Final = "it is made of other schedulers, which cannot be sent."
_MEGATRON: Final = "it is Megatron's; 'CosineWarmupScheduler' does what it does by default."

SCHEDULES: Final = Table(
    what="scheduler",
    entries=_ENTRIES,
    refused={
        "LambdaLR": _FUNCTION,
        "MultiplicativeLR": _FUNCTION,
        "ReduceLROnPlateau": "it goes by a metric, and lr_step takes none; call set_optimizer with "
        "another lr instead.",
        "SequentialLR": _OTHERS,
        "ChainedScheduler": _OTHERS,
        "SWALR": "it belongs to averaged weights, which are not kept here.",
        "LRScheduler": "it is the base of the others.",
        "default": _MEGATRON,
        "OptimizerParamScheduler": _MEGATRON,
    },
    not_taken={
        "optimizer": "it follows the run's own",
        "last_epoch": "the server counts its steps",
        "scale_fn": "functions cannot be sent",
    },
)


def schedule_spec(name: str, settings: Mapping[str, object]) -> SchedulerSpec:
    """Look a schedule up by a tenant's words and fill in its defaults.

    Raises:
        InvalidRequest: Unknown class, unknown setting, or settings that make no sense.
    """
    values: dict[str, Any] = SCHEDULES.read(name, settings)
    if name == "OneCycleLR" and not (
        values["total_steps"] or (values["epochs"] and values["steps_per_epoch"])
    ):
        raise InvalidRequest("OneCycleLR needs total_steps, or epochs and steps_per_epoch.")
    return SchedulerSpec(name=name, settings=values)


def check_together(optimizer: OptimizerSpec, schedule: SchedulerSpec) -> None:
    """Refuse a schedule of momentum for an optimizer that has none.

    Raises:
        InvalidRequest: Says how to go without.
    """
    has_momentum = optimizer.settings.keys() & {"momentum", "betas"}
    if schedule.settings.get("cycle_momentum") and not has_momentum:
        raise InvalidRequest(
            f"{schedule.name} cycles the momentum, which {optimizer.name} does not have; set "
            "cycle_momentum to false."
        )
