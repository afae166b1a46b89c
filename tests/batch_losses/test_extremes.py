"""Batches without targets, and numbers at the edge."""

import numpy as np
import pytest

from twinkle_dask import batch_losses
from twinkle_dask.batch_losses import LOSSES, LabelledBatch
from twinkle_dask.types import Json

NEEDED: dict[str, Json] = {"ChunkedCrossEntropyLoss": {"chunk_size": 2}}


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"InfonceLoss"}))
def test_without_targets_there_is_nothing_to_learn(name: str) -> None:
    batch = LabelledBatch((np.full(3, -100), np.full(2, -100)))
    arguments: Json = {
        "advantages": [1.0, 2.0],
        "old_logps": [[], []],
        "targets": [[], []],
        "ref_logps": [[], [-1.0] * 3],
        "teacher_topk_logprobs": [[[0.0]] * 3] * 2,
        "teacher_topk_indices": [[[1]] * 3] * 2,
    }
    spec = batch_losses.loss_spec(name, NEEDED.get(name, {}))
    objective = batch_losses.objective(spec, batch, arguments, 9)
    done = objective.evaluate(np.zeros(0 if objective.targets_TK is None else (0, 1)))
    assert np.isfinite(done.value)
    assert done.slopes_T.size == 0
    assert objective.num_counted == 1


@pytest.mark.parametrize("lp", [0.0, -1e-300, -700.0, -1e5])
@pytest.mark.parametrize(
    "name", ["DPOLoss", "SimPOLoss", "CPOLoss", "ORPOLoss", "GRPOLoss", "GSPOLoss", "SAPOLoss"]
)
def test_far_away_scores_have_finite_slopes(name: str, lp: float) -> None:
    batch = LabelledBatch((np.array([1, 2]), np.array([3, 4])))
    arguments: Json = {
        "advantages": [1.0, -1.0],
        "old_logps": [-1e4, 0.0],
        "ref_logps": [[0, 0]] * 2,
    }
    spec = batch_losses.loss_spec(name, {})
    done = batch_losses.objective(spec, batch, arguments, 9).evaluate(
        np.array([lp, -1.0, -1.0, lp])
    )
    assert np.isfinite(done.value)
    assert np.isfinite(done.slopes_T).all()
