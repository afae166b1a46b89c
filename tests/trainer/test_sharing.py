"""Nothing about sharing shows in anybody's numbers: a run among others against the run alone.

A pass does, for each run, the sums that it would do without the others, over the same terms: the
rows of a matrix product do not see one another, attention stays within a row, and a gradient is a
product over the run's own positions. Whether the sums are also done in the same *order* is up to
the matrix library. MKL on one thread in float32 adds over the inner dimension in one order for any
number of rows, except that it takes other kernels for few rows: measured here (AVX-512, inner
dimensions 64 to 1536), row i of X @ W.T is the same bits for any X of at least 16 rows, and
different ones for 1 to 15 rows in some shapes. So gradients can be equal bit for bit if each run
brings 16 positions, and if all its rows are in one pass in both cases.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.conftest import MakeDriver
from tests.trainer.driver import ADAM, Driver, batch, expect
from tests.trainer.stories import (
    Act,
    Load,
    Save,
    Story,
    Teller,
    alone,
    compare,
    compare_states,
    exactly,
    moved_state,
)
from tests.trainer.test_numerics import near
from twinkle_dask.losses import LOSSES
from twinkle_dask.types import (
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    LossName,
    OptimStep,
    RunState,
)

ONE_PASS = {"pass_tokens": 10**9, "head_chunk_bytes": 2**30, "head_block_bytes": 2**30}

# eps is far above the noise of a gradient: with the usual 1e-8 Adam would make a full step of an
# entry whose gradient is nothing but rounding.
STEADY = replace(ADAM, eps=1e-3)

few_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@st.composite
def specs(draw: st.DrawFn) -> LoraSpec:
    attn, mlp, unembed = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    return LoraSpec(
        rank=draw(st.sampled_from([1, 2, 3, 8, 16])),
        seed=draw(st.integers(0, 99)),
        alpha=draw(st.sampled_from([4.0, 16.0])),
        train_attn=attn,
        train_mlp=mlp,
        train_unembed=unembed,
    )


@st.composite
def batches(draw: st.DrawFn) -> ForwardBackward:
    loss = draw(st.sampled_from(list(LOSSES)))
    return batch(
        np.random.default_rng(draw(st.integers(0, 99))),
        draw(few_lengths),
        loss,
        draw(st.sampled_from([None, 3])) if LOSSES[loss].many_targets else None,
        backward=draw(st.sampled_from([True, True, False])),
    )


acts: st.SearchStrategy[Act] = st.one_of(
    batches(),
    batches(),
    st.just(OptimStep(adam=STEADY)),
    st.just(OptimStep(adam=replace(STEADY, weight_decay=0.1, grad_clip_norm=0.5))),
    st.just(Save()),
    st.builds(Load, st.booleans()),
)
stories = st.builds(
    Story,
    specs(),
    st.sampled_from(["x", "y", "z"]),
    st.lists(acts, min_size=2, max_size=8).map(tuple),
)


def together(driver: Driver, told: list[Story], order: list[int]) -> list[Teller]:
    """All stories in one trainer: ``order`` says whose next act is submitted, or to step."""
    tellers = [Teller(driver, f"run{number}", story) for number, story in enumerate(told)]
    for turn in order:
        if turn < len(tellers):
            tellers[turn].go_on()
        else:
            driver.take()
    for teller in tellers:
        while teller.go_on():
            pass
    driver.drain()
    return tellers


def close(actual: Float32Array, expected: Float32Array) -> None:
    """The same float32 sums in another order, through at most a few steps.

    A sum's rounding is worth some 1e-7 of its terms, and ``STEADY`` lets a step multiply what is
    wrong with a gradient by no more than lr / eps = 10. Measured over 300 examples: 4e-7 of a
    vector's norm. A metric may be a sum of 120 terms of order 10 that cancel, hence 1e-4 of 1.
    """
    least = 1e-4 if actual.ndim == 0 else 1e-8
    assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected) + least


@settings(deadline=None, max_examples=40)
@given(
    told=st.lists(stories, min_size=2, max_size=4),
    order=st.lists(st.integers(0, 5), max_size=30),
    budget=st.sampled_from([16, 64, 1000]),
    lanes=st.integers(1, 2),
)
def test_a_run_goes_as_if_it_were_alone(
    make: MakeDriver, told: list[Story], order: list[int], budget: int, lanes: int
) -> None:
    tellers = together(make(budget, lanes=lanes), told, order)
    for teller, story in zip(tellers, told, strict=True):
        for ours, theirs in zip(teller.outcomes(), alone(make(10_000), story), strict=True):
            compare(ours, theirs, close)


@settings(deadline=None, max_examples=25)
@given(
    told=st.lists(stories, min_size=2, max_size=4),
    order=st.lists(st.integers(0, 5), max_size=30),
    budget=st.sampled_from([16, 64, 1000]),
)
def test_deterministic_is_bit_for_bit(
    make: MakeDriver, told: list[Story], order: list[int], budget: int
) -> None:
    tellers = together(make(budget, deterministic=True), told, order)
    for teller, story in zip(tellers, told, strict=True):
        expected = alone(make(budget, deterministic=True), story)
        for ours, theirs in zip(teller.outcomes(), expected, strict=True):
            compare(ours, theirs, exactly)


MANY = [
    LoraSpec(
        rank=rank,
        seed=seed,
        train_attn=groups != 1,
        train_mlp=groups not in (2, 4),
        train_unembed=groups not in (3, 4),
    )
    for seed, (rank, groups) in enumerate((r, g) for r in (1, 2, 4, 7, 16) for g in range(5))
]


def one_pass(driver: Driver, bodies: dict[str, ForwardBackward]) -> dict[str, RunState]:
    """The states after these batches, all of which must end in one step."""
    ids = [driver.submit(run, body, tenant=run) for run, body in bodies.items()]
    assert set(driver.take()) == set(ids)
    for work_id in ids:
        expect(driver.outcomes[work_id], ForwardBackwardResult)
    return {run: driver.state(run) for run in bodies}


def mix(rng: np.random.Generator, *, equal_lengths: bool) -> dict[str, ForwardBackward]:
    """A batch for each of ``MANY``, of 16 to 135 tokens."""
    bodies: dict[str, ForwardBackward] = {}
    for number in range(len(MANY)):
        count = int(rng.integers(1, 5))
        lengths = [24] * count if equal_lengths else [16, *rng.integers(1, 40, count - 1).tolist()]
        loss = str(rng.choice(list(LossName)))
        many = LOSSES[LossName(loss)].many_targets and rng.random() < 0.3
        bodies[f"run{number}"] = batch(rng, lengths, loss, 2 if many else None)
    return bodies


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("equal_lengths", [True, False])
def test_gradients_are_equal_bit_for_bit(make: MakeDriver, seed: int, equal_lengths: bool) -> None:
    """25 runs of all ranks and targets in one pass; see this file's first lines for why."""
    rng = np.random.default_rng(seed)
    bodies = mix(rng, equal_lengths=equal_lengths)
    mixed = make(10**6, **ONE_PASS)
    starts = {run: moved_state(mixed, spec, rng) for run, spec in zip(bodies, MANY, strict=True)}
    for run, start in starts.items():
        mixed.load(run, start)
    states = one_pass(mixed, bodies)
    for run, body in bodies.items():
        solo = make(10**6, **ONE_PASS)
        solo.load(run, starts[run])
        expected = one_pass(solo, {run: body})[run]
        assert expected.gradients is not None
        compare_states(states[run], expected, exactly)


@pytest.mark.parametrize("budget", [16, 64, 10_000])
def test_the_order_of_submission_does_not_show(make: MakeDriver, budget: int) -> None:
    """Many works of two runs, submitted one run after the other and in turns."""
    bodies = {
        run: [batch(np.random.default_rng([budget, number]), (7, 30, 2)) for number in range(4)]
        for run in ("a", "b")
    }
    grouped = [(run, body) for run, of_run in bodies.items() for body in of_run]
    in_turns = [(run, bodies[run][number]) for number in range(4) for run in "ba"]
    gradients: list[dict[str, Float32Array]] = []
    for order in (grouped, in_turns):
        driver = make(budget)
        for run in bodies:
            driver.create(run, LoraSpec(rank=4, seed=ord(run)))
        for run, body in order:
            driver.submit(run, body, tenant=run)
        driver.drain()
        gradients.append(
            {f"{run} {name}": g for run in bodies for name, g in driver.gradients(run).items()}
        )
    for name, gradient in gradients[0].items():
        near(gradients[1][name], gradient, rel=1e-5)
