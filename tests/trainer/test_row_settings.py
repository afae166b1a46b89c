"""What a batch may ask of its pass, against PEFT, and mixed with others' rows against alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer import dense
from tests.trainer.conftest import MakeDriver
from tests.trainer.driver import VOCAB, Driver, batch, expect
from tests.trainer.peft_reference import PeftRun
from tests.trainer.test_numerics import moved, near
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.trainer.work import RowsBody
from twinkle_dask.types import (
    Embed,
    EmbedResult,
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
    Int32Array,
    LoraSpec,
    RunState,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT 0.21
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

SPECS = {
    "all": LoraSpec(rank=4, seed=1),
    "no head": LoraSpec(rank=2, seed=2, train_unembed=False),
    "head": LoraSpec(rank=3, seed=3, train_attn=False, train_mlp=False),
}


def started(make: MakeDriver, folder: Path, place: Path, spec: LoraSpec) -> tuple[Driver, PeftRun]:
    driver = make()
    moved(driver, "r", spec, np.random.default_rng(0))
    return driver, PeftRun(folder, driver.state("r").adapter, place)


def check_gradients(driver: Driver, reference: PeftRun) -> None:
    ours, theirs = driver.gradients("r"), reference.gradients()
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        near(ours[name], gradient)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("targets", [None, 3, VOCAB])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("raw", [False, True])
def test_scores_and_slopes(
    make: MakeDriver,
    folder: Path,
    tmp_path: Path,
    spec: LoraSpec,
    targets: int | None,
    temperature: float,
    raw: bool,
) -> None:
    """``VOCAB`` targets a position are all logits of a row, as for a loss of its own on them."""
    driver, reference = started(make, folder, tmp_path, spec)
    body = batch(np.random.default_rng(4), (9, 30, 3), targets=targets)
    body = replace(body, temperature=temperature, raw_scores=raw, want_correct=True)
    result = driver.forward_backward("r", body)
    assert result.correct is not None
    for datum, scores, correct in zip(body.data, result.logprobs, result.correct, strict=True):
        logits_NV = reference.logits(datum.tokens) / temperature
        token = torch.tensor(datum.target_tokens).view(len(logits_NV), -1)
        all_NV = logits_NV if raw else torch.log_softmax(logits_NV, -1)
        wanted = all_NV.gather(1, token).view(datum.target_tokens.shape)
        loss = -(torch.tensor(datum.loss_inputs["weights"]) * wanted).sum()
        torch.autograd.backward(loss)
        np.testing.assert_allclose(scores, wanted.detach().numpy(), rtol=1e-5, atol=2e-5)
        best = (token == logits_NV.argmax(-1, keepdim=True)).view(datum.target_tokens.shape)
        assert correct.dtype == np.bool_
        np.testing.assert_array_equal(correct, best.numpy())
    check_gradients(driver, reference)


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "gspo", "dro"])
def test_other_losses_see_the_temperature(
    make: MakeDriver, folder: Path, tmp_path: Path, loss: str
) -> None:
    """Their logprobs are those of a model whose logits were divided."""
    driver, reference = started(make, folder, tmp_path, SPECS["all"])
    body = replace(batch(np.random.default_rng(5), (9, 30), loss), temperature=1.7)
    result = driver.forward_backward("r", body)
    for datum, scores in zip(body.data, result.logprobs, strict=True):
        logits_NV = reference.logits(datum.tokens) / 1.7
        token = torch.tensor(datum.target_tokens)[:, None]
        lp = torch.log_softmax(logits_NV, -1).gather(1, token)[:, 0]
        np.testing.assert_allclose(scores, lp.detach().numpy(), rtol=1e-5, atol=2e-5)
        inputs = {k: torch.tensor(v) for k, v in datum.loss_inputs.items()}
        torch.autograd.backward(dense.loss(body, lp, inputs))
    check_gradients(driver, reference)


def test_the_base_model_alone(make: MakeDriver, folder: Path, tmp_path: Path) -> None:
    driver, reference = started(make, folder, tmp_path, SPECS["all"])
    body = batch(np.random.default_rng(6), (9, 30), backward=False)
    ours = driver.forward_backward("r", replace(body, adapter=False)).logprobs
    adapted = driver.forward_backward("r", body).logprobs
    embedded = expect(
        driver.do("r", Embed(rows=(body.data[0].tokens,), adapter=False)), EmbedResult
    )
    for datum, base, worn in zip(body.data, ours, adapted, strict=True):
        logits_NV = reference.logits(datum.tokens, adapter=False)
        token = torch.tensor(datum.target_tokens)[:, None]
        lp = torch.log_softmax(logits_NV, -1).gather(1, token)[:, 0]
        np.testing.assert_allclose(base, lp.detach().numpy(), rtol=1e-5, atol=2e-5)
        assert np.abs(base - worn).max() > 0.01
    assert embedded.embeddings.shape == (1, 64)
    assert driver.state("r").gradients is None
    refused = driver.do("r", replace(body, adapter=False, backward=True))
    assert isinstance(refused, InvalidRequest)


def rows_of(rng: np.random.Generator, lengths: list[int]) -> tuple[Int32Array, ...]:
    return tuple(rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("packed", [True, False])
def test_embeddings_and_their_gradient(
    make: MakeDriver,
    folder: Path,
    tmp_path: Path,
    spec: LoraSpec,
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver, reference = started(make, folder, tmp_path, spec)
    if not packed:
        monkeypatch.setattr(driver.trainer._base, "why_padded", "a test")  # pyright: ignore[reportPrivateUsage]
    rng = np.random.default_rng(7)
    rows = rows_of(rng, [9, 1, 30, 2])
    plain = expect(driver.do("r", Embed(rows=rows)), EmbedResult).embeddings
    assert driver.state("r").gradients is None
    slopes = tuple(rng.normal(size=64).astype(np.float32) for _ in rows)
    result = expect(driver.do("r", Embed(rows=rows, slopes=slopes)), EmbedResult)
    np.testing.assert_allclose(result.embeddings, plain, rtol=1e-5, atol=1e-6)
    assert result.embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1, rtol=1e-5)
    for row, slope, ours in zip(rows, slopes, result.embeddings, strict=True):
        normalize = torch.nn.functional.normalize
        theirs = normalize(reference.hidden(row)[-1], dim=-1)
        if theirs.requires_grad:  # an adapter of the head alone has no part in it
            torch.autograd.backward((theirs * torch.tensor(slope)).sum())
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-5)
    check_gradients(driver, reference)


def test_embeddings_without_their_slopes_are_refused(make: MakeDriver) -> None:
    driver = make()
    driver.create("r", SPECS["all"])
    rows = rows_of(np.random.default_rng(0), [3, 4])
    refused = driver.do("r", Embed(rows=rows, slopes=(np.zeros(64, np.float32),)))
    assert isinstance(refused, InvalidRequest)
    assert isinstance(driver.do("r", Embed(rows=())), InvalidRequest)


@st.composite
def works(draw: st.DrawFn) -> RowsBody:
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    backward, adapter = draw(st.sampled_from([(True, True), (False, True), (False, False)]))
    if draw(st.integers(0, 3)) == 0:
        rows = rows_of(rng, lengths)
        slopes = tuple(rng.normal(size=64).astype(np.float32) for _ in rows)
        return Embed(rows=rows, slopes=slopes if backward else None, adapter=adapter)
    loss = draw(st.sampled_from(["cross_entropy", "cross_entropy", "gspo", "ppo"]))
    many = draw(st.sampled_from([None, 3])) if loss == "cross_entropy" else None
    return replace(
        batch(rng, lengths, loss, many, backward=backward),
        adapter=adapter,
        temperature=draw(st.sampled_from([1.0, 0.7, 3.0])),
        raw_scores=loss == "cross_entropy" and draw(st.booleans()),
        want_correct=draw(st.booleans()),
    )


def close(ours: Float32Array, theirs: Float32Array) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


@settings(deadline=None, max_examples=40)
@given(
    told=st.lists(works(), min_size=2, max_size=6),
    budget=st.sampled_from([16, 64, 1000]),
    lanes=st.integers(1, 2),
)
def test_works_of_all_kinds_share_passes(
    make: MakeDriver, told: list[RowsBody], budget: int, lanes: int
) -> None:
    together = make(budget, lanes=lanes)
    specs = list(SPECS.values())
    alone: list[Driver] = []
    for number in range(len(told)):
        state = made_state(make, specs[number % 3], number)
        together.load(f"r{number}", state)
        alone.append(make(10_000))
        alone[-1].load("r", state)
    ids = [together.submit(f"r{n}", body, tenant=f"t{n % 2}") for n, body in enumerate(told)]
    outcomes = together.drain()
    for number, (work_id, body, solo) in enumerate(zip(ids, told, alone, strict=True)):
        ours, theirs = outcomes[work_id], solo.do("r", body)
        if isinstance(body, Embed):
            close(expect(ours, EmbedResult).embeddings, expect(theirs, EmbedResult).embeddings)
        else:
            compare(
                body, expect(ours, ForwardBackwardResult), expect(theirs, ForwardBackwardResult)
            )
        mine, its = together.state(f"r{number}").gradients, solo.state("r").gradients
        assert (mine is None) == (its is None) == (not body.backward)
        for name, gradient in (its or {}).items():
            near((mine or {})[name], gradient)


STATES: dict[tuple[LoraSpec, int], RunState] = {}


def made_state(make: MakeDriver, spec: LoraSpec, number: int) -> RunState:
    key = (spec, number)
    if key not in STATES:
        driver = make()
        moved(driver, "r", spec, np.random.default_rng(number))
        STATES[key] = driver.state("r")
    return STATES[key]


def compare(
    body: ForwardBackward, ours: ForwardBackwardResult, theirs: ForwardBackwardResult
) -> None:
    for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
        close(a, b)
    assert (ours.correct is None) == (theirs.correct is None) == (not body.want_correct)
    for a, b in zip(ours.correct or (), theirs.correct or (), strict=True):
        np.testing.assert_array_equal(a, b)
