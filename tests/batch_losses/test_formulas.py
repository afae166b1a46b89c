"""Slopes against differences of values; one pass against two."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle_dask import batch_losses
from twinkle_dask.batch_losses import Float64Array, LabelledBatch, Objective
from twinkle_dask.trainer.losses import token_loss
from twinkle_dask.types import Json

V = 11
LOSSES: list[tuple[str, Json]] = [
    ("CrossEntropyLoss", {}),
    ("CrossEntropyLoss", {"reduction": "sum", "dft": True}),
    ("MSELoss", {}),
    ("DPOLoss", {"beta": 0.7, "label_smoothing": 0.1, "sft_weight": 0.3}),
    ("DPOLoss", {"loss_type": "ipo"}),
    ("DPOLoss", {"loss_type": "kto_pair"}),
    ("SimPOLoss", {}),
    ("CPOLoss", {}),
    ("ORPOLoss", {}),
    ("GRPOLoss", {"beta": 0.05}),
    ("PPOLoss", {}),
    ("GSPOLoss", {}),
    ("SAPOLoss", {"tau_pos": 0.6}),
    ("BNPOLoss", {}),
    ("DRGRPOLoss", {}),
    ("GKDLoss", {"beta": 0.3, "temperature": 1.4}),
    ("GKDLoss", {"beta": 1.0}),
]


def batch_of(draw: np.random.Generator, num_rows: int) -> LabelledBatch:
    lengths: list[int] = draw.integers(1, 9, num_rows).tolist()
    labels = [draw.integers(0, V, n, dtype=np.int64) for n in lengths]
    for row in labels:
        row[: draw.integers(0, len(row))] = -100
    return LabelledBatch(tuple(labels))


def bound(
    name: str, given_: Json, draw: np.random.Generator
) -> tuple[Objective, Float64Array, LabelledBatch]:
    """A loss on a random batch with all it needs, and scores at which to evaluate it."""
    batch = batch_of(draw, 4)
    lp_T = -draw.gamma(1.5, 1.0, batch.num_targets) - 1e-3
    near = [part.tolist() for part in np.split(lp_T, np.cumsum(batch.counts_S)[:-1])]
    moved = [[x + float(draw.normal(0, 0.3)) for x in row] for row in near]
    scores: list[Any] = [draw.normal(0, 1, (len(row), 3)).tolist() for row in batch.labels_S]
    tokens: list[Any] = [draw.integers(0, V, (len(row), 3)).tolist() for row in batch.labels_S]
    arguments: Json = {
        "advantages": draw.normal(0, 1, 4).tolist(),
        "old_logps": moved,
        "ref_logps": near[::1],
        "targets": draw.normal(0, 1, 4).tolist(),
        "teacher_topk_logprobs": scores,
        "teacher_topk_indices": tokens,
    }
    loss = batch_losses.loss_spec(name, given_)
    objective = batch_losses.objective(loss, batch, arguments, V)
    shape = () if objective.targets_TK is None else (3,)
    at = draw.normal(0, 1, (batch.num_targets, *shape)) if objective.raw_scores else lp_T
    return objective, at, batch


@pytest.mark.parametrize(("name", "given_"), LOSSES, ids=str)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_slopes_are_those_of_the_value(name: str, given_: Json, seed: int) -> None:
    draw = np.random.default_rng(seed)
    objective, at, _ = bound(name, given_, draw)
    slopes = objective.evaluate(at).slopes_T
    step = 1e-6
    direction = draw.normal(0, 1, at.shape)
    up = objective.evaluate(at + step * direction).value
    down = objective.evaluate(at - step * direction).value
    # A kink (the edge of a clip) within the step may take a share of step times slope away.
    wanted = float((slopes * direction).sum())
    assert (up - down) / (2 * step) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


ONE_PASS: list[tuple[str, Json, bool]] = [
    ("CrossEntropyLoss", {}, True),
    ("CrossEntropyLoss", {"reduction": "sum"}, True),
    ("GRPOLoss", {}, True),
    ("GRPOLoss", {"epsilon_high": 0.5}, False),
    ("PPOLoss", {}, False),
    ("BNPOLoss", {}, False),
    ("DRGRPOLoss", {"epsilon": 1.5}, False),
    ("CISPOLoss", {}, False),
    ("CISPOLoss", {}, True),
    ("SAPOLoss", {}, True),
]


@pytest.mark.parametrize(("name", "given_", "on_policy"), ONE_PASS, ids=str)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_one_pass_adds_the_gradient_of_two(
    name: str, given_: Json, on_policy: bool, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    batch = batch_of(draw, 4)
    lp_T = -draw.gamma(1.5, 1.0, batch.num_targets)
    arguments: Json = {"advantages": draw.normal(0, 1, 4).tolist()}
    if not on_policy:
        old_T = lp_T + draw.normal(0, 0.5, lp_T.shape)
        parts = np.split(old_T, np.cumsum(batch.counts_S)[:-1])
        arguments["old_logps"] = [part.tolist() for part in parts]
    loss = batch_losses.loss_spec(name, given_)
    objective = batch_losses.objective(loss, batch, arguments, V)
    assert objective.direct is not None
    inputs = {k: torch.tensor(v) for k, v in objective.direct.inputs.items()}
    _, slopes_T = token_loss(objective.direct.loss, torch.tensor(lp_T), inputs)
    np.testing.assert_allclose(
        slopes_T.numpy(), objective.evaluate(lp_T).slopes_T, rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize(
    ("name", "given_", "arguments"),
    [
        ("CrossEntropyLoss", {"dft": True}, {}),
        ("GRPOLoss", {"beta": 0.1}, {"ref_logps": [[-1.0]], "old_logps": [[-1.0]]}),
        # The ratio could pass e^20, which the core does not bound.
        ("GRPOLoss", {}, {"old_logps": [[-21.0]]}),
        ("GSPOLoss", {}, {"old_logps": [[-1.0]]}),
    ],
)
def test_what_needs_two_passes(name: str, given_: Json, arguments: Json) -> None:
    batch = LabelledBatch((np.array([3]),))
    loss = batch_losses.loss_spec(name, given_)
    assert batch_losses.objective(loss, batch, {"advantages": 1.0, **arguments}, V).direct is None


@given(seed=st.integers(0, 10**6), masked=st.booleans())
@settings(max_examples=20, deadline=None)
def test_slopes_of_embeddings(seed: int, masked: bool) -> None:
    draw = np.random.default_rng(seed)
    spec = batch_losses.loss_spec(
        "InfonceLoss",
        {
            "temperature": 0.5,
            "include_qq": True,
            "include_dd": True,
            "mask_fake_negative": masked,
            "hard_negatives": 3,
        },
    )
    labels = [1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    at = draw.normal(0, 1, (len(labels), 4))
    _, slopes = batch_losses.contrast(spec, labels, at)
    direction, step = draw.normal(0, 1, at.shape), 1e-6
    up, _ = batch_losses.contrast(spec, labels, at + step * direction)
    down, _ = batch_losses.contrast(spec, labels, at - step * direction)
    wanted = float((slopes * direction).sum())
    assert (up - down) / (2 * step) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
