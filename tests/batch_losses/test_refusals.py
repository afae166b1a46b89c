"""What a client sends: settings, ragged rows, and what is said of them."""

from typing import Any

import numpy as np
import pytest

from twinkle_dask import batch_losses
from twinkle_dask.batch_losses import LabelledBatch
from twinkle_dask.errors import InvalidRequest, NotSupported, RequestError
from twinkle_dask.types import Json

X = -100
BATCH = LabelledBatch((np.array([X, X, 5, 6]), np.array([X, 7, X, 8, 9, X]), np.array([4, X])))
VALUES_T = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def aligned(values: Any, **how: bool) -> list[float]:
    return BATCH.align(values, "old_logps", **how).tolist()


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([[1, 2], [3, 4, 5], [6]], id="targets alone"),
        pytest.param(
            [[0, 0, 1, 2, 0, 0], [0, 3, 0, 4, 5, 0], [6, 0, 0, 0, 0, 0]], id="padded batch"
        ),
        pytest.param([[0, 0, 1, 2], [0, 3, 0, 4, 5, 0], [6, 0]], id="each row's own length"),
        pytest.param([[0, 0, 1, 2, 0, 0, 9, 9], [0, 3, 0, 4, 5, 0, 9], [6] + [9] * 7], id="longer"),
        pytest.param([[1, 2], [0, 3, 0, 4, 5, 0], [[6]]], id="mixed"),
        pytest.param([np.array([1, 2]), (3, 4, 5), [6]], id="arrays"),
    ],
)
def test_rows_may_have_several_lengths(rows: list[Any]) -> None:
    assert aligned(rows) == VALUES_T


def test_a_value_may_stand_for_a_row() -> None:
    assert aligned([7, [8], 9.5], broadcast=True) == [7, 7, 8, 8, 8, 9.5]


