"""What may be asked beside the drawn tokens, each against one plain forward pass in float32.

Prompts below, at and above the prefill chunk of 32 and the pieces in which logits are made.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sampler.conftest import MakeDriver
from tests.sampler.driver import VOCAB, Driver, adapter, prompt, request, same
from tests.sampler.plain import PlainModel
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.base import BaseModel
from twinkle_dask.sampler import scoring
from twinkle_dask.sampler.engine import TorchSampler, TorchSamplerConfig
from twinkle_dask.sampler.passes import Passes
from twinkle_dask.sampler.questions import OwnLogprobs
from twinkle_dask.types import (
    CsrLayout,
    Float32Array,
    Image,
    Int64Array,
    SampleResult,
    ScoredTokens,
    TargetTokens,
)

CLOSE = 1e-4
LENGTHS = [1, 2, 31, 32, 33, 75]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_LOGITS_PER_PIECE", 7 * VOCAB)
    monkeypatch.setattr(scoring, "_LOGITS_PER_PIECE_OF_MORE", 5 * VOCAB)


def asked(
    driver: Driver, tokens: Sequence[int], max_tokens: int = 1, **wanted: Any
) -> SampleResult:
    return driver.result(driver.submit(request(tokens, max_tokens, **wanted)))


def check_top(found: ScoredTokens, logprobs_NV: Float32Array) -> None:
    """That these are the likeliest at their places, in order."""
    width = found.tokens.shape[1]
    own = np.take_along_axis(logprobs_NV, found.tokens.astype(np.int64), axis=1)
    assert np.abs(found.logprobs - own).max(initial=0) < CLOSE
    best = -np.sort(-logprobs_NV, axis=1)[:, :width]
    assert np.abs(found.logprobs - best).max(initial=0) < CLOSE
    assert (np.diff(found.logprobs, axis=1) <= 0).all()
    assert all(len(set(row)) == width for row in found.tokens.tolist())


def targets(rows: int, columns: int, seed: int = 0) -> Int64Array:
    """Half of the cells ask for nothing, and the first rows and the last do not at all."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (rows, columns))
    tokens[rng.random(tokens.shape) < 0.5] = -1
    tokens[: rows // 4] = tokens[rows - rows // 8 :] = -1
    tokens[rows // 2, 0] = 3
    return tokens


def as_csr(tokens: Int64Array) -> TargetTokens:
    rows, columns = np.nonzero(tokens >= 0)
    crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(tokens)))])
    layout = CsrLayout(crow=crow, col=columns, num_columns=tokens.shape[1])
    return TargetTokens(tokens=tokens[rows, columns], layout=layout)


def check_targets(found: Float32Array, tokens: Int64Array, logprobs_NV: Float32Array) -> None:
    expected = np.take_along_axis(logprobs_NV, np.maximum(tokens, 0), axis=1)
    assert found.dtype == np.float32
    assert np.abs(found - np.where(tokens < 0, 0, expected)).max(initial=0) < CLOSE
    assert (found[tokens < 0] == 0).all()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", [1, 4, VOCAB])
