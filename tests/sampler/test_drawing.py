"""Drawing alone: exact distributions on few tokens, ties, limits, and rows that stay apart."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinkle_dask.sampler import drawing
from twinkle_dask.sampler.drawing import (
    DrawRules,
    PlacedUniforms,
    Uniforms,
    draw,
    draw_many,
    invert_cdf,
    likeliest,
)
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
    tokens = draw(logits_V.repeat(num, 1), rules, numbers).tokens
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
    tokens, logprobs, _ = draw(logits_NV.clone(), DrawRules.of(params, 50, CPU), [0.4] * 5)
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
        token = invert_cdf(torch.tensor([weights]), torch.tensor([[uniform]]))
        assert weights[int(token)] > 0


def test_rows_that_are_not_finite_say_so_and_leave_others_alone() -> None:
    logits_NV = torch.zeros(3, 20)
    logits_NV[1, 4] = float("nan")
    for params in (SamplingParams(), SamplingParams(top_k=3), SamplingParams(temperature=0)):
        rules = DrawRules.of([params] * 3, 20, CPU)
        logprobs = draw(logits_NV.clone(), rules, [0.5] * len(rules.random_rows)).logprobs
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
    together = draw(logits_NV.clone(), rules, [uniforms[i] for i in rules.random_rows]).tokens
    for i, param in enumerate(params):
        numbers = [uniforms[i]] if param.temperature else []
        alone = draw(logits_NV[i : i + 1].clone(), DrawRules.of([param], 200, CPU), numbers)
        assert alone.tokens == together[i : i + 1]


@given(
    levels=st.sampled_from([2, 5, 300]),
    number=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_likeliest_of_equals_are_the_lower_tokens(levels: int, number: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits_NV = (rng.integers(0, levels, (3, 40)) - levels // 2).astype(np.float32)
    logits_NV[rng.random((3, 40)) < 0.2] *= -0.0
    logits_NV[rng.random((3, 40)) < 0.1] = -np.inf
    found: list[list[int]] = likeliest(torch.tensor(logits_NV), number).numpy().tolist()
    assert found == [sorted(range(40), key=lambda i: (-row[i], i))[:number] for row in logits_NV]


def test_the_likeliest_are_told_to_those_who_ask() -> None:
    logits_NV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).round()
    rules = DrawRules.of([SamplingParams(temperature=0.5)] * 4, 50, CPU, [0, 3, 0, 7])
    expected = torch.log_softmax(logits_NV, -1)
    tokens, logprobs, top = draw(logits_NV.clone(), rules, [0.3] * 4)
    assert (tokens, logprobs) == draw(
        logits_NV.clone(), DrawRules.of([SamplingParams(temperature=0.5)] * 4, 50, CPU), [0.3] * 4
    )[:2]
    assert list(top) == [1, 3]
    for row, number in ((1, 3), (3, 7)):
        found, found_logprobs = top[row]
        assert np.array_equal(found, likeliest(logits_NV[row : row + 1], number)[0].numpy())
        assert found_logprobs == pytest.approx(expected[row, found.astype(int)].numpy(), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 3.0])
def test_many_draws_from_one_row_have_its_exact_probabilities(temperature: float) -> None:
    logits_NV = logits_of(PROBS.tolist()).repeat(2, 1)
    numbers_NK = np.tile((np.arange(4000) + 0.5) / 4000, (2, 1))
    drawn_NK = draw_many(logits_NV, temperature, numbers_NK)
    exact = PROBS ** (1 / temperature) if temperature else PROBS.max() == PROBS
    for row in drawn_NK:
        shares = np.bincount(row.numpy(), minlength=len(PROBS)) / 4000
        assert np.abs(shares - exact / exact.sum()).max() < 1 / 2000


@pytest.mark.parametrize("width", [1, 3, 4, 9])
def test_random_numbers_of_places_do_not_depend_on_the_pieces(width: int) -> None:
    whole = PlacedUniforms(7, width).at(0, 20)
    again = PlacedUniforms(7, width)
    for start, count in ((0, 3), (3, 9), (12, 8), (5, 1)):
        assert np.array_equal(again.at(start, count), whole[start : start + count])
    assert len(np.unique(whole)) == 20 * width
    assert not np.isin(whole, PlacedUniforms(8, width).at(0, 20)).any()
    assert not np.isin(whole, [Uniforms(7, 0).at(i) for i in range(20)]).any()
    assert np.array_equal(
        PlacedUniforms(-1, width).at(0, 1), PlacedUniforms(2**64 - 1, width).at(0, 1)
    )
    assert not np.array_equal(PlacedUniforms(None, 9).at(0, 1), PlacedUniforms(None, 9).at(0, 1))


@pytest.mark.parametrize("temperature", [1e-40, 1e-46, 1e-300])
def test_the_least_temperatures_draw_the_likeliest(temperature: float) -> None:
    """In float32 they are denormal, or 0."""
    logits_NV = torch.tensor([[0.0, 3.0, 2.0, -1.0]])
    numbers_NK = np.array([[0.0, 0.5, 0.99]])
    assert bool((draw_many(logits_NV, temperature, numbers_NK) == 1).all())
    rules = DrawRules.of([SamplingParams(temperature=temperature)], 4, torch.device("cpu"))
    assert draw(logits_NV.clone(), rules, [0.99]).tokens == [1]


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


# ---- repetition penalty


@given(
    seed=st.integers(0, 2**16),
    penalty=st.floats(0.25, 4.0),
    greedy=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_a_repetition_penalty_is_that_of_transformers(
    seed: int, penalty: float, greedy: bool
) -> None:
    """Among rows without one, which draw what they would alone; logprobs are told without it."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(3, 12, generator=generator) * 3
    before_NL = torch.randint(0, 12, (3, 6), generator=generator)
    plain = SamplingParams(temperature=0.0 if greedy else 1.0)
    params = [plain, replace(plain, repetition_penalty=penalty), plain]
    seen_PV = torch.zeros(1, 12, dtype=torch.bool)
    seen_PV[0, before_NL[1]] = True
    numbers = [] if greedy else [0.3, 0.6, 0.9]
    rules = DrawRules.of(params, 12, CPU)
    drawn = draw(logits_NV.clone(), rules, numbers, seen_PV)

    processor: Any = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    theirs_NV = logits_NV.clone()
    theirs_NV[1:2] = processor(before_NL[1:2], logits_NV[1:2].clone())
    expected = draw(theirs_NV, DrawRules.of([plain] * 3, 12, CPU), numbers)
    assert drawn.tokens == expected.tokens
    logprobs_N = logits_NV.log_softmax(-1)[torch.arange(3), torch.tensor(drawn.tokens)]
    assert torch.allclose(torch.tensor(drawn.logprobs), logprobs_N, atol=1e-5)
