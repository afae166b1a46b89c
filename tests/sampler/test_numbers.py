"""Tokens and logprobs against plain transformers, in float32.

Tolerance 1e-4 on logprobs of about -6: the same products in another order (cached and in batches,
``W x + B (A x)`` instead of ``(W + B A) x``) differ by some 1e-6 here.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.models import tiny_gemma3, tiny_llama, tiny_mistral
from tests.sampler.conftest import MakeDriver
from tests.sampler.driver import VOCAB, Driver, adapter, prompt, request, same
from tests.sampler.plain import PlainModel
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.loading import load_base
from twinkle_dask.sampler.engine import TorchSampler, TorchSamplerConfig
from twinkle_dask.types import SampledSequence, Stop

CLOSE = 1e-4


def test_greedy_is_what_transformers_generates(make: MakeDriver, plain: PlainModel) -> None:
    tokens = prompt(11)
    found = make().sample(request(tokens, 40, temperature=0, stop=Stop()))
    assert found.tokens.tolist() == plain.generate(tokens, 40)


def test_a_repetition_penalty_generates_what_transformers_does(
    make: MakeDriver, plain: PlainModel
) -> None:
    """Across chunks of the prompt and lanes, beside a request without one."""
    driver, tokens = make(), prompt(40)
    others = [driver.submit(request(prompt(9, i), 40, temperature=0)) for i in range(3)]
    asked = request(tokens, 40, temperature=0, repetition_penalty=1.5, stop=Stop())
    found = driver.sample(asked)
    assert found.tokens.tolist() == plain.generate(tokens, 40, repetition_penalty=1.5)
    assert found.tokens.tolist() != plain.generate(tokens, 40)
    expected = plain.of_tokens(tokens, found.tokens.tolist())
    assert np.abs(found.logprobs - expected).max() < CLOSE
    alone = make().sample(request(prompt(9, 1), 40, temperature=0))
    assert same(driver.result(others[1]).sequences[0], alone)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 70])
def test_logprobs_of_base_model(make: MakeDriver, plain: PlainModel, length: int) -> None:
    """Prompts below, at and above the prefill chunk of 32; outputs that change lanes at 64."""
    tokens = prompt(length)
    found = make().sample(request(tokens, 40, temperature=0.7, top_k=-1))
    expected = plain.of_tokens(tokens, found.tokens.tolist())
    assert np.abs(found.logprobs - expected).max() < CLOSE


def test_logprobs_with_adapter(make: MakeDriver, plain: PlainModel, base: BaseModel) -> None:
    driver, state, tokens = make(), adapter(base, 1), prompt(40)
    driver.sampler.add_adapter("a", state)
    found = driver.sample(request(tokens, 12, temperature=0), "a")
    assert found.tokens.tolist() == plain.greedy(tokens, 12, state)
    expected = plain.of_tokens(tokens, found.tokens.tolist(), state)
    assert np.abs(found.logprobs - expected).max() < CLOSE
    assert np.abs(found.logprobs - plain.of_tokens(tokens, found.tokens.tolist())).max() > 0.01


def test_mixed_adapters_in_one_batch_equal_each_alone(
    make: MakeDriver, plain: PlainModel, base: BaseModel
) -> None:
    driver = make()
    states = {f"a{i}": adapter(base, i, rank=2 + 3 * i) for i in range(3)}
    for key, state in states.items():
        driver.sampler.add_adapter(key, state)
    keys = ["a0", None, "a1", "a2", "a0", "a1", None, "a2"]
    asked = [request(prompt(5 + 7 * i, i), 10 + 3 * i, seed=i) for i in range(len(keys))]
    ids = [driver.submit(one, key) for one, key in zip(asked, keys, strict=True)]
    for one, key, work_id in zip(asked, keys, ids, strict=True):
        (found,) = driver.result(work_id).sequences
        assert same(found, driver.sample(one, key))
        state = None if key is None else states[key]
        expected = plain.of_tokens(one.prompt.tolist(), found.tokens.tolist(), state)
        assert np.abs(found.logprobs - expected).max() < CLOSE


@pytest.mark.parametrize("length", [1, 2, 32, 33, 75])
def test_prompt_logprobs(make: MakeDriver, plain: PlainModel, base: BaseModel, length: int) -> None:
    driver, state, tokens = make(), adapter(base, 3), prompt(length)
    driver.sampler.add_adapter("a", state)
    asked = request(tokens, 1, prompt_logprobs=True)
    others = [driver.submit(request(prompt(5, i), 3)) for i in range(3)]
    scored = driver.result(driver.submit(asked, "a")).prompt_logprobs
    assert scored is not None
    assert scored.dtype == np.float32
    assert scored.shape == (length,)
    assert np.isnan(scored[0])
    expected = plain.of_tokens(tokens[:1], tokens[1:], state) if length > 1 else np.zeros(0)
    assert np.abs(scored[1:] - expected).max(initial=0) < CLOSE
    assert driver.result(others[0]).prompt_logprobs is None


def test_scoring_in_pieces(
    make: MakeDriver, plain: PlainModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinkle_dask.sampler.scoring._LOGITS_PER_PIECE", 3 * VOCAB)
    tokens = prompt(50)
    driver = make()
    scored = driver.result(driver.submit(request(tokens, 1, prompt_logprobs=True))).prompt_logprobs
    assert scored is not None
    assert np.abs(scored[1:] - plain.of_tokens(tokens[:1], tokens[1:])).max() < CLOSE


@pytest.mark.parametrize("make_folder", [tiny_llama, tiny_mistral, tiny_gemma3])
def test_other_architectures(tmp_path: Path, make_folder: Callable[[Path], Path]) -> None:
    """An untied head; a sliding window of 16 in all layers; windows in every other layer.

    Rows of different lengths decode together, past the window's end.
    """
    folder = make_folder(tmp_path / "model")
    base, plain = load_base(str(folder), "float32", max_rank=8), PlainModel(folder)
    config = TorchSamplerConfig(max_kv_bytes=2**22, prefill_tokens=24, lane_tokens=(32,))
    driver, state = Driver(TorchSampler(base, config)), adapter(base, 5)
    driver.sampler.add_adapter("a", state)
    prompts = [prompt(length, length) for length in (3, 14, 17, 50)]
    ids = [driver.submit(request(tokens, 25), "a") for tokens in prompts]
    for tokens, work_id in zip(prompts, ids, strict=True):
        (found,) = driver.result(work_id).sequences
        expected = plain.of_tokens(tokens, found.tokens.tolist(), state)
        assert np.abs(found.logprobs - expected).max() < CLOSE


def test_bfloat16_logprobs_are_near(folder: Path, plain: PlainModel) -> None:
    """To 0.05: bfloat16 keeps 8 bits, and logits here are of the order of 1."""
    base = load_base(str(folder), "bfloat16", max_rank=16)
    driver, state = Driver(TorchSampler(base, TorchSamplerConfig())), adapter(base, 1)
    driver.sampler.add_adapter("a", state)
    found = driver.sample(request(prompt(40), 20), "a")
    expected = plain.of_tokens(prompt(40), found.tokens.tolist(), state)
    assert np.abs(found.logprobs - expected).max() < 0.05


def test_results_have_the_promised_types(make: MakeDriver) -> None:
    found: SampledSequence = make().sample(request(prompt(4), 3))
    assert (found.tokens.dtype, found.logprobs.dtype) == (np.int32, np.float32)
    assert found.tokens.shape == found.logprobs.shape == (3,)