def test_likeliest_tokens_of_a_prompt(
    make: MakeDriver, plain: PlainModel, length: int, width: int
) -> None:
    tokens = prompt(length)
    result = asked(make(), tokens, topk_prompt_logprobs=width)
    assert result.prompt_logprobs is None
    top = result.topk_prompt_logprobs
    assert top is not None
    assert top.tokens.shape == top.logprobs.shape == (length, width)
    assert (top.tokens.dtype, top.logprobs.dtype) == (np.int32, np.float32)
    assert np.isnan(top.logprobs[0]).all()
    assert not top.tokens[0].any()
    rest = ScoredTokens(tokens=top.tokens[1:], logprobs=top.logprobs[1:])
    check_top(rest, plain.logprobs(tokens)[:-1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_likeliest_tokens_where_they_are_drawn(
    make: MakeDriver, plain: PlainModel, temperature: float
) -> None:
    tokens = prompt(30)
    result = asked(
        make(), tokens, 50, num_samples=3, topk_sample_logprobs=5, temperature=temperature
    )
    for sequence in result.sequences:
        assert sequence.topk_logprobs is not None
        assert sequence.topk_logprobs.tokens.shape == (50, 5)
        whole = [*tokens, *sequence.tokens.tolist()]
        check_top(sequence.topk_logprobs, plain.logprobs(whole)[len(tokens) - 1 : -1])
        if not temperature:
            assert sequence.tokens.tolist() == sequence.topk_logprobs.tokens[:, 0].tolist()
            assert np.array_equal(sequence.logprobs, sequence.topk_logprobs.logprobs[:, 0])


@pytest.mark.parametrize("length", LENGTHS[1:])
@pytest.mark.parametrize("csr", [False, True])
def test_named_tokens(make: MakeDriver, plain: PlainModel, length: int, csr: bool) -> None:
    tokens, wanted = prompt(length), targets(length - 1, 3)
    named = as_csr(wanted) if csr else TargetTokens(tokens=wanted)
    found = asked(make(), tokens, target_prompt_logprobs=named).target_prompt_logprobs
    assert found is not None
    logprobs = found.logprobs
    assert logprobs.shape == named.tokens.shape
    assert found.layout is named.layout
    if found.layout is not None:
        dense = np.zeros(wanted.shape, np.float32)
        rows = np.repeat(np.arange(length - 1), np.diff(found.layout.crow))
        dense[rows, found.layout.col] = logprobs
        logprobs = dense
    check_targets(logprobs, wanted, plain.logprobs(tokens)[:-1])


@pytest.mark.parametrize("last_n", [1, 2, 20, 40, 74])
def test_only_the_last_tokens_of_a_prompt(make: MakeDriver, plain: PlainModel, last_n: int) -> None:
    """It does not touch the other questions."""
    tokens, wanted = prompt(75), targets(74, 2)
    result = asked(
        make(),
        tokens,
        prompt_logprobs=True,
        prompt_logprobs_last_n=last_n,
        topk_prompt_logprobs=2,
        target_prompt_logprobs=TargetTokens(tokens=wanted),
        prompt_alt_tokens_k=2,
    )
    expected_NV = plain.logprobs(tokens)[:-1]
    scored, top = result.prompt_logprobs, result.topk_prompt_logprobs
    assert scored is not None
    assert np.isnan(scored[:-last_n]).all()
    own = plain.of_tokens(tokens[:1], tokens[1:])
    assert np.abs(scored[-last_n:] - own[-last_n:]).max() < CLOSE
    assert top is not None
    assert np.isnan(top.logprobs[:-last_n]).all()
    assert not top.tokens[:-last_n].any()
    rest = ScoredTokens(tokens=top.tokens[-last_n:], logprobs=top.logprobs[-last_n:])
    check_top(rest, expected_NV[-last_n:])
    assert result.target_prompt_logprobs is not None
    check_targets(result.target_prompt_logprobs.logprobs, wanted, expected_NV)
    assert result.prompt_alt_tokens is not None
    assert not np.isnan(result.prompt_alt_tokens.logprobs).any()


def test_what_is_not_wanted_is_not_computed(
    make: MakeDriver, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[int] = []

    def note(self: scoring.PromptScores, logits: Any, here: Any) -> None:
        places.extend(here.tolist())

    monkeypatch.setattr(scoring.PromptScores, "_score", note)
    asked(make(), prompt(75), prompt_logprobs=True, prompt_logprobs_last_n=3)
    assert places == [72, 73, 74]
    places.clear()
    wanted = np.full((74, 1), -1)
    wanted[[4, 40], 0] = 7
    asked(make(), prompt(75), target_prompt_logprobs=TargetTokens(tokens=wanted))
    assert places == [5, 41]
    places.clear()
    asked(make(), prompt(75), topk_sample_logprobs=3)
    assert places == []


def test_placeholders_of_images_are_not_scored() -> None:
    images = tuple(
        Image(position=position, num_positions=number, format="png", data=b"")
        for position, number in ((2, 3), (5, 1), (8, 2))
    )
    tokens = np.zeros(11, np.int32)
    assert OwnLogprobs(tokens, 1, images).places().tolist() == [1, 6, 7, 10]
    assert OwnLogprobs(tokens, 7, images).places().tolist() == [7, 10]
    assert OwnLogprobs(tokens, 1).places().tolist() == list(range(1, 11))


@pytest.mark.parametrize("length", LENGTHS)
def test_alternatives_are_of_their_places(make: MakeDriver, plain: PlainModel, length: int) -> None:
    tokens = prompt(length)
    found = asked(make(), tokens, prompt_alt_tokens_k=6).prompt_alt_tokens
    assert found is not None
    assert found.tokens.shape == found.logprobs.shape == (length - 1, 6)
    assert (found.tokens.dtype, found.logprobs.dtype) == (np.int32, np.float32)
    expected_NV = plain.logprobs(tokens)[:-1]
    own = np.take_along_axis(expected_NV, found.tokens.astype(np.int64), axis=1)
    assert np.abs(found.logprobs - own).max(initial=0) < CLOSE


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.0])
def test_alternatives_have_the_temperatures_distribution(
    make: MakeDriver, plain: PlainModel, temperature: float
) -> None:
    """20,000 draws at each of three places; top_k and top_p of the request do not matter."""
    tokens, number = prompt(4), 20_000
    found = asked(
        make(), tokens, prompt_alt_tokens_k=number, temperature=temperature, top_k=2, top_p=0.5
    ).prompt_alt_tokens
    assert found is not None
    weights_NV = np.exp(plain.logprobs(tokens)[:-1].astype(np.float64) / temperature)
    for drawn, weights in zip(found.tokens, weights_NV, strict=True):
        probs = weights / weights.sum()
        shares = np.bincount(drawn, minlength=VOCAB) / number
        assert (np.abs(shares - probs) < 5 * np.sqrt(probs / number) + 1e-4).all()


def test_greedy_alternatives_are_the_likeliest(make: MakeDriver) -> None:
    result = asked(make(), prompt(40), prompt_alt_tokens_k=3, topk_prompt_logprobs=1, temperature=0)
    assert result.prompt_alt_tokens is not None
    assert result.topk_prompt_logprobs is not None
    likeliest = result.topk_prompt_logprobs.tokens[1:]
    assert (result.prompt_alt_tokens.tokens == likeliest).all()


def test_alternatives_repeat_with_their_seed_in_any_company(
    make: MakeDriver, plain: PlainModel
) -> None:
    def draw(driver: Driver, seed: int | None, num_samples: int = 1) -> list[list[int]]:
        wanted: dict[str, Any] = {"prompt_alt_tokens_k": 5, "num_samples": num_samples}
        found = asked(driver, prompt(60), seed=seed, temperature=0.3, **wanted).prompt_alt_tokens
        assert found is not None
        return found.tokens.tolist()

    driver = make()
    first = draw(driver, 4)
    for i in range(5):
        driver.submit(request(prompt(20 + i, i), 20, prompt_alt_tokens_k=2))
    assert draw(driver, 4, num_samples=3) == first
    assert draw(make(prefill_tokens=9), 4) == first
    assert draw(driver, 5) != first
    assert draw(driver, None) != draw(driver, None)
    # Not the numbers with which the samples themselves are drawn.
    alone = driver.sample(request(prompt(60), 8, seed=4))
    with_alternatives = driver.sample(request(prompt(60), 8, seed=4, prompt_alt_tokens_k=5))
    assert same(alone, with_alternatives)


def test_everything_at_once_in_a_mixed_batch(
    make: MakeDriver, plain: PlainModel, base: BaseModel
) -> None:
    """Adapters and the base model, short and long, with and without questions."""
    driver = make()
    states = {f"a{i}": adapter(base, i, rank=2 + 3 * i) for i in range(2)}
    for key, state in states.items():
        driver.sampler.add_adapter(key, state)
    keys = [None, "a0", "a1", "a0", None, "a1"]
    prompts = [prompt(3 + 11 * i, i) for i in range(len(keys))]
    ids: list[str] = []
    for i, (tokens, key) in enumerate(zip(prompts, keys, strict=True)):
        driver.submit(request(tokens, 9, seed=i), key)
        wanted: dict[str, Any] = {
            "prompt_logprobs": i % 2 == 0,
            "topk_prompt_logprobs": i,
            "topk_sample_logprobs": 6 - i,
            "target_prompt_logprobs": TargetTokens(tokens=targets(len(tokens) - 1, 2, i)),
            "prompt_alt_tokens_k": i % 3,
        }
        ids.append(driver.submit(request(tokens, 9, seed=i, num_samples=2, **wanted), key))
    for i, (tokens, key) in enumerate(zip(prompts, keys, strict=True)):
        result = driver.result(ids[i])
        state = None if key is None else states[key]
        expected_NV = plain.logprobs(tokens, state)[:-1]
        assert (result.prompt_logprobs is None) == bool(i % 2)
        if (top := result.topk_prompt_logprobs) is not None:
            rest = ScoredTokens(tokens=top.tokens[1:], logprobs=top.logprobs[1:])
            check_top(rest, expected_NV)
        assert (top is None) == (i == 0)
        assert result.target_prompt_logprobs is not None
        wanted_tokens = targets(len(tokens) - 1, 2, i)
        check_targets(result.target_prompt_logprobs.logprobs, wanted_tokens, expected_NV)
        assert (result.prompt_alt_tokens is None) == (i % 3 == 0)
        for sequence in result.sequences:
            assert sequence.topk_logprobs is not None
            whole = [*tokens, *sequence.tokens.tolist()]
            check_top(sequence.topk_logprobs, plain.logprobs(whole, state)[len(tokens) - 1 : -1])
        plainly = driver.sample(request(tokens, 9, seed=i), key)
        assert plainly.topk_logprobs is None
        assert same(plainly, result.sequences[0])


def test_sequences_that_lose_their_rows_keep_their_answers(make: MakeDriver) -> None:
    """Memory for about three sequences of 60 tokens, and seven of two tenants."""
    wanted: dict[str, Any] = {
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 3,
        "topk_sample_logprobs": 3,
        "prompt_alt_tokens_k": 3,
        "num_samples": 3,
    }
    prompts = [prompt(20 + i, i) for i in range(5)]
    roomy, tight = make(), make(max_kv_bytes=512 * 256)
    ids = [
        tight.submit(request(tokens, 35, seed=i, **wanted), tenant=f"t{i % 2}")
        for i, tokens in enumerate(prompts)
    ]
    for i, (tokens, work_id) in enumerate(zip(prompts, ids, strict=True)):
        one = tight.result(work_id)
        other = roomy.result(roomy.submit(request(tokens, 35, seed=i, **wanted)))
        for mine, theirs in zip(one.sequences, other.sequences, strict=True):
            assert same(mine, theirs)
            check_same(mine.topk_logprobs, theirs.topk_logprobs)
        check_same(one.topk_prompt_logprobs, other.topk_prompt_logprobs)
        check_same(one.prompt_alt_tokens, other.prompt_alt_tokens)


def check_same(one: ScoredTokens | None, other: ScoredTokens | None) -> None:
    assert one is not None
    assert other is not None
    assert one.tokens.tolist() == other.tokens.tolist()
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=CLOSE)


