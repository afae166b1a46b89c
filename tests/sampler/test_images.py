"""Prompts with images: the torch sampler against transformers' own forward with pixels."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as PilImage

from tests.models import encoded_image, tiny_seeing
from tests.sampler.driver import Driver, adapter, prompt, request, same
from tests.sampler.plain import deltas
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.loading import load_base
from twinkle_dask.sampler.engine import TorchSampler, TorchSamplerConfig
from twinkle_dask.types import AdapterState, Float32Array, Image, SampleRequest

_hf: Any = transformers
POSITIONS = 16
PLACEHOLDER = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_seeing(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return load_base(str(folder), "float32", max_rank=16)


def sampler_of(base: BaseModel, **config: Any) -> Driver:
    """With chunks that are shorter than an image, unless told otherwise."""
    small: dict[str, Any] = {"max_kv_bytes": 2**22, "prefill_tokens": 7, "lane_tokens": (64,)}
    return Driver(TorchSampler(base, TorchSamplerConfig(**small | config)))


def seeing(
    length: int, *places: int, seed: int = 0, max_tokens: int = 6, **wanted: Any
) -> SampleRequest:
    """A prompt with images at these places."""
    tokens = [token + 1 for token in prompt(length, seed)]
    tokens = [min(token, 511) for token in tokens]
    images: list[Image] = []
    for number, place in enumerate(places):
        tokens[place : place + POSITIONS] = [PLACEHOLDER] * POSITIONS
        data = encoded_image(seed + number)
        images.append(Image(position=place, format="png", data=data, num_positions=POSITIONS))
    return request(tokens, max_tokens, images=tuple(images), **wanted)


def plain_logprobs(
    folder: Path, asked: SampleRequest, tokens: list[int], state: AdapterState | None = None
) -> Float32Array:
    """Log softmax (N, V) over the prompt and ``tokens``, of the whole model at once."""
    model = _hf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = _hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        for path, delta in ({} if state is None else deltas(state)).items():
            model.get_submodule(path).weight += delta
        opened = [PilImage.open(io.BytesIO(image.data)) for image in asked.images]
        ids = torch.tensor([[*asked.prompt.tolist(), *tokens]])
        inputs: Any = processor(images=opened, return_tensors="pt")
        logits: Any = model(input_ids=ids, **inputs).logits[0]
        return np.array(logits.log_softmax(-1).numpy())


@pytest.mark.parametrize("places", [(0,), (5,), (3, 30), (20, 36)])
@pytest.mark.parametrize("worn", [False, True])
def test_greedy_tokens_and_their_logprobs(
    places: tuple[int, ...], worn: bool, folder: Path, base: BaseModel
) -> None:
    driver = sampler_of(base)
    state = adapter(base, seed=1) if worn else None
    if state is not None:
        driver.sampler.add_adapter("worn", state)
    asked = seeing(60, *places, temperature=0.0)
    got = driver.sample(asked, "worn" if worn else None)
    expected = plain_logprobs(folder, asked, got.tokens.tolist(), state)[59:-1]
    assert expected.argmax(-1).tolist() == got.tokens.tolist()
    found = expected[np.arange(len(got.tokens)), got.tokens]
    np.testing.assert_allclose(got.logprobs, found, atol=1e-4)


def test_prompt_logprobs_are_as_long_as_what_the_model_reads(folder: Path, base: BaseModel) -> None:
    """None for the places of an image, whose placeholder nobody wrote; one for what follows it."""
    asked = seeing(40, 4, prompt_logprobs=True, max_tokens=1)
    driver = sampler_of(base)
    found = driver.result(driver.submit(asked)).prompt_logprobs
    assert found is not None
    assert np.flatnonzero(np.isnan(found)).tolist() == [0, *range(4, 4 + POSITIONS)]
    expected = plain_logprobs(folder, asked, [])
    places = np.flatnonzero(~np.isnan(found))
    np.testing.assert_allclose(found[places], expected[places - 1, asked.prompt[places]], atol=1e-4)


def test_images_and_text_share_passes(base: BaseModel) -> None:
    asks = [
        seeing(40, 4, seed=1),
        request(prompt(30, 2), 6),
        seeing(50, 0, 20, seed=3, num_samples=2),
        request(prompt(9, 4), 6),
        seeing(40, 4, seed=5),
    ]
    wide = {"prefill_tokens": 256}
    alone: list[Any] = []
    for asked in asks:
        driver = sampler_of(base)
        alone.append(driver.result(driver.submit(asked)).sequences)
    for config in ({}, wide):
        driver = sampler_of(base, **config)
        ids = [driver.submit(asked, tenant=f"t{i}") for i, asked in enumerate(asks)]
        for work_id, expected in zip(ids, alone, strict=True):
            for ours, theirs in zip(driver.result(work_id).sequences, expected, strict=True):
                assert same(ours, theirs)


def test_who_loses_its_slot_sees_the_image_again(base: BaseModel) -> None:
    """Memory for a few sequences only: they are prefilled anew, with what they have drawn."""
    asks = [seeing(40, 4, seed=i, max_tokens=60) for i in range(6)]
    roomy = sampler_of(base, max_kv_bytes=2**24)
    expected = [roomy.sample(asked) for asked in asks]
    # A token takes 512 bytes here.
    driver = sampler_of(base, max_kv_bytes=300 * 512)
    ids = [driver.submit(asked, tenant=f"t{i}") for i, asked in enumerate(asks)]
    driver.drain()
    again = driver.sampler.tokens_done > sum(len(asked.prompt) + 60 for asked in asks)
    assert again, "nothing was prefilled again"
    for work_id, one in zip(ids, expected, strict=True):
        assert same(driver.result(work_id).sequences[0], one)


def test_a_drawn_placeholder_is_a_token_like_others(folder: Path, base: BaseModel) -> None:
    tokens = [*prompt(10), PLACEHOLDER, 7]
    got = sampler_of(base).sample(request(tokens, 3, temperature=0.0))
    asked = request(tokens, 3)
    model = _hf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        ids = torch.tensor([[*asked.prompt.tolist(), *got.tokens.tolist()]])
        expected: Any = model(input_ids=ids).logits[0].argmax(-1)
    assert got.tokens.tolist() == expected[11:-1].tolist()


def test_a_damaged_image_fails_its_own_request(base: BaseModel) -> None:
    driver = sampler_of(base, prefill_tokens=256)
    good, text = seeing(40, 4), request(prompt(9), 4)
    image = good.images[0]
    broken = Image(
        position=4, format="png", data=image.data[:60], num_positions=image.num_positions
    )
    bad = seeing(40, 4)
    bad = SampleRequest(prompt=bad.prompt, params=bad.params, images=(broken,))
    ids = [driver.submit(asked, tenant=f"t{i}") for i, asked in enumerate((good, bad, text))]
    assert "cannot be decoded" in driver.failure(ids[1], InvalidRequest).message
    for place in (0, 2):
        driver.result(ids[place])
