"""Adapters on routed experts against dense weights, and what must not reach other rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import tiny_family
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.init import init_adapter
from twinkle_dask.model.loading import load_base
from twinkle_dask.model.lora import BatchPlan, LoraTensors, Segment
from twinkle_dask.types import LoraSpec

TOKENS_BL = torch.randint(0, 512, (6, 9), generator=torch.Generator().manual_seed(1))
ONLY_MLP: dict[str, Any] = {"train_attn": False, "train_unembed": False}
SPECS = (
    LoraSpec(rank=4, seed=1),
    LoraSpec(rank=2, seed=2, alpha=8.0, **ONLY_MLP),
    LoraSpec(rank=3, seed=3, train_mlp=False),
)
# Slices and indices; row 2 wears nothing.
ROWS: tuple[slice | Tensor, ...] = (slice(0, 2), torch.tensor([5, 3]), slice(4, 5))
GRAD_BLD = torch.randn(6, 9, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_family(tmp_path_factory.mktemp("moe"), "qwen2_moe")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return load_base(str(folder), "float32", max_rank=8)


def adapter_of(base: BaseModel, spec: LoraSpec) -> LoraTensors:
    state = init_adapter(base.targets(spec), spec)
    adapter = LoraTensors.from_state(state, device=base.device, dtype=base.dtype)
    generator = torch.Generator().manual_seed(spec.seed)
    for name, value in adapter.master.items():
        if ".lora_B." in name:
            value.normal_(0, 0.05, generator=generator)
    return adapter


def run(
    base: BaseModel, adapters: Mapping[int, LoraTensors]
) -> tuple[Tensor, dict[int, dict[str, Tensor]]]:
    """Hidden states, and the gradients of each adapter."""
    grads = {
        i: {name: torch.zeros_like(value) for name, value in adapter.master.items()}
        for i, adapter in adapters.items()
    }
    plan = BatchPlan(tuple(Segment(ROWS[i], a, grads[i]) for i, a in adapters.items()))
    hidden_BLD = base.hidden(TOKENS_BL, plan)
    torch.autograd.backward([hidden_BLD], [GRAD_BLD.to(hidden_BLD.dtype)])
    return hidden_BLD.detach(), grads


def near(actual: Tensor, expected: Tensor, rel: float) -> bool:
    """In the 2-norm: single entries of a sum may cancel to any relative error."""
    difference = (actual.float() - expected.float()).square().sum().sqrt()
    return bool(difference <= rel * expected.float().square().sum().sqrt() + 1e-7)


def test_rows_of_slices_and_indices_together_and_alone(base: BaseModel) -> None:
    """Other rows change how an expert's products are cut, and nothing more."""
    adapters = {i: adapter_of(base, spec) for i, spec in enumerate(SPECS)}
    together_BLD, together = run(base, adapters)
    for i, adapter in adapters.items():
        alone_BLD, alone = run(base, {i: adapter})
        assert near(together_BLD[ROWS[i]], alone_BLD[ROWS[i]], 1e-5)
        for name, value in alone[i].items():
            assert near(together[i][name], value, 1e-5)
    with torch.no_grad():
        assert near(together_BLD[2], base.hidden(TOKENS_BL, BatchPlan())[2], 1e-6)


def test_without_gradients_and_under_checkpointing_the_numbers_are_the_same(
    base: BaseModel,
) -> None:
    adapters = {i: adapter_of(base, spec) for i, spec in enumerate(SPECS)}
    plain_BLD, plain = run(base, adapters)
    plan = BatchPlan(tuple(Segment(ROWS[i], a) for i, a in adapters.items()))
    with torch.no_grad():
        assert near(base.hidden(TOKENS_BL, plan), plain_BLD, 1e-6)
    with base.checkpointing():
        again_BLD, again = run(base, adapters)
    assert torch.equal(again_BLD, plain_BLD)
    for i, grads in plain.items():
        for name, value in grads.items():
            assert torch.equal(again[i][name], value)


def test_an_expert_that_no_token_chose_gets_no_gradient(base: BaseModel) -> None:
    """With one token at most two of four experts are chosen, and theirs alone is not zero."""
    adapter = adapter_of(base, SPECS[1])
    grads = {name: torch.zeros_like(value) for name, value in adapter.master.items()}
    plan = BatchPlan((Segment(slice(0, 1), adapter, grads),))
    hidden_BLD = base.hidden(TOKENS_BL[:1, :1], plan)
    torch.autograd.backward([hidden_BLD], [GRAD_BLD[:1, :1]])
    path = "model.layers.0.mlp.experts.down_proj"
    of_a = grads[f"{path}.lora_A.weight"].view(4, 2, -1).abs().sum((1, 2))
    of_b = grads[f"{path}.lora_B.weight"].view(64, 2, 4).abs().sum((0, 1))
    assert int((of_a > 0).sum()) == 2
    assert torch.equal(of_a > 0, of_b > 0)


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_breaks_its_own_rows_only(
    base: BaseModel, matrix: str, value: float
) -> None:
    adapters = {i: adapter_of(base, spec) for i, spec in enumerate(SPECS)}
    broken = adapters[1].master[f"model.layers.0.mlp.experts.gate_up_proj.{matrix}.weight"]
    broken.fill_(value)
    adapters[1].touch()
    hidden_BLD, grads = run(base, adapters)
    assert [bool(row.isfinite().all()) for row in hidden_BLD] == [
        True, True, True, False, True, False,
    ]  # fmt: skip
    for i in (0, 2):
        assert all(bool(gradient.isfinite().all()) for gradient in grads[i].values())


def test_bfloat16_is_near_float32(base: BaseModel, folder: Path) -> None:
    """Tokens whose second and third choice are nearly equal may go to another expert: 10 %."""
    rough = load_base(str(folder), "bfloat16", max_rank=8)
    exact_BLD, exact = run(base, {0: adapter_of(base, SPECS[0])})
    rough_BLD, coarse = run(rough, {0: adapter_of(rough, SPECS[0])})
    assert near(rough_BLD[ROWS[0]], exact_BLD[ROWS[0]], 0.05)
    flat: list[Any] = [
        torch.cat([value.flatten() for value in grads[0].values()]) for grads in (coarse, exact)
    ]
    assert near(flat[0], flat[1], 0.1)
