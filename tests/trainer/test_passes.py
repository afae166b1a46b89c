"""What may change how a pass is computed, and must not change its results."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.driver import Driver, batch
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.loading import load_base
from twinkle_dask.trainer import engine, passes
from twinkle_dask.trainer.engine import Trainer, TrainerConfig
from twinkle_dask.types import AdamParams, AdapterState, Float32Array, LoraSpec, OptimStep, RunState

SPECS = {
    "a": LoraSpec(rank=3, seed=1),
    "b": LoraSpec(rank=8, seed=2, train_mlp=False),
    "c": LoraSpec(rank=1, seed=3, alpha=2.0),
    "d": LoraSpec(rank=4, seed=4, train_attn=False),
    "e": LoraSpec(rank=4, seed=5),
}


@pytest.fixture(scope="module")
def half(folder: Path) -> BaseModel:
    return load_base(str(folder), "bfloat16", max_rank=16)


def random_state(base: BaseModel, spec: LoraSpec, *, broken: bool = False) -> RunState:
    rng = np.random.default_rng(spec.seed)
    weights: dict[str, Float32Array] = {}
    for target in base.targets(spec):
        for name, shape in target.shapes(spec.rank).items():
            weights[name] = rng.normal(0, 0.05, shape).astype(np.float32)
    if broken:
        next(iter(weights.values()))[0, 0] = np.inf
    return RunState(adapter=AdapterState(spec=spec, weights=weights))


def gradients(
    base: BaseModel, runs: Sequence[str], broken: str | None = None
) -> dict[str, Float32Array]:
    """Each run's gradient of one pass of all of them together, flat."""
    it = Driver(Trainer(base, TrainerConfig(tokens_per_micro_batch=4096, lanes=1)))
    for run in runs:
        it.load(run, random_state(base, SPECS[run], broken=run == broken))
    ids = {run: it.submit(run, batch(np.random.default_rng(ord(run)), (9, 30))) for run in runs}
    results = it.drain()
    found: dict[str, Float32Array] = {}
    for run, work in ids.items():
        if run != broken:
            assert not isinstance(results[work], Exception), results[work]
            named = it.gradients(run)
            found[run] = np.concatenate([named[name].ravel() for name in sorted(named)])
    return found


def distance(actual: Float32Array, expected: Float32Array) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def test_adapters_side_by_side_learn_as_if_alone(half: BaseModel, base: BaseModel) -> None:
    """In bfloat16 small adapters share products: other rounding, and not more of it."""
    together = gradients(half, list(SPECS))
    for run in SPECS:
        (exact,), (alone,) = (gradients(of, [run]).values() for of in (base, half))
        # Each is off by about 2 %. A wrong column would make it of order 1.
        assert distance(together[run], exact) < 1.3 * distance(alone, exact)


def test_infinite_weights_do_not_reach_neighbours(half: BaseModel) -> None:
    good = gradients(half, list(SPECS))
    beside = gradients(half, list(SPECS), broken="c")
    for run, gradient in beside.items():
        assert np.isfinite(gradient).all()
        assert distance(gradient, good[run]) < 0.06  # twice the rounding of each


@pytest.mark.parametrize("lanes", [1, 2])
def test_layers_computed_twice_give_the_same(base: BaseModel, lanes: int) -> None:
    results: list[list[Float32Array]] = []
    for budget in (4096, 1):
        settings = TrainerConfig(
            tokens_per_micro_batch=4096, checkpoint_tokens=budget, lane_tokens=1, lanes=lanes
        )
        it = Driver(Trainer(base, settings))
        it.load("a", random_state(base, SPECS["a"]))
        logprobs = it.forward_backward("a", batch(np.random.default_rng(0), (9, 30, 4))).logprobs
        named = it.gradients("a")
        results.append([*logprobs, *(named[name] for name in sorted(named))])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def told(base: BaseModel, runs: Sequence[str]) -> dict[str, list[Float32Array]]:
    """Two steps of each run, two batches each, all pipelined; what came of it, metrics included."""
    settings = TrainerConfig(
        tokens_per_micro_batch=64, deterministic=True, threads=2, lanes=2, lane_tokens=1
    )
    it = Driver(Trainer(base, settings))
    for run in runs:
        it.load(run, random_state(base, SPECS[run]))
    ids: dict[str, list[str]] = {run: [] for run in runs}
    rngs = {run: np.random.default_rng(ord(run)) for run in runs}
    for _ in range(2):
        for run in runs:
            bodies = [batch(rngs[run], (9, 30, 4)), batch(rngs[run], (50,))]
            step = OptimStep(adam=AdamParams(learning_rate=1e-2, grad_clip_norm=0.5))
            ids[run] += [it.submit(run, body, tenant=run) for body in (*bodies, step)]
    outcomes = it.drain()
    found: dict[str, list[Float32Array]] = {}
    for run in runs:
        weights = it.state(run).adapter.weights
        found[run] = [weights[name] for name in sorted(weights)]
        for work in ids[run]:
            metrics = getattr(outcomes[work], "metrics")  # noqa: B009 - of either kind of result
            found[run].append(np.array([metrics[name] for name in sorted(metrics)], np.float32))
    it.trainer.close()
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deterministic_on_lanes_and_threads(
    dtype: str, half: BaseModel, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit whoever is there, with every chance to use another number of threads."""
    for module in (engine, passes):
        monkeypatch.setattr(module, "NUMBERS_FOR_LANES", 1)
    torch.set_num_threads(2)  # the fixture of this room puts it back
    of = half if dtype == "bfloat16" else base
    together = told(of, list(SPECS))
    for run in SPECS:
        for ours, theirs in zip(together[run], told(of, [run])[run], strict=True):
            np.testing.assert_array_equal(ours, theirs)
