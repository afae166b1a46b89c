"""``GradientStep`` against plain torch: optimizers, clipping, accumulation, schedules, resuming."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.conftest import MakeDriver
from tests.trainer.driver import ADAM, Driver, batch, expect
from tests.trainer.stories import compare_states, exactly
from tests.trainer.test_numerics import near
from tests.trainer.test_residency import limited
from twinkle_dask.checkpoints import folders
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.base import BaseModel
from twinkle_dask.optimizers import OPTIMIZERS, checked_step
from twinkle_dask.trainer.stepping import CLASSES
from twinkle_dask.trainer.work import ExportState
from twinkle_dask.types import (
    ClipGradient,
    GradientStep,
    GradientStepResult,
    LoraSpec,
    OptimizerSpec,
    RunState,
    SchedulerSpec,
)

SPEC = LoraSpec(rank=4, seed=1)
ADAMW = OptimizerSpec(name="AdamW", settings={"lr": 1e-2})
ALL = GradientStep(clip=ClipGradient(max_norm=1.0), step=ADAMW, zero=True, advance=True)


def gradient_step(driver: Driver, step: GradientStep, run: str = "r") -> GradientStepResult:
    return expect(driver.do(run, checked_step(step)), GradientStepResult)


def backward(driver: Driver, seed: int, num_counted: float = 7.0, run: str = "r") -> None:
    body = replace(batch(np.random.default_rng(seed), (9, 4)), num_counted=num_counted)
    driver.forward_backward(run, body)


def weights_of(driver: Driver, run: str = "r") -> Mapping[str, np.ndarray[Any, Any]]:
    return driver.state(run).adapter.weights


def flat(arrays: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    return np.concatenate([array.ravel() for array in arrays.values()])


def started(make: MakeDriver) -> Driver:
    driver = make()
    driver.create("r", SPEC)
    backward(driver, 100)
    driver.step("r", ADAM)  # so that B is no longer zero
    return driver


OPTIMIZERS_TRIED: list[tuple[str, dict[str, Any]]] = [
    *((name, {"lr": 1e-3}) for name in OPTIMIZERS.entries),
    ("Adam", {"lr": 1e-3, "amsgrad": True, "betas": [0.8, 0.9], "maximize": True}),
    ("AdamW", {"lr": 1e-3, "amsgrad": True, "weight_decay": 0.3}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5}),
    ("RMSprop", {"lr": 1e-3, "momentum": 0.9, "centered": True}),
    ("NAdam", {"lr": 1e-3, "decoupled_weight_decay": True}),
    ("Muon", {"lr": 1e-2, "adjust_lr_fn": "match_rms_adamw"}),
    ("ASGD", {"lr": 1e-2, "t0": 2}),
]


@pytest.mark.parametrize(("name", "given_settings"), OPTIMIZERS_TRIED)
def test_each_optimizer_is_torchs(
    make: MakeDriver, name: str, given_settings: dict[str, Any]
) -> None:
    """Weights and memory of five steps, on the gradients that the run has before each of them."""
    driver = started(make)
    leaves = {n: torch.tensor(a, requires_grad=True) for n, a in weights_of(driver).items()}
    spec = OptimizerSpec(name=name, settings=given_settings)
    full = checked_step(GradientStep(step=spec)).step
    assert full is not None
    optimizer: Any = CLASSES[name](list(leaves.values()), **full.settings)
    for step in range(5):
        backward(driver, step)
        for weight, gradient in driver.gradients("r").items():
            leaves[weight].grad = torch.tensor(gradient)
        optimizer.step()
        done = gradient_step(driver, GradientStep(step=spec, zero=True))
        assert done == GradientStepResult(
            done=True, grad_norm=None, learning_rate=given_settings["lr"], steps=step + 1
        )
    state = driver.state("r")
    assert state.steps is not None
    assert state.steps.optimizer == name
    seen: set[str] = set()
    # Long vectors are rounded by other instructions than short ones, a unit in the last place a
    # step, and Rprop goes by signs of products of gradients near zero.
    for weight, leaf in leaves.items():
        near(state.adapter.weights[weight], leaf.detach(), rel=1e-5)
        for word, value in optimizer.state[leaf].items():
            if value is None:
                continue
            key = word if value.dim() == 0 else f"{weight}.{word}"
            near(state.steps.tensors[key], value, rel=1e-5)
            seen.add(key)
    assert seen == state.steps.tensors.keys()
    assert state.optimizer is not None
    assert state.optimizer.step == 0  # the moments of the step before are gone


def test_the_same_class_with_other_settings_goes_on_and_another_class_starts_anew(
    make: MakeDriver,
) -> None:
    driver = started(make)
    for lr in (1e-2, 1e-3):
        backward(driver, 1)
        spec = OptimizerSpec(name="Adam", settings={"lr": lr})
        gradient_step(driver, GradientStep(step=spec, zero=True))
    steps = driver.state("r").steps
    assert steps is not None
    assert steps.tensors["step"] == 2
    backward(driver, 1)
    done = gradient_step(driver, GradientStep(step=ADAMW, zero=True))
    steps = driver.state("r").steps
    assert steps is not None
    assert (steps.optimizer, steps.tensors["step"], done.steps) == ("AdamW", 1, 3)
    # So does what needs to remember more, and what is asked to.
    amsgrad = OptimizerSpec(name="AdamW", settings={"amsgrad": True})
    for step in (
        GradientStep(step=amsgrad, zero=True),
        GradientStep(step=amsgrad, zero=True, fresh_optimizer=True),
    ):
        backward(driver, 1)
        gradient_step(driver, step)
        steps = driver.state("r").steps
        assert steps is not None
        assert steps.tensors["step"] == 1


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, float("inf")])
@pytest.mark.parametrize("max_norm", [1e-3, 1e6, float("inf")])
def test_clipping_divides_by_what_was_counted_and_is_torchs(
    make: MakeDriver, norm_type: float, max_norm: float
) -> None:
    driver = started(make)
    backward(driver, 1, num_counted=5.0)
    backward(driver, 2, num_counted=8.0)
    before = {n: torch.tensor(a) / 13.0 for n, a in driver.gradients("r").items()}
    leaves: list[Any] = []
    for array in before.values():
        leaf = torch.zeros_like(array, requires_grad=True)
        leaf.grad = array
        leaves.append(leaf)
    expected = torch.nn.utils.clip_grad_norm_(leaves, max_norm, norm_type)
    clip = GradientStep(clip=ClipGradient(max_norm=max_norm, norm_type=norm_type))
    done = gradient_step(driver, clip)
    assert done.grad_norm == pytest.approx(float(expected), rel=1e-5)
    after = driver.gradients("r")
    for leaf, name in zip(leaves, before, strict=True):
        near(after[name], leaf.grad, rel=1e-5)
    # What was counted is spent: the second time nothing is divided.
    again = gradient_step(driver, clip)
    assert again.grad_norm is not None
    assert done.grad_norm is not None
    assert again.grad_norm == pytest.approx(min(done.grad_norm, max_norm), rel=1e-4)


def test_a_high_norm_is_nearly_the_highest(make: MakeDriver) -> None:
    """Torch's own is 0 or infinite here, since it sums powers as they are."""
    driver = started(make)
    backward(driver, 1)
    told: list[float | None] = []
    for norm_type in (1000.0, float("inf")):
        clip = ClipGradient(max_norm=float("inf"), norm_type=norm_type)
        told.append(gradient_step(driver, GradientStep(clip=clip)).grad_norm)
    assert told[0] == pytest.approx(told[1], rel=0.02)


