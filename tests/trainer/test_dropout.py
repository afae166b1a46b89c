"""Dropout of an adapter's inputs, against PEFT with the same numbers left out."""

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer import dense
from tests.trainer.conftest import MakeDriver
from tests.trainer.driver import Driver, batch, expect
from tests.trainer.peft_reference import DroppingPeftRun
from tests.trainer.test_numerics import near
from tests.trainer.test_row_settings import rows_of
from twinkle_dask.model.dropout import Dropout
from twinkle_dask.types import Embed, EmbedResult, ForwardBackwardResult, LoraSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT 0.21
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

CPU = torch.device("cpu")
SPECS = {
    "all": LoraSpec(rank=4, seed=1, dropout=0.3),
    "named": LoraSpec(
        rank=2, seed=1, dropout=0.5, rslora=True, alpha=3.0, targets=("q_proj", "mlp.down_proj")
    ),
    "head": LoraSpec(rank=3, seed=1, dropout=0.1, targets=("lm_head",)),
}


def started(driver: Driver, spec: LoraSpec) -> None:
    """A run whose B is no longer zero."""
    driver.create("r", spec)
    driver.forward_backward("r", batch(np.random.default_rng(0)))
    driver.step("r")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"lanes": 2},
        {"checkpoint_tokens": 1},
        {"tokens_per_micro_batch": 10},
        {"padded": True},
    ],
    ids=str,
)
def test_what_is_left_out(
    make: MakeDriver,
    folder: Path,
    tmp_path: Path,
    spec: LoraSpec,
    how: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However the passes are cut, scores and gradients are PEFT's."""
    padded = how.get("padded", False)
    driver = make(**{key: value for key, value in how.items() if key != "padded"})
    if padded:
        monkeypatch.setattr(driver.trainer._base, "why_padded", "a test")  # pyright: ignore[reportPrivateUsage]
    started(driver, spec)
    reference = DroppingPeftRun(folder, driver.state("r").adapter, tmp_path)
    body = replace(batch(np.random.default_rng(2), (9, 1, 30, 17)), dropout_seed=77)
    scored = driver.forward_backward("r", replace(body, backward=False))
    result = driver.forward_backward("r", body)
    plain = driver.forward_backward("r", replace(body, backward=False, dropout_seed=None))
    for row, datum in enumerate(body.data):
        reference.dropping((77, row))
        token = torch.tensor(datum.target_tokens)[:, None]
        lp = torch.log_softmax(reference.logits(datum.tokens), -1).gather(1, token)[:, 0]
        inputs = {k: torch.tensor(v) for k, v in datum.loss_inputs.items()}
        torch.autograd.backward(dense.loss(body, lp, inputs))
        for ours in (result, scored):
            np.testing.assert_allclose(ours.logprobs[row], lp.detach(), rtol=2e-5, atol=2e-5)
        assert np.abs(plain.logprobs[row] - result.logprobs[row]).max() > 1e-4
        reference.dropping(None)
        with torch.no_grad():
            lp = torch.log_softmax(reference.logits(datum.tokens), -1).gather(1, token)[:, 0]
        np.testing.assert_allclose(plain.logprobs[row], lp, rtol=2e-5, atol=2e-5)
    gradients = driver.gradients("r")
    for name, gradient in reference.gradients().items():
        near(gradients[name], gradient)


def test_embeddings_leave_out_the_same(make: MakeDriver, folder: Path, tmp_path: Path) -> None:
    driver = make()
    started(driver, SPECS["all"])
    reference = DroppingPeftRun(folder, driver.state("r").adapter, tmp_path)
    rng = np.random.default_rng(3)
    rows = rows_of(rng, [4, 20])
    slopes = tuple(rng.normal(size=64).astype(np.float32) for _ in rows)
    body = Embed(rows=rows, slopes=slopes, dropout_seed=5)
    result = expect(driver.do("r", body), EmbedResult)
    for index, (row, slope) in enumerate(zip(rows, slopes, strict=True)):
        reference.dropping((5, index))
        theirs = torch.nn.functional.normalize(reference.hidden(row)[-1], dim=-1)
        torch.autograd.backward((theirs * torch.tensor(slope)).sum())
        near(result.embeddings[index], theirs.detach())
    gradients = driver.gradients("r")
    for name, gradient in reference.gradients().items():
        near(gradients[name], gradient)


def test_neighbours_do_not_show(make: MakeDriver) -> None:
    """Beside others with and without dropout, the same as alone."""
    bodies = [
        replace(batch(np.random.default_rng(n), (9, 30, 3)), dropout_seed=seed)
        for n, seed in enumerate([1, None, 2, 1])
    ]
    specs = [SPECS["all"], LoraSpec(rank=4, seed=3), SPECS["named"], LoraSpec(rank=1, seed=1)]
    together = make()
    for number, spec in enumerate(specs):
        together.create(f"r{number}", spec)
    ids = [together.submit(f"r{n}", body, f"t{n % 2}") for n, body in enumerate(bodies)]
    outcomes = together.drain()
    for number, (spec, body) in enumerate(zip(specs, bodies, strict=True)):
        alone = make(10_000)
        alone.create("r", spec)
        theirs = alone.forward_backward("r", body)
        ours = expect(outcomes[ids[number]], ForwardBackwardResult)
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
        for name, gradient in alone.gradients("r").items():
            near(together.gradients(f"r{number}")[name], gradient)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_draws_are_even_and_independent(share: float) -> None:
    """Shares within 5 deviations of 400 * 300 draws, in all and by what a draw goes by."""
    drop = Dropout.of(share, 3, [0, 1], [200, 200], CPU)
    kept = drop.kept(300, "a.q_proj").double()
    deviation = (share * (1 - share)) ** 0.5
    assert abs(float(kept.mean()) - (1 - share)) < 5 * deviation / kept.numel() ** 0.5
    for along in (0, 1):
        means = kept.mean(along)
        assert float((means - (1 - share)).abs().max()) < 5 * deviation / kept.shape[along] ** 0.5
    others = [
        drop.kept(300, "a.k_proj"),
        Dropout.of(share, 4, [0, 1], [200, 200], CPU).kept(300, "a.q_proj"),
        Dropout.of(share, 3, [1, 0], [200, 200], CPU).kept(300, "a.q_proj"),
        drop.kept(301, "a.q_proj")[:, 1:],
        torch.roll(drop.kept(300, "a.q_proj"), 1, 0),
    ]
    for other in others:
        both = ((kept - 1 + share) * (other.double() - 1 + share)).mean() / deviation**2
        assert abs(float(both)) < 5 / kept.numel() ** 0.5


def test_a_draw_goes_by_its_own_place_alone() -> None:
    whole = Dropout.of(0.4, 9, [4, 7], [5, 8], CPU).kept(50, "p")
    assert torch.equal(whole[5:], Dropout.of(0.4, 9, [7], [8], CPU).kept(50, "p"))
    assert torch.equal(whole[5:8], Dropout.of(0.4, 9, [7], [3], CPU).kept(50, "p"))
    assert torch.equal(whole[:, :13], Dropout.of(0.4, 9, [4, 7], [5, 8], CPU).kept(13, "p"))
    none = Dropout.of(0.0, 9, [4], [5], CPU).kept(50, "p")
    assert none.all()


def test_the_draws_are_those_of_splitmix() -> None:
    """In plain integers, so that what a journal was computed with stays the same for ever."""
    mask = 2**64 - 1
    step = 0x9E3779B97F4A7C15

    def hashed(text: str) -> int:
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")

    def mixed(word: int) -> int:
        word &= mask
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ word >> 27) * 0x94D049BB133111EB & mask
        return word ^ word >> 31

    kept = Dropout.of(0.25, 12, [3], [4], CPU).kept(9, "model.q_proj")
    for place in range(4):
        key = mixed(hashed("12:3") + place * step)
        for column in range(9):
            word = mixed(key + hashed("model.q_proj") + column // 4 * step)
            bits = word >> 16 * (column % 4) & 0xFFFF
            signed = bits - 2**16 if bits >= 2**15 else bits
            assert bool(kept[place, column]) == (signed >= 2**14 - 2**15)
