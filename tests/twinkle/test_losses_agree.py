"""Every loss by class name against Twinkle's own class: value and gradient, on ragged batches.

Twinkle computes in float32 from padded rows (its aligning makes tensors of the dtype of the
log-probabilities, so float64 here), this service in float64 from the targets alone. With float64
on both sides they differ by the order of additions only.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import twinkle.loss as theirs

from twinkle_dask import batch_losses
from twinkle_dask.batch_losses import LabelledBatch

# Sums of some tens of float64 terms of size 1, through exp and log.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
V = 23


class Case:
    """A random batch: labels of S rows, log-probabilities of the model, and what a client sends."""

    def __init__(self, seed: int, num_rows: int = 6, *, empty_row: bool = False) -> None:
        draw = np.random.default_rng(seed)
        self.draw = draw
        lengths = draw.integers(3, 12, num_rows)
        self.labels = [draw.integers(0, V, n).astype(np.int64) for n in lengths]
        for row in self.labels:
            row[: draw.integers(0, len(row))] = -100
            row[-1] = row[-1] if draw.random() < 0.5 else -100
            if not (row != -100).any():
                row[0] = 1
        if empty_row:
            self.labels[1][:] = -100
        self.length = int(max(lengths))
        self.padded = np.full((num_rows, self.length), -100, dtype=np.int64)
        for row, labels in zip(self.padded, self.labels, strict=True):
            row[: len(labels)] = labels
        self.mask = self.padded != -100
        self.logps = -draw.gamma(1.5, 1.0, self.padded.shape) - 1e-3

    def rows(self, padded: np.ndarray) -> list[np.ndarray]:
        return [row[: len(labels)] for row, labels in zip(padded, self.labels, strict=True)]

    def near(self, scale: float = 0.4) -> np.ndarray:
        return np.minimum(self.logps + self.draw.normal(0, scale, self.logps.shape), -1e-4)

    def ragged(self, padded: np.ndarray) -> list[list[float]]:
        return [row[mask].tolist() for row, mask in zip(padded, self.mask, strict=True)]


def ours(
    name: str, settings: dict[str, Any], case: Case, arguments: dict[str, Any]
) -> tuple[float, np.ndarray, Any]:
    spec = batch_losses.loss_spec(name, settings)
    batch = LabelledBatch(tuple(case.labels), spec.settings.get("ignore_index", -100))
    bound = batch_losses.objective(spec, batch, arguments, V)
    done = bound.evaluate(batch.gather(case.rows(case.logps)))
    slopes = np.zeros(case.padded.shape)
    for row, part in zip(slopes, batch.scatter(done.slopes_T), strict=True):
        row[: len(part)] = part
    return done.value, slopes, bound


def twinkles(
    name: str, settings: dict[str, Any], case: Case, arguments: dict[str, Any]
) -> tuple[float, np.ndarray, float]:
    logps = torch.tensor(case.logps, requires_grad=True)
    loss = getattr(theirs, name)(**settings)
    out = loss({"labels": torch.tensor(case.padded)}, {"logps": logps}, **arguments)
    out["loss"].backward()
    assert logps.grad is not None
    return float(out["loss"].detach()), logps.grad.numpy(), float(out["num_tokens"])


def agree(
    name: str,
    settings: dict[str, Any],
    case: Case,
    arguments: dict[str, Any] | None = None,
    their_arguments: dict[str, Any] | None = None,
) -> None:
    arguments = arguments or {}
    value, slopes, bound = ours(name, settings, case, arguments)
    given = arguments if their_arguments is None else their_arguments
    their_value, their_slopes, num_tokens = twinkles(name, settings, case, given)
    np.testing.assert_allclose(value, their_value, **CLOSE)
    np.testing.assert_allclose(slopes, their_slopes, **CLOSE)
    assert bound.num_counted == (num_tokens or 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["CrossEntropyLoss", "ChunkedCrossEntropyLoss"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dft", [False, True])
def test_cross_entropy(name: str, reduction: str, dft: bool, seed: int) -> None:
    settings: dict[str, Any] = {"reduction": reduction, "dft": dft}
    if name.startswith("Chunked"):
        settings["chunk_size"] = 4
    agree(name, settings, Case(seed, empty_row=seed == 1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta": 0.7, "label_smoothing": 0.2},
        {"loss_type": "hinge", "beta": 0.3},
        {"loss_type": "ipo"},
        {"loss_type": "kto_pair", "beta": 0.2},
        {"sft_weight": 0.6},
        {"reference_free": True, "beta": 0.4},
    ],
    ids=str,
)
def test_dpo(settings: dict[str, Any], seed: int) -> None:
    case = Case(seed)
    reference = case.near()
    sent = {"ref_outputs": {"logps": reference.tolist()}}
    agree("DPOLoss", settings, case, sent, {"ref_logps": torch.tensor(reference)})
    # Rows sent longer than the batch, and targets alone: the same.
    wider = np.concatenate([reference, np.zeros((len(reference), 2))], axis=1)
    agree(
        "DPOLoss", settings, case, {"ref_logps": wider.tolist()}, {"ref_logps": torch.tensor(wider)}
    )
    sums = (reference * case.mask).sum(axis=1)
    halves = {"ref_chosen_logps": sums[0::2], "ref_rejected_logps": sums[1::2]}
    agree(
        "DPOLoss",
        settings,
        case,
        {name: half.tolist() for name, half in halves.items()},
        {name: torch.tensor(half) for name, half in halves.items()},
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SimPOLoss", {}),
        ("SimPOLoss", {"beta": 0.8, "gamma": -0.2}),
        ("CPOLoss", {}),
        ("CPOLoss", {"beta": 0.5, "bc_coef": 0.3}),
        ("ORPOLoss", {}),
        ("ORPOLoss", {"lambda_orpo": 1.5}),
    ],
    ids=str,
)
def test_preferences_without_a_reference(name: str, settings: dict[str, Any], seed: int) -> None:
    agree(name, settings, Case(seed, empty_row=seed == 2 and name == "CPOLoss"))


def test_odds_of_a_certain_answer() -> None:
    case = Case(5)
    case.logps[0] = 0.0
    agree("ORPOLoss", {}, case)


POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("GRPOLoss", {}),
    ("GRPOLoss", {"epsilon": 0.1, "epsilon_high": 0.4}),
    ("PPOLoss", {}),
    ("PPOLoss", {"loss_agg_mode": "seq-mean-token-mean"}),
    ("GSPOLoss", {"epsilon": 0.05}),
    ("SAPOLoss", {"tau_pos": 0.7, "tau_neg": 1.4}),
    ("CISPOLoss", {"epsilon": 0.3}),
    ("BNPOLoss", {}),
    ("DRGRPOLoss", {"max_completion_length": 20}),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("name", "settings"), POLICIES, ids=str)
def test_policies(name: str, settings: dict[str, Any], beta: float, seed: int) -> None:
    case = Case(seed, empty_row=seed == 1)
    old, reference = case.near(), case.near()
    scalars = case.draw.normal(0, 1, len(case.labels)).tolist()
    by_token = case.ragged(case.draw.normal(0, 1, case.padded.shape))
    settings = {**settings, "beta": beta}
    for advantages in (scalars, by_token):
        for sampled in (case.ragged(old), old.tolist(), None):
            sent = {"advantages": advantages, "old_logps": sampled, "ref_logps": reference.tolist()}
            agree(name, settings, case, sent)


def test_log_ratios_are_bounded() -> None:
    case = Case(9)
    old = case.logps.copy()
    old[0], old[1] = case.logps[0] - 50, np.minimum(case.logps[1] + 50, 0)
    case.logps[1] -= 60
    for name, settings in POLICIES:
        sent = {"advantages": [-1.0, -1.0, 1.0, -0.5, 2.0, 1.0], "old_logps": case.ragged(old)}
        agree(name, settings, case, sent)


def test_cispo_divides_by_what_it_is_told() -> None:
    case = Case(2)
    sent = {"advantages": [1.0] * 6, "old_logps": case.ragged(case.near())}
    agree("CISPOLoss", {}, case, {**sent, "num_items_in_batch": 17})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["logits", "topk", "indices"])
def test_gkd(mode: str, beta: float, seed: int) -> None:
    case = Case(seed, empty_row=seed == 1)
    shape = (*case.padded.shape, V)
    student = torch.tensor(case.draw.normal(0, 2, shape), requires_grad=True)
    teacher = case.draw.normal(0, 2, shape)
    settings = {"beta": beta, "temperature": 1.7, "chunk_size": 3}
    sent: dict[str, Any] = {"teacher_logits": teacher.tolist()}
    given: dict[str, Any] = {"teacher_logits": torch.tensor(teacher)}
    if mode == "topk":
        sent["topk"] = given["topk"] = 5
    elif mode == "indices":
        logprobs, indices = torch.tensor(teacher).log_softmax(-1).topk(4, dim=-1)
        given = {"teacher_topk_logprobs": logprobs, "teacher_topk_indices": indices}
        sent = {name: values.tolist() for name, values in given.items()}
    out = theirs.GKDLoss(**settings)(
        {"labels": torch.tensor(case.padded)}, {"logits": student.clone()}, **given
    )
    (their_slopes,) = torch.autograd.grad(out["loss"], student)

    spec = batch_losses.loss_spec("GKDLoss", settings)
    batch = LabelledBatch(tuple(case.labels))
    bound = batch_losses.objective(spec, batch, sent, V)
    assert bound.raw_scores
    assert bound.targets_TK is not None
    logits_TV = student.detach().numpy()[case.mask]
    done = bound.evaluate(np.take_along_axis(logits_TV, bound.targets_TK, axis=1))
    slopes_TV = np.zeros_like(logits_TV)
    np.put_along_axis(slopes_TV, bound.targets_TK, done.slopes_T, axis=1)
    np.testing.assert_allclose(done.value, float(out["loss"].detach()), **CLOSE)
    np.testing.assert_allclose(slopes_TV, their_slopes.numpy()[case.mask], **CLOSE)


SETTINGS_OF_INFONCE: list[dict[str, Any]] = [
    {},
    {"use_batch": False},
    {"temperature": 0.05, "include_qq": True},
    {"include_dd": True},
    {"include_qq": True, "include_dd": True, "mask_fake_negative": True, "fake_neg_margin": 0.05},
    {"hard_negatives": 1},
    {"hard_negatives": 1, "use_batch": False},
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("negatives", [(2, 2, 2), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("settings", SETTINGS_OF_INFONCE, ids=str)
def test_infonce(settings: dict[str, Any], negatives: tuple[int, ...], seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = [label for n in negatives for label in (1, 0, *[0] * n)]
    raw = draw.normal(0, 1, (len(labels), 7))
    embeddings = torch.tensor(raw / np.linalg.norm(raw, axis=1, keepdims=True), requires_grad=True)
    loss = theirs.InfonceLoss(**settings)
    out = loss({"labels": torch.tensor(labels)}, {"embeddings": embeddings})
    out["loss"].backward()
    assert embeddings.grad is not None
    value, slopes = batch_losses.contrast(
        batch_losses.loss_spec("InfonceLoss", settings), labels, embeddings.detach().numpy()
    )
    np.testing.assert_allclose(value, float(out["loss"].detach()), **CLOSE)
    np.testing.assert_allclose(slopes, embeddings.grad.numpy(), **CLOSE)


def test_squared_error_is_torchs() -> None:
    case = Case(4)
    logits = case.draw.normal(0, 2, case.padded.shape)
    targets = case.draw.normal(0, 1, case.padded.shape)
    leaf = torch.tensor(logits[case.mask], requires_grad=True)
    out = torch.nn.MSELoss()(leaf, torch.tensor(targets[case.mask]))
    out.backward()
    case.logps = logits
    value, slopes, bound = ours("MSELoss", {}, case, {"targets": case.ragged(targets)})
    assert bound.raw_scores
    assert leaf.grad is not None
    np.testing.assert_allclose(value, float(out.detach()), **CLOSE)
    np.testing.assert_allclose(slopes[case.mask], leaf.grad.numpy(), **CLOSE)


def test_settings_have_twinkles_names_and_defaults() -> None:
    import inspect

    for name, takes in batch_losses.LOSSES.items():
        found: dict[str, Any] = {}
        for kind in reversed(getattr(theirs, name).__mro__):
            signature: Callable[..., Any] | None = kind.__dict__.get("__init__")
            if kind is not object and signature is not None:
                found |= inspect.signature(signature).parameters
        for setting, ours_ in takes.items():
            assert setting in found, (name, setting)
            default = found[setting].default
            if default is not inspect.Parameter.empty:
                assert ours_.default == default, (name, setting)
        left = found.keys() - takes.keys() - {"self", "kwargs", "process_group"}
        assert not left, (name, left)