def test_parts_one_by_one_are_the_whole(make: MakeDriver) -> None:
    """Clip, step, zero, advance: in one operation or in four, the same bits."""
    schedule = SchedulerSpec(name="StepLR", settings={"step_size": 1, "gamma": 0.5})
    whole, parts = started(make), started(make)
    for seed in range(3):
        for driver in (whole, parts):
            backward(driver, 2 * seed)
            backward(driver, 2 * seed + 1)
        told = gradient_step(whole, replace(ALL, schedule=schedule, accumulation=2))
        some = GradientStep(schedule=schedule, optimizer=ADAMW, accumulation=2)
        for part in (
            replace(some, clip=ALL.clip),
            replace(some, step=ADAMW),
            replace(some, zero=True),
            replace(some, advance=True),
        ):
            last = gradient_step(parts, part)
        assert told.learning_rate == last.learning_rate == 1e-2 * 0.5 ** (seed + 1)
        assert told.steps == last.steps == seed + 1
        same_steps(whole.state("r"), parts.state("r"))


def same_steps(actual: RunState, expected: RunState) -> None:
    """Bit for bit, what ``GradientStep`` goes by included."""
    compare_states(actual, expected, exactly)
    assert (actual.steps is None) == (expected.steps is None)
    if actual.steps is not None and expected.steps is not None:
        assert replace(actual.steps, tensors={}) == replace(expected.steps, tensors={})
        assert actual.steps.tensors.keys() == expected.steps.tensors.keys()
        for name, array in actual.steps.tensors.items():
            exactly(array, expected.steps.tensors[name])


