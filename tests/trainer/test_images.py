"""Rows with images: mixed batches of the trainer against PEFT on the whole model.

Float32 on one thread. The reference looks at each row alone, through transformers' own forward with
pixels and PEFT's adapter; the tolerances are those of ``test_families``.
"""

import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image as PilImage
from torch import Tensor

from tests.models import SEEING_FAMILIES, encoded_image, tiny_seeing
from tests.trainer.driver import Driver, batch
from tests.trainer.test_families import run_all, state_of
from tests.trainer.test_numerics import near
from twinkle_dask.checkpoints import folders
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.loading import load_base
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.trainer.engine import Trainer, TrainerConfig
from twinkle_dask.types import (
    Datum,
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
    Image,
    LoraSpec,
    RunState,
)

hf: Any = transformers
peft_model: Any = peft.PeftModel

SPECS = (
    LoraSpec(rank=4, seed=1),
    LoraSpec(rank=1, seed=2, alpha=4.0, train_unembed=False),
    LoraSpec(rank=3, seed=4, alpha=16.0, train_mlp=False),
)
# For each run, for each row: its length, and where images begin.
ROWS: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...] = (
    ((40, (2,)), (12, ()), (60, (0, 30))),
    ((25, ()), (33, (16,))),
    ((21, (1,)),),
)
WAYS: dict[str, dict[str, Any]] = {
    "plainly": {},
    "in lanes": {"threads": 2, "lanes": 2, "lane_tokens": 1},
    "computing twice": {"checkpoint_tokens": 1},
    "in small passes": {"tokens_per_micro_batch": 48, "pass_tokens": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_seeing(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def base(folder: Path) -> BaseModel:
    return load_base(str(folder), "float32", max_rank=16)


@pytest.fixture
def driver(base: BaseModel) -> Iterator[Driver]:
    with closing(Trainer(base, TrainerConfig())) as trainer:
        yield Driver(trainer)


def seeing(base: BaseModel, datum: Datum, places: tuple[int, ...], seed: int) -> Datum:
    """The datum with images at these places, and nothing to learn in them."""
    facts = base.facts.images
    assert facts is not None
    tokens = datum.tokens.copy()
    weights = datum.loss_inputs["weights"].copy()
    images: list[Image] = []
    for number, place in enumerate(places):
        here = slice(place, place + facts.num_positions)
        tokens[here], weights[here] = facts.placeholder, 0
        data = encoded_image(seed + number, size=(40 + seed, 32))
        images.append(
            Image(position=place, format="png", data=data, num_positions=facts.num_positions)
        )
    return replace(datum, tokens=tokens, images=tuple(images), loss_inputs={"weights": weights})


def bodies_of(base: BaseModel) -> dict[str, ForwardBackward]:
    rng = np.random.default_rng(0)
    bodies: dict[str, ForwardBackward] = {}
    for run, rows in enumerate(ROWS):
        body = batch(rng, [length for length, _ in rows])
        data = [
            seeing(base, datum, places, seed=10 * run + row)
            for row, (datum, (_, places)) in enumerate(zip(body.data, rows, strict=True))
        ]
        bodies[f"r{run}"] = replace(body, data=tuple(data))
    return bodies


class Reference:
    """PEFT's adapter on transformers' model, a row at a time."""

    def __init__(self, folder: Path, state: RunState, saved: Path) -> None:
        folders.write_state(BlobStore(saved), "saved", state, base_model=str(folder))
        plain = hf.AutoModelForImageTextToText.from_pretrained(folder).eval()
        self._processor = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
        self._model = peft_model.from_pretrained(plain, str(saved / "saved"), is_trainable=True)

    def logprobs(self, datum: Datum) -> Tensor:
        inputs: dict[str, Tensor] = {}
        if datum.images:
            opened = [PilImage.open(io.BytesIO(image.data)) for image in datum.images]
            # The families that cut images up do so by default.
            names = ("do_image_splitting", "crop_to_patches")
            uncut = {name: False for name in names if hasattr(self._processor, name)}
            inputs = dict(self._processor(images=opened, return_tensors="pt", **uncut))
        tokens = torch.tensor(datum.tokens, dtype=torch.int64)[None]
        logits_NV: Tensor = self._model(input_ids=tokens, **inputs).logits[0]
        return logits_NV.log_softmax(-1).gather(1, torch.tensor(datum.target_tokens)[:, None])[:, 0]

    def forward_backward(self, body: ForwardBackward) -> list[Tensor]:
        found: list[Tensor] = []
        for datum in body.data:
            logprobs_N = self.logprobs(datum)
            loss = -(logprobs_N * torch.tensor(datum.loss_inputs["weights"])).sum()
            torch.autograd.backward(loss)
            found.append(logprobs_N.detach())
        return found

    def gradients(self) -> dict[str, Tensor]:
        return {
            name.removeprefix("base_model.model.").replace(".default.", "."): weight.grad
            for name, weight in self._model.named_parameters()
            if weight.requires_grad
        }


# PEFT asks transformers in a way that it warns of.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("family", SEEING_FAMILIES)
def test_gradients_are_those_of_peft(family: str, tmp_path: Path) -> None:
    """Of every run, while all share passes with rows of text."""
    folder = tiny_seeing(tmp_path / "model", family)
    base = load_base(str(folder), "float32", max_rank=16)
    bodies, states = bodies_of(base), {f"r{i}": state_of(base, s) for i, s in enumerate(SPECS)}
    with closing(Trainer(base, TrainerConfig())) as trainer:
        driver = Driver(trainer)
        for run, state in states.items():
            driver.load(run, state, with_optimizer=False)
        results = run_all(driver, bodies)
        for run, state in states.items():
            reference = Reference(folder, state, tmp_path / run)
            expected = reference.forward_backward(bodies[run])
            for ours, theirs in zip(results[run].logprobs, expected, strict=True):
                np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=2e-5)
            gradients, found = driver.gradients(run), reference.gradients()
            assert gradients.keys() == found.keys()
            for name, gradient in gradients.items():
                near(gradient, found[name], rel=2e-4)
            assert any(array.any() for array in gradients.values())


@pytest.mark.parametrize("way", WAYS)
def test_together_is_as_alone(way: str, base: BaseModel) -> None:
    """Whatever else is in a pass, and however it is cut."""
    bodies = bodies_of(base)
    states = {f"r{i}": state_of(base, spec) for i, spec in enumerate(SPECS)}

    def run(some: list[str], **config: Any) -> dict[str, tuple[Any, dict[str, Float32Array]]]:
        with closing(Trainer(base, TrainerConfig(**config))) as trainer:
            driver = Driver(trainer)
            for name in some:
                driver.load(name, states[name], with_optimizer=False)
            results = run_all(driver, {name: bodies[name] for name in some})
            return {name: (results[name], dict(driver.gradients(name))) for name in some}

    together = run(list(bodies), **WAYS[way])
    for name in bodies:
        ours, expected = together[name], run([name])[name]
        for a, b in zip(ours[0].logprobs, expected[0].logprobs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        for weight, gradient in expected[1].items():
            near(ours[1][weight], torch.tensor(gradient), rel=1e-4)


def test_padded_rows_see_the_same(base: BaseModel, driver: Driver) -> None:
    bodies = bodies_of(base)
    driver.load("r0", state_of(base, SPECS[0]), with_optimizer=False)
    packed = driver.forward_backward("r0", replace(bodies["r0"], backward=False))
    base.why_padded = "for this test"
    padded = driver.forward_backward("r0", replace(bodies["r0"], backward=False))
    for a, b in zip(padded.logprobs, packed.logprobs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_another_image_changes_what_comes_after_it(base: BaseModel, driver: Driver) -> None:
    driver.load("r0", state_of(base, SPECS[0]), with_optimizer=False)
    body = replace(bodies_of(base)["r0"], backward=False)
    datum = body.data[2]
    other = replace(datum.images[1], data=encoded_image(99))
    changed = replace(datum, images=(datum.images[0], other))
    (a,) = driver.forward_backward("r0", replace(body, data=(datum,))).logprobs
    (b,) = driver.forward_backward("r0", replace(body, data=(changed,))).logprobs
    assert np.array_equal(a[:30], b[:30])
    assert np.abs(a[30:] - b[30:]).max() > 1e-3


def test_a_damaged_image_fails_its_own_work_alone(base: BaseModel, driver: Driver) -> None:
    bodies = bodies_of(base)
    for i, spec in enumerate(SPECS):
        driver.load(f"r{i}", state_of(base, spec), with_optimizer=False)
    datum = bodies["r1"].data[1]
    broken = replace(datum.images[0], data=datum.images[0].data[:50])
    bad = replace(bodies["r1"], data=(bodies["r1"].data[0], replace(datum, images=(broken,))))
    ids = {run: driver.submit(run, body, run) for run, body in (bodies | {"r1": bad}).items()}
    outcomes = driver.drain()
    assert isinstance(outcomes[ids["r1"]], InvalidRequest)
    assert driver.state("r1").gradients is None
    for run in ("r0", "r2"):
        assert isinstance(outcomes[ids[run]], ForwardBackwardResult)
    # The run goes on.
    driver.forward_backward("r1", bodies["r1"])