def test_a_prefill_that_fails_in_company_answers_alone(
    make: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, prefill = make(), Passes.prefill

    def fail_together(self: Passes, jobs: Any, length: int) -> Any:
        if len(jobs) > 1:
            raise RuntimeError("not together")
        return prefill(self, jobs, length)

    wanted: dict[str, Any] = {"prompt_logprobs": True, "prompt_alt_tokens_k": 2}
    expected = asked(driver, prompt(12), seed=1, **wanted)
    monkeypatch.setattr(Passes, "prefill", fail_together)
    ids = [driver.submit(request(prompt(12), 1, seed=1, **wanted)) for _ in range(2)]
    for work_id in ids:
        result = driver.result(work_id)
        assert result.prompt_logprobs is not None
        assert expected.prompt_logprobs is not None
        np.testing.assert_allclose(result.prompt_logprobs, expected.prompt_logprobs, atol=CLOSE)
        check_same(result.prompt_alt_tokens, expected.prompt_alt_tokens)


@pytest.mark.parametrize(
    "wanted",
    [
        {"topk_prompt_logprobs": VOCAB + 1},
        {"topk_prompt_logprobs": -1},
        {"topk_sample_logprobs": VOCAB + 1},
        {"topk_sample_logprobs": -1},
        {"prompt_alt_tokens_k": -1},
        {"target_prompt_logprobs": TargetTokens(tokens=np.full((3, 2), VOCAB))},
        {"target_prompt_logprobs": TargetTokens(tokens=np.zeros((4, 2), np.int64))},
        {"target_prompt_logprobs": TargetTokens(tokens=np.zeros(3, np.int64))},
        {
            "target_prompt_logprobs": TargetTokens(
                tokens=np.zeros(3, np.int64),
                layout=CsrLayout(crow=np.arange(3), col=np.zeros(2, np.int64), num_columns=1),
            )
        },
    ],
    ids=str,
)
def test_a_question_without_an_answer_fails_its_request_alone(
    make: MakeDriver, wanted: dict[str, Any]
) -> None:
    driver = make()
    other = driver.submit(request(prompt(4), 3, topk_sample_logprobs=2))
    driver.failure(driver.submit(request(prompt(4), 3, **wanted)), InvalidRequest)
    driver.result(other)


@given(
    length=st.integers(2, 40),
    last_n=st.none() | st.integers(1, 39),
    width=st.integers(0, 4),
    seed=st.integers(0, 1000),
    csr=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_questions_any_prompt(
    plain: PlainModel,
    shared_driver: Driver,
    length: int,
    last_n: int | None,
    width: int,
    seed: int,
    csr: bool,
) -> None:
    tokens, wanted = prompt(length, seed), targets(length - 1, 2, seed)
    result = asked(
        shared_driver,
        tokens,
        prompt_logprobs=True,
        prompt_logprobs_last_n=None if last_n is None else min(last_n, length - 1),
        topk_prompt_logprobs=width,
        target_prompt_logprobs=as_csr(wanted) if csr else TargetTokens(tokens=wanted),
        prompt_alt_tokens_k=width,
    )
    expected_NV = plain.logprobs(tokens)[:-1]
    first = 1 if last_n is None else length - min(last_n, length - 1)
    own = expected_NV[np.arange(length - 1), tokens[1:]]
    assert result.prompt_logprobs is not None
    assert np.isnan(result.prompt_logprobs[:first]).all()
    assert np.abs(result.prompt_logprobs[first:] - own[first - 1 :]).max() < CLOSE
    if width:
        assert result.topk_prompt_logprobs is not None
        top = result.topk_prompt_logprobs
        assert (np.isnan(top.logprobs).all(axis=1) == (np.arange(length) < first)).all()
        rest = ScoredTokens(tokens=top.tokens[first:], logprobs=top.logprobs[first:])
        check_top(rest, expected_NV[first - 1 :])
    assert result.target_prompt_logprobs is not None
    listed = expected_NV[np.nonzero(wanted >= 0)[0], wanted[wanted >= 0]]
    flat = result.target_prompt_logprobs.logprobs
    found = flat if csr else flat[wanted >= 0]
    assert np.abs(found - listed).max() < CLOSE


@pytest.fixture(scope="module")
def shared_driver(base: BaseModel) -> Driver:
    config = TorchSamplerConfig(max_kv_bytes=2**22, prefill_tokens=16, lane_tokens=(64,))
    return Driver(TorchSampler(base, config))