def test_the_first_window_is_as_long_as_the_others(make: MakeDriver) -> None:
    """Twinkle's own server steps at 3, 5, 7 for two gradients a step; its users mean 2, 4, 6."""
    driver = make()
    driver.create("r", SPEC)
    at: list[int] = []
    assert not gradient_step(driver, replace(ALL, accumulation=2)).done
    for gradient in range(1, 8):
        backward(driver, gradient)
        before = flat(weights_of(driver))
        done = gradient_step(driver, replace(ALL, accumulation=2))
        assert done.done == (not np.array_equal(flat(weights_of(driver)), before))
        assert (done.grad_norm is not None) == done.done
        at += [gradient] if done.done else []
    assert at == [2, 4, 6]


def test_a_boundary_lasts_until_the_next_gradient(make: MakeDriver) -> None:
    driver = started(make)
    zero = GradientStep(zero=True, accumulation=2)
    for gradient in range(3):  # nobody asked at the second
        backward(driver, gradient)
    assert gradient_step(driver, zero).done
    assert gradient_step(driver, zero).done
    backward(driver, 3)
    assert not gradient_step(driver, zero).done
    assert gradient_step(driver, replace(zero, accumulation=1)).done
    backward(driver, 4)
    assert not gradient_step(driver, zero).done


def test_zero_without_clip_forgets_what_was_counted(make: MakeDriver) -> None:
    """Twinkle's own server keeps the count, so the next norm is half of what it should be."""
    driver = started(make)
    clip = GradientStep(clip=ClipGradient(max_norm=1.0))
    norms: list[float | None] = []
    for _ in range(2):
        backward(driver, 1)
        norms.append(gradient_step(driver, clip).grad_norm)
        gradient_step(driver, GradientStep(zero=True))
        backward(driver, 2)
        gradient_step(driver, GradientStep(zero=True))
    assert norms[0] == norms[1]
    assert norms[0]


def test_without_a_gradient_a_step_changes_nothing(make: MakeDriver) -> None:
    driver = started(make)
    before = driver.state("r")
    schedule = SchedulerSpec(name="ExponentialLR", settings={"gamma": 0.5})
    done = gradient_step(driver, replace(ALL, schedule=schedule))
    assert (done.done, done.grad_norm, done.steps) == (True, 0.0, 0)
    assert done.learning_rate == 0.5e-2  # the schedule moves, as torch's
    compare_states(driver.state("r"), before, exactly)


@pytest.mark.parametrize("step", [GradientStep(clip=ALL.clip), GradientStep(step=ADAMW)])
def test_a_gradient_that_overflowed_is_dropped(make: MakeDriver, step: GradientStep) -> None:
    driver = started(make)
    before = driver.state("r")
    huge = {n: np.full_like(a, 3e38) for n, a in before.adapter.weights.items()}
    driver.load("r", replace(before, gradients=huge))
    with pytest.raises(InvalidRequest, match="not finite"):
        gradient_step(driver, step)
    compare_states(driver.state("r"), before, exactly)
    assert gradient_step(driver, step).done


def test_optim_step_and_gradient_step_take_each_others_place(make: MakeDriver) -> None:
    """Each starts with fresh memory after the other, and unspent gradients are anybody's."""
    driver = started(make)
    backward(driver, 1)
    gradient_step(driver, replace(ALL, zero=False))
    driver.step("r", ADAM)
    state = driver.state("r")
    assert state.optimizer is not None
    assert state.optimizer.step == 1
    assert state.steps is not None
    assert (state.steps.optimizer, state.steps.gradients, state.steps.steps) == (None, 0, 1)
    backward(driver, 1)
    gradient_step(driver, ALL)
    state = driver.state("r")
    assert state.optimizer is not None
    assert (state.optimizer.step, dict(state.optimizer.exp_avg)) == (0, {})


