"""The closed tables: what is taken, what it becomes, and what is said of the rest."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask import packing
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.optimizers import (
    OPTIMIZERS,
    SCHEDULES,
    check_together,
    checked_step,
    clip_gradient,
    optimizer_spec,
    schedule_spec,
)
from twinkle_dask.types import ClipGradient, GradientStep, OptimizerSpec, SchedulerSpec


def test_defaults_are_filled_in_and_numbers_read_as_the_table_wants_them() -> None:
    spec = optimizer_spec("AdamW", {"lr": 1, "betas": [0, 0.5]})
    assert spec.settings == {
        "lr": 1.0,
        "betas": (0.0, 0.5),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "amsgrad": False,
        "maximize": False,
    }
    assert type(spec.settings["lr"]) is float
    schedule = schedule_spec("CosineAnnealingLR", {"T_max": 10.0})
    assert schedule.settings == {"T_max": 10, "eta_min": 0.0}
    assert type(schedule.settings["T_max"]) is int


@pytest.mark.parametrize("name", OPTIMIZERS.entries)
def test_every_optimizer_has_defaults_for_all(name: str) -> None:
    spec = optimizer_spec(name, {})
    assert spec.settings["lr"] == 1e-5  # Twinkle's, for every class
    assert spec.settings.get("weight_decay", 0.01) == 0.01
    assert optimizer_spec(name, spec.settings) == spec


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("Adamm", {}, "Unknown optimizer 'Adamm'.*Adam, AdamW"),
    ("LBFGS", {}, "'LBFGS' is not offered: it evaluates the loss several times"),
    ("SparseAdam", {}, "sparse gradients"),
    ("default", {}, "Megatron.*use 'AdamW'"),
    ("Adam", {"learning_rate": 1e-3}, "no setting 'learning_rate' here; it takes: lr, betas"),
    ("Adam", {"fused": True}, "the server chooses how torch computes"),
    ("Adam", {"lr": "fast"}, "'lr' of the optimizer 'Adam' must be a number of at least 0, not"),
    ("Adam", {"lr": -1}, "at least 0"),
    ("Adam", {"lr": math.nan}, "at least 0"),
    ("Adam", {"lr": math.inf}, "a finite number"),
    ("Adam", {"lr": 10**400}, "a finite number"),
    ("Adam", {"lr": True}, "at least 0"),
    ("Adam", {"lr": None}, "at least 0"),
    ("Adam", {"betas": [0.9]}, "a list of 2"),
    ("Adam", {"betas": [0.9, 1.0]}, "a list of 2 .*below 1"),
    ("Adam", {"betas": 0.9}, "a list of 2"),
    ("Adam", {"amsgrad": 1}, "true or false"),
    ("SGD", {"nesterov": True}, "nesterov of SGD needs a momentum"),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening of 0"),
    ("Rprop", {"step_sizes": [2, 1]}, "step_sizes"),
    ("Muon", {"adjust_lr_fn": "x"}, "'original' or 'match_rms_adamw'"),
    ("Muon", {"ns_steps": 1.5}, "a whole number"),
]


@pytest.mark.parametrize(("name", "settings", "said"), WRONG)
def test_what_an_optimizer_cannot_be(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        optimizer_spec(name, settings)


WRONG_SCHEDULES: list[tuple[str, dict[str, Any], str]] = [
    ("LambdaLR", {}, "it takes a function"),
    ("ReduceLROnPlateau", {}, "it goes by a metric"),
    ("SequentialLR", {}, "made of other schedulers"),
    ("default", {}, "CosineWarmupScheduler"),
    ("cosine", {}, "Unknown scheduler 'cosine'"),
    ("StepLR", {}, "needs the setting 'step_size'"),
    ("StepLR", {"step_size": 0}, "at least 1"),
    ("StepLR", {"step_size": 2, "last_epoch": 3}, "the server counts its steps"),
    ("MultiStepLR", {"milestones": []}, "a list of 1 to 1000"),
    ("MultiStepLR", {"milestones": [1.5]}, "a list of 1 to 1000"),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 1, "scale_fn": "x"}, "functions cannot be sent"),
    ("CyclicLR", {"base_lr": 0.1, "max_lr": 1, "mode": "x"}, "'triangular' or"),
    ("OneCycleLR", {"max_lr": 1}, "needs total_steps, or"),
    ("ConstantLR", {"factor": 0}, "above 0"),
]


@pytest.mark.parametrize(("name", "settings", "said"), WRONG_SCHEDULES)
def test_what_a_schedule_cannot_be(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        schedule_spec(name, settings)


def test_momentum_is_cycled_only_where_there_is_some() -> None:
    schedule = schedule_spec("OneCycleLR", {"max_lr": 1, "total_steps": 5})
    check_together(optimizer_spec("SGD", {}), schedule)
    check_together(optimizer_spec("Adam", {}), schedule)
    with pytest.raises(InvalidRequest, match="cycle_momentum to false"):
        check_together(optimizer_spec("Adagrad", {}), schedule)
    still = schedule_spec("OneCycleLR", {**schedule.settings, "cycle_momentum": False})
    check_together(optimizer_spec("Adagrad", {}), still)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(data=st.data())
def test_whatever_is_sent_is_taken_or_refused_and_what_is_taken_travels(
    data: st.DataObject,
) -> None:
    for table, read in ((OPTIMIZERS, optimizer_spec), (SCHEDULES, schedule_spec)):
        name = data.draw(st.sampled_from(list(table.entries)))
        keys = st.sampled_from(list(table.entries[name]))
        settings = data.draw(st.dictionaries(keys, anything, max_size=3))
        try:
            spec = read(name, settings)
        except InvalidRequest:
            continue
        assert packing.unpack(packing.pack(spec)) == spec
        assert read(name, spec.settings) == spec


def test_clipping_takes_numbers_above_zero_and_infinity() -> None:
    assert clip_gradient(1, "inf") == ClipGradient(max_norm=1.0, norm_type=math.inf)
    assert clip_gradient("inf") == ClipGradient(max_norm=math.inf)
    for wrong in (0, -1, 10**400, math.nan, None, "1", True, [1]):
        with pytest.raises(InvalidRequest, match="largest gradient norm"):
            clip_gradient(wrong)
        with pytest.raises(InvalidRequest, match="norm's type"):
            clip_gradient(1.0, wrong)


def test_a_step_is_checked_as_a_whole() -> None:
    step = checked_step(
        GradientStep(
            clip=ClipGradient(max_norm=1),
            optimizer=OptimizerSpec(name="SGD", settings={"lr": 1}),
            schedule=SchedulerSpec(name="LinearLR"),
            advance=True,
        )
    )
    assert step.step is None
    assert step.optimizer == optimizer_spec("SGD", {"lr": 1})
    assert checked_step(step) == step
    assert packing.unpack(packing.pack(step)) == step
    for wrong in (0, 1.5, True):
        with pytest.raises(InvalidRequest, match="gradient_accumulation_steps"):
            checked_step(GradientStep(accumulation=wrong))  # pyright: ignore[reportArgumentType]
    cycle = SchedulerSpec(name="OneCycleLR", settings={"max_lr": 1, "total_steps": 3})
    with pytest.raises(InvalidRequest, match="cycle_momentum"):
        checked_step(GradientStep(step=OptimizerSpec(name="Rprop"), schedule=cycle))
