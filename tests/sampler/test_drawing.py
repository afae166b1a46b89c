"""Drawing alone: exact distributions on few tokens, ties, limits, and rows that stay apart."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinkle_dask.sampler import drawing
from twinkle_dask.sampler.drawing import DrawRules, Uniforms, draw, invert_cdf
from twinkle_dask.types import SamplingParams

CPU = torch.device("cpu")
PROBS = np.array([0.02, 0.25, 0.0, 0.4, 0.03, 0.25, 0.05])


def logits_of(probs: Sequence[float]) -> Tensor:
    return torch.tensor(np.array(probs), dtype=torch.float32).log()


def draws(logits_V: Tensor, num: int, **settings: float | int) -> np.ndarray[tuple[int], np.dtype]:
    """Shares of ``num`` draws from one row of logits, evenly over [0, 1)."""
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    rules = DrawRules.of([params] * num, len(logits_V), CPU)
    numbers = [(i + 0.5) / num for i in range(num)]
    tokens, _ = draw(logits_V.repeat(num, 1), rules, numbers)
    return np.bincount(tokens, minlength=len(logits_V)) / num


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, PROBS),
        ({"temperature": 0.5}, PROBS**2),
        ({"temperature": 3.0}, PROBS ** (1 / 3)),
        ({"top_k": 1}, [0, 0, 0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 0.25, 0, 0.4, 0, 0, 0]),  # of two equals the lower id stays
        ({"top_k": 3}, [0, 0.25, 0, 0.4, 0, 0.25, 0]),
        ({"top_k": 100}, PROBS),
        ({"top_p": 0.39}, [0, 0, 0, 1, 0, 0, 0]),
        ({"top_p": 0.5}, [0, 0.25, 0, 0.4, 0, 0, 0]),
        ({"top_p": 0.7}, [0, 0.25, 0, 0.4, 0, 0.25, 0]),
        ({"top_p": 0.94}, [0, 0.25, 0, 0.4, 0, 0.25, 0.05]),
        ({"top_p": 0.0}, [0, 0, 0, 1, 0, 0, 0]),
        # 0.4 is more than 60 % of the 0.65 that top_k leaves, 0.25 is not needed
        ({"top_k": 2, "top_p": 0.6}, [0, 0, 0, 1, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.63}, [0, 0.25, 0, 0.4, 0, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.6}, [0, 0.0625, 0, 0.16, 0, 0, 0]),
    ],
)
def test_shares_are_the_exact_probabilities(
    settings: dict[str, float], expected: Sequence[float]
) -> None:
    """Evenly spaced random numbers give each token its probability to one part in 2000."""
    exact = np.array(expected) / np.sum(expected)
    shares = draws(logits_of(PROBS.tolist()), 4000, **settings)
    assert np.abs(shares - exact).max() < 1 / 2000
    assert (shares[exact == 0] == 0).all()


@pytest.mark.parametrize("candidates", [2, 64, 1024])
def test_nucleus_beyond_the_candidates(monkeypatch: pytest.MonkeyPatch, candidates: int) -> None:
    """The same tokens stay, however few are looked at first; against a sort in numpy."""
    monkeypatch.setattr(drawing, "_CANDIDATES", candidates)
    logits_NV = torch.randn(12, 300, generator=torch.Generator().manual_seed(0)).mul(2).round()
    params = [SamplingParams(top_p=p) for p in np.linspace(0.05, 0.999, 12)]
    for row, param in zip(logits_NV, params, strict=True):
        shares = draws(row, 3000, top_p=param.top_p)
        probs = torch.softmax(row.double(), -1).numpy()
        order = sorted(range(300), key=lambda i: (-probs[i], i))
        kept = int((np.cumsum(probs[order]) < param.top_p - 1e-6).sum()) + 1
        assert set(np.flatnonzero(shares)) <= set(order[:kept])


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    logits_NV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 4
    params = [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.3),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.2),
        SamplingParams(temperature=5, top_k=3, top_p=0.5),
    ]
    expected = torch.log_softmax(logits_NV, -1)
    tokens, logprobs = draw(logits_NV.clone(), DrawRules.of(params, 50, CPU), [0.4] * 5)
    for row, token in enumerate(tokens):
        assert logprobs[row] == pytest.approx(float(expected[row, token]), abs=1e-5)


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 0.01])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    assert draws(logits_of([0.3, 0.5, 0.2]), 50, temperature=temperature)[1] == 1


def test_top_k_of_one_is_greedy_even_among_equals() -> None:
    logits_V = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0])
    for temperature in (0.0, 1.0, 1e6):
        assert draws(logits_V, 40, top_k=1, temperature=temperature)[1] == 1


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 0.3, 1.0, 7.0]), min_size=1, max_size=40),
    number=st.floats(0, 1, exclude_max=True),
)
def test_weight_zero_is_never_drawn(weights: list[float], number: float) -> None:
    if not any(weights):
        weights[-1] = 1e-30
    for uniform in (number, 0.0, float(np.nextafter(1, 0))):
        token = invert_cdf(torch.tensor([weights]), torch.tensor([uniform]))
        assert weights[int(token)] > 0


def test_rows_that_are_not_finite_say_so_and_leave_others_alone() -> None:
    logits_NV = torch.zeros(3, 20)
    logits_NV[1, 4] = float("nan")
    for params in (SamplingParams(), SamplingParams(top_k=3), SamplingParams(temperature=0)):
        rules = DrawRules.of([params] * 3, 20, CPU)
        _, logprobs = draw(logits_NV.clone(), rules, [0.5] * len(rules.random_rows))
        assert np.isnan(logprobs).tolist() == [False, True, False]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([-1, 1, 5, 60, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1]),
)


@given(
    params=st.lists(PARAMS, min_size=2, max_size=8),
    seed=st.integers(0, 1000),
    rounding=st.sampled_from([0, 1]),
)
@settings(max_examples=60, deadline=None)
def test_a_row_draws_the_same_alone(params: list[SamplingParams], seed: int, rounding: int) -> None:
    """Bit for bit, with many equal logits too."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(len(params), 200, generator=generator) * 3
    if rounding:
        logits_NV = logits_NV.round()
    uniforms: list[float] = np.random.default_rng(seed).random(len(params)).tolist()
    rules = DrawRules.of(params, 200, CPU)
    together, _ = draw(logits_NV.clone(), rules, [uniforms[i] for i in rules.random_rows])
    for i, param in enumerate(params):
        numbers = [uniforms[i]] if param.temperature else []
        alone, _ = draw(logits_NV[i : i + 1].clone(), DrawRules.of([param], 200, CPU), numbers)
        assert alone == together[i : i + 1]


def test_random_numbers_belong_to_seed_sample_and_place() -> None:
    first, again = Uniforms(7, 0), Uniforms(7, 0)
    numbers = [first.at(i) for i in range(5)]
    for i in (0, 0, 1, 2, 3, 4, 4):
        assert again.at(i) == numbers[i]
    assert Uniforms(7, 0).at(4) == numbers[4]
    assert Uniforms(7, 1).at(0) != numbers[0]
    assert Uniforms(8, 0).at(0) != numbers[0]
    assert Uniforms(-1, 0).at(0) == Uniforms(2**64 - 1, 0).at(0)
    assert Uniforms(None, 0).at(0) != Uniforms(None, 0).at(0)