def test_a_checkpoint_holds_no_gradient_and_no_count_of_one(make: MakeDriver) -> None:
    driver = started(make)
    backward(driver, 1)
    gradient_step(driver, ALL)
    backward(driver, 2)
    saved = expect(driver.do("r", ExportState(gradients=False, optimizer=True)), RunState)
    assert saved.steps is not None
    assert (saved.steps.gradients, saved.steps.gradient_tokens, saved.steps.steps) == (0, 0.0, 1)
    weights = expect(driver.do("r", ExportState(gradients=False, optimizer=False)), RunState)
    assert weights.steps is None
    driver.load("r", saved, with_optimizer=False)
    assert driver.state("r").steps is None


class Files:
    """Files by path, for ``folders``."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def put_folder(
        self,
        path: str,
        files: Mapping[str, bytes],
        *,
        overwrite: bool = False,
        marker: str = "state.json",
    ) -> None:
        self.files |= {f"{path}/{name}": data for name, data in files.items()}

    def get(self, path: str) -> bytes:
        return self.files[path]


def through_files(state: RunState) -> RunState:
    files = Files()
    folders.write_state(files, "a", state, base_model="m")
    return folders.read_state(files, "a")


ACTS = st.sampled_from(
    ["backward", "backward", "whole", "clip", "step", "zero", "advance", "optim"]
)
SCHEDULE = SchedulerSpec(name="CosineAnnealingLR", settings={"T_max": 4})


@settings(deadline=None, max_examples=25)
@given(
    optimizer=st.sampled_from(OPTIMIZERS_TRIED),
    acts=st.lists(ACTS, min_size=4, max_size=12),
    stops=st.sets(st.integers(0, 11), min_size=1, max_size=4),
    accumulation=st.integers(1, 2),
)
def test_stopping_anywhere_does_not_show(
    make: MakeDriver,
    optimizer: tuple[str, dict[str, Any]],
    acts: list[str],
    stops: set[int],
    accumulation: int,
) -> None:
    """Bit for bit, through the files of a snapshot, to a trainer that knows nothing."""
    spec = OptimizerSpec(name=optimizer[0], settings=optimizer[1])
    some = GradientStep(schedule=SCHEDULE, optimizer=spec, accumulation=accumulation)
    body = {
        "whole": replace(some, clip=ALL.clip, step=spec, zero=True, advance=True),
        "clip": replace(some, clip=ALL.clip),
        "step": replace(some, step=spec),
        "zero": replace(some, zero=True),
        "advance": replace(some, advance=True),
    }

    def play(driver: Driver, *, stopping: bool) -> tuple[list[Any], RunState]:
        told: list[Any] = []
        for place, act in enumerate(acts):
            if act == "backward":
                backward(driver, place)
            elif act == "optim":
                told.append(driver.step("r", ADAM))
            else:
                told.append(gradient_step(driver, body[act]))
            if stopping and place in stops:
                state = through_files(driver.state("r"))
                driver = make()
                driver.load("r", state)
        return told, driver.state("r")

    told, state = play(started(make), stopping=False)
    told_again, state_again = play(started(make), stopping=True)
    assert told == told_again
    same_steps(state_again, state)


def test_memory_leaves_and_comes_back_with_its_run(
    make: MakeDriver, base: BaseModel, tmp_path: Path
) -> None:
    """Three runs in the room of one and a half, with an optimizer that remembers three numbers."""
    spec = OptimizerSpec(name="RMSprop", settings={"lr": 1e-3, "momentum": 0.9, "centered": True})
    step = replace(ALL, step=spec)
    small = LoraSpec(rank=2, seed=1)

    def play(driver: Driver) -> list[RunState]:
        for run in "abc":
            driver.create(run, small)
        for seed in range(3):
            for run in "abc":
                backward(driver, seed, run=run)
                gradient_step(driver, step, run)
        return [driver.state(run) for run in "abc"]

    expected = play(make())
    with limited(base, tmp_path / "runs", 1.5) as driver:
        for actual, wanted in zip(play(driver), expected, strict=True):
            same_steps(actual, wanted)
