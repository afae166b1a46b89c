"""Schedules against torch's own objects, and those of a warm-up against their closed forms."""

import math
from typing import Any

import pytest
import torch

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.optimizers import OPTIMIZERS, SCHEDULES, optimizer_spec, schedule_spec
from twinkle_dask.trainer.schedules import Schedules
from twinkle_dask.trainer.stepping import CLASSES
from twinkle_dask.types import OptimizerSpec, SchedulerSpec

TRIED: list[tuple[str, dict[str, Any]]] = [
    ("LinearLR", {}),
    ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 20}),
    ("ConstantLR", {"factor": 0.5, "total_iters": 3}),
    ("StepLR", {"step_size": 3}),
    ("MultiStepLR", {"milestones": [2, 2, 9], "gamma": 0.3}),
    ("ExponentialLR", {"gamma": 0.97}),
    ("PolynomialLR", {"total_iters": 20, "power": 2}),
    ("CosineAnnealingLR", {"T_max": 7, "eta_min": 1e-5}),
    ("CosineAnnealingWarmRestarts", {"T_0": 4, "T_mult": 2}),
    ("CyclicLR", {"base_lr": 1e-4, "max_lr": 1e-2, "step_size_up": 4, "mode": "triangular2"}),
    ("CyclicLR", {"base_lr": 1e-4, "max_lr": 1e-2, "step_size_up": 4, "cycle_momentum": False}),
    ("OneCycleLR", {"max_lr": 0.1, "total_steps": 40}),
    ("OneCycleLR", {"max_lr": 0.1, "epochs": 4, "steps_per_epoch": 10, "three_phase": True}),
]

ADAM = optimizer_spec("Adam", {"lr": 3e-3})
SGD = optimizer_spec("SGD", {"lr": 3e-3, "momentum": 0.9})


@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["betas", "momentum"])
@pytest.mark.parametrize(("name", "settings"), TRIED)
def test_each_schedule_is_torchs(
    optimizer: OptimizerSpec, name: str, settings: dict[str, Any]
) -> None:
    """Rates and momenta of 30 steps, bit for bit; also where somebody asks anew, or goes back."""
    plain: Any = CLASSES[optimizer.name]([torch.zeros(1, requires_grad=True)], **optimizer.settings)
    theirs: Any = getattr(torch.optim.lr_scheduler, name)(plain, **settings)
    ours, schedule = Schedules(), schedule_spec(name, settings)
    seen: list[dict[str, Any]] = []
    for step in range(30):
        now = ours.settings_at(optimizer, schedule, step)
        seen.append(now)
        group = plain.param_groups[0]
        assert now == {key: group[key] for key in optimizer.settings}
        plain.step()
        theirs.step()
    assert seen[11] == ours.settings_at(optimizer, schedule, 11)
    assert seen[29] == Schedules().settings_at(optimizer, schedule, 29)
    assert seen[0] != seen[1] or name in {"StepLR", "MultiStepLR", "ConstantLR"}


def rates(name: str, **settings: Any) -> list[float]:
    schedules = Schedules()
    schedule = SchedulerSpec(name=name, settings=schedule_spec(name, settings).settings)
    optimizer = optimizer_spec("AdamW", {"lr": 2.0})
    return [schedules.settings_at(optimizer, schedule, step)["lr"] for step in range(12)]


def test_warm_up_then_a_cosine() -> None:
    found = rates("CosineWarmupScheduler", num_warmup_steps=4, num_training_steps=10)
    assert found[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert found[4:] == pytest.approx([1.0 + math.cos(math.pi * step / 6) for step in range(8)])


def test_warm_up_then_a_line() -> None:
    found = rates("LinearWarmupScheduler", num_warmup_steps=2, num_training_steps=10)
    assert found == pytest.approx([0, 1, 2, *[2 * (10 - step) / 8 for step in range(3, 11)], 0])


def test_without_warm_up() -> None:
    assert rates("LinearWarmupScheduler", num_warmup_steps=0, num_training_steps=0)[:2] == [0, 0]
    assert rates("CosineWarmupScheduler", num_warmup_steps=0, num_training_steps=3)[0] == 2.0


def test_a_schedule_that_is_over_says_so_each_time() -> None:
    schedule = schedule_spec("OneCycleLR", {"max_lr": 0.1, "total_steps": 3})
    schedules = Schedules()
    for _ in range(2):
        assert schedules.settings_at(ADAM, schedule, 3)["lr"] > 0
        with pytest.raises(InvalidRequest, match="OneCycleLR has no step 4"):
            schedules.settings_at(ADAM, schedule, 4)


def test_a_rate_that_is_not_finite_is_refused() -> None:
    schedule = schedule_spec("ExponentialLR", {"gamma": 1e15})
    with pytest.raises(InvalidRequest, match="not finite"):
        Schedules().settings_at(ADAM, schedule, 30)


def test_every_optimizer_and_schedule_of_the_tables_is_there() -> None:
    assert OPTIMIZERS.entries.keys() == CLASSES.keys()
    needed: dict[str, dict[str, Any]] = dict(TRIED)
    warm_up = {"num_warmup_steps": 1, "num_training_steps": 2}
    for name in SCHEDULES.entries:
        schedule = schedule_spec(name, needed.get(name, warm_up))
        for optimizer in (ADAM, SGD):
            assert Schedules().settings_at(optimizer, schedule, 1)["lr"] >= 0