def test_filler_is_not_looked_at() -> None:
    bad = float("nan")
    assert aligned([[bad, bad, 1, 2], [3, 4, 5], [6]]) == VALUES_T


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[1, 2], [3, 4], [6]], r"Row 1: old_logps has 2 values.*3 targets.*6 positions"),
        ([[1, 2], [3, 4, 5, 0], [6]], r"Row 1: old_logps has 4 values"),
        ([[1], [3, 4, 5], [6]], r"Row 0: old_logps has 1 values"),
        ([[1, 2], [3, 4, 5]], r"has 2 entries, but the batch has 3 rows"),
        ([[1, 2], [3, 4, 5], [float("inf")]], r"Row 2: old_logps is NaN or infinite"),
        ([[1, 2], [3, None, 5], [6]], r"Row 1: old_logps must be numbers"),
        ([[1, 2], ["3", "4", "5"], [6]], r"Row 1: old_logps must be numbers"),
        ([[1, 2], [[3], [4, 5]], [6]], r"Row 1: old_logps must be numbers"),
        ({"logps": []}, r"must be a list with an entry for each row"),
        (1.5, r"must be a list"),
        ("abc", r"must be a list"),
    ],
)
def test_what_does_not_fit_is_named(rows: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        aligned(rows)


def test_scatter_undoes_gather() -> None:
    rows = BATCH.scatter(np.array(VALUES_T))
    assert [row.tolist() for row in rows] == [[0, 0, 1, 2], [0, 3, 0, 4, 5, 0], [6, 0]]
    assert BATCH.gather(rows).tolist() == VALUES_T


def test_another_label_may_be_ignored_too() -> None:
    batch = LabelledBatch((np.array([X, 5, 6]),), 6)
    assert batch.num_targets == 1


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("HingeLoss", {}, "Unknown loss 'HingeLoss'.*GRPOLoss"),
        ("CrossEntropyLoss", {"smoothing": 1}, "no setting 'smoothing'.*reduction"),
        ("CrossEntropyLoss", {"reduction": "none"}, "'reduction'.*mean, sum"),
        ("ChunkedCrossEntropyLoss", {}, "needs 'chunk_size'"),
        ("ChunkedCrossEntropyLoss", {"chunk_size": 0}, "whole number of at least 1"),
        ("DPOLoss", {"beta": "0.1"}, "'beta'.*above 0"),
        ("DPOLoss", {"beta": True}, "'beta'.*above 0"),
        ("DPOLoss", {"label_smoothing": 1.5}, "from 0 to 1"),
        ("DPOLoss", {"label_smoothing": 0.1, "loss_type": "hinge"}, "'sigmoid' only"),
        ("GRPOLoss", {"epsilon": float("nan")}, "finite number"),
        ("GRPOLoss", {"entropy_coef": 0.01}, "must be 0 here"),
        ("InfonceLoss", {"mask_fake_negative": True, "fake_neg_margin": 0}, "above 0"),
        ("LigerFusedLinearCrossEntropyLoss", {}, "ChunkedCrossEntropyLoss"),
        ("PPOValueLoss", {}, "value head"),
    ],
)
def test_settings_are_checked_when_they_are_set(name: str, settings: Json, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        batch_losses.loss_spec(name, settings)


def test_what_this_service_has_not_is_said_to_be_so() -> None:
    with pytest.raises(NotSupported):
        batch_losses.loss_spec("PPOValueLoss", {})


def test_defaults_are_filled_in() -> None:
    spec = batch_losses.loss_spec("GRPOLoss", {"epsilon": 0.1})
    assert spec.settings == {
        "ignore_index": -100,
        "epsilon": 0.1,
        "epsilon_high": None,
        "beta": 0.0,
        "entropy_coef": 0.0,
    }


PAIR = LabelledBatch((np.array([1, 2]), np.array([3, X])))


@pytest.mark.parametrize(
    ("name", "settings", "arguments", "words"),
    [
        ("DPOLoss", {}, {}, "needs log-probabilities of a reference"),
        ("DPOLoss", {}, {"ref_chosen_logps": [1.0]}, "both"),
        ("DPOLoss", {}, {"ref_chosen_logps": [-1], "ref_rejected_logps": [-1, -2]}, "1 numbers"),
        ("DPOLoss", {}, {"ref_outputs": [[-1.0]]}, "'ref_outputs'"),
        # One number for a row of several is no logprob of each of its tokens.
        ("DPOLoss", {}, {"ref_logps": [-1.0, -2.0]}, "Row 0: ref_logps has 1 values"),
        ("GRPOLoss", {}, {}, "needs 'advantages'"),
        ("GRPOLoss", {"beta": 0.1}, {"advantages": [1, 2]}, "needs 'ref_logps'"),
        ("CISPOLoss", {}, {"advantages": [1, 2], "num_items_in_batch": 0}, "above 0"),
        ("MSELoss", {}, {}, "needs 'targets'"),
        ("GKDLoss", {}, {}, "needs a teacher"),
        ("GKDLoss", {}, {"teacher_logits": [[[0.0, 1.0]] * 2] * 2}, "vocabulary has 9"),
        (
            "GKDLoss",
            {},
            {
                "teacher_topk_logprobs": [[[0.0]] * 2] * 2,
                "teacher_topk_indices": [[[9]] * 2] * 2,
            },
            "Row 0: teacher_topk_indices must be tokens",
        ),
    ],
)
def test_what_a_loss_needs(name: str, settings: Json, arguments: Json, words: str) -> None:
    spec = batch_losses.loss_spec(name, settings)
    with pytest.raises(InvalidRequest, match=words):
        batch_losses.objective(spec, PAIR, arguments, 9)


@pytest.mark.parametrize("name", ["DPOLoss", "SimPOLoss", "CPOLoss", "ORPOLoss"])
def test_pairs_are_even(name: str) -> None:
    spec = batch_losses.loss_spec(name, {})
    with pytest.raises(InvalidRequest, match="must be even, not 3"):
        batch_losses.objective(spec, BATCH, {}, 9)


@pytest.mark.parametrize(
    ("labels", "settings", "words"),
    [
        ([], {}, "first row begins none"),
        ([0, 1, 0], {}, "first row begins none"),
        ([1, 0, 1], {}, "Row 2 is an anchor"),
        ([1, 0, 0, 1, 0], {"hard_negatives": 2}, "Row 3: hard_negatives is 2"),
        ([1, 0, 0], {"hard_negatives": 10**12}, "comparisons; send at most"),
        ([1, 0] * 4096, {}, "4096 groups with 4096 documents"),
        ([1, 0, 1, 0], {"temperature": 1e-308}, "may be too low"),
    ],
)
def test_groups(labels: list[int], settings: Json, words: str) -> None:
    spec = batch_losses.loss_spec("InfonceLoss", settings)
    with pytest.raises(InvalidRequest, match=words):
        batch_losses.contrast(spec, labels, np.ones((len(labels), 2)))


def test_an_embedding_that_is_no_number() -> None:
    spec = batch_losses.loss_spec("InfonceLoss", {})
    with pytest.raises(InvalidRequest, match="Row 1: its embedding"):
        batch_losses.contrast(spec, [1, 0], np.array([[1.0, 0.0], [np.nan, 1.0]]))
