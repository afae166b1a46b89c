"""Wrapped linears against plain PyTorch: the dense weight ``W + scale * B @ A`` and autograd."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.model.conftest import MakeAdapter
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.linears import AdaptedLinear
from twinkle_dask.model.loading import load_base
from twinkle_dask.model.lora import BatchPlan, LoraTensors, PlanContext, Segment
from twinkle_dask.types import LoraSpec

PATH = "layer.q_proj"


def buffers(adapter: LoraTensors) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in adapter.master.items()}


def one_linear(rank: int, seed: int, dtype: torch.dtype = torch.float32) -> LoraTensors:
    generator = torch.Generator().manual_seed(seed)
    master = {
        f"{PATH}.lora_A.weight": torch.randn(rank, 24, generator=generator),
        f"{PATH}.lora_B.weight": torch.randn(40, rank, generator=generator),
    }
    return LoraTensors(LoraSpec(rank=rank, seed=seed), master, dtype=dtype)


def assert_near(actual: Tensor, expected: Tensor, rel: float) -> None:
    """Near in the 2-norm: single entries of a sum may cancel to any relative error."""
    distance = (actual - expected).detach().square().sum().sqrt()
    assert float(distance) <= rel * float(expected.detach().square().sum().sqrt())


def backward(of: Tensor, grad: Tensor) -> None:
    torch.autograd.backward([of], [grad])


@pytest.mark.parametrize("bias", [False, True])
def test_one_linear_equals_the_dense_weight_forward_and_backward(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    context = PlanContext(torch.device("cpu"))
    wrapped = AdaptedLinear(linear, PATH, context)
    assert wrapped.weight is linear.weight  # code that reads .weight goes on working
    x_BLD = torch.randn(9, 5, 24, generator=generator)
    grad_BLE = torch.randn(9, 5, 40, generator=generator)
    adapters = [one_linear(rank, seed=rank) for rank in (1, 4, 7)]
    learned = [buffers(adapter) for adapter in adapters]
    # Slices and indices, an adapter that only looks, and a row of the base model alone.
    rows: list[slice | Tensor] = [slice(0, 3), torch.tensor([7, 3, 5]), slice(8, 9)]
    plan = BatchPlan(
        (
            Segment(rows[0], adapters[0], learned[0]),
            Segment(rows[1], adapters[1], learned[1]),
            Segment(rows[2], adapters[2], None),
        )
    )
    ours_x = x_BLD.clone().requires_grad_()
    with context.use(plan):
        ours_BLE = wrapped(ours_x)
    backward(ours_BLE, grad_BLE)

    dense_x = x_BLD.clone().requires_grad_()
    leaves = [
        {name: value.clone().requires_grad_() for name, value in adapter.master.items()}
        for adapter in adapters
    ]
    dense_BLE = functional.linear(dense_x, linear.weight, linear.bias)
    for where, adapter, leaf in zip(rows, adapters, leaves, strict=True):
        a_RD, b_ER = leaf[f"{PATH}.lora_A.weight"], leaf[f"{PATH}.lora_B.weight"]
        weight_ED = linear.weight + adapter.scale * b_ER @ a_RD
        part_BLE = torch.zeros_like(dense_BLE)
        part_BLE[where] = functional.linear(dense_x[where], weight_ED - linear.weight)
        dense_BLE = dense_BLE + part_BLE
    backward(dense_BLE, grad_BLE)

    assert_near(ours_BLE, dense_BLE, 1e-5)
    assert dense_x.grad is not None
    assert ours_x.grad is not None
    assert_near(ours_x.grad, dense_x.grad, 1e-5)
    for own, leaf in zip(learned[:2], leaves[:2], strict=True):
        for name, value in own.items():
            expected = leaf[name].grad
            assert expected is not None
            assert_near(value, expected, 1e-5)


def test_gradients_add_to_what_the_buffers_hold() -> None:
    context = PlanContext(torch.device("cpu"))
    wrapped = AdaptedLinear(nn.Linear(24, 40).requires_grad_(False), PATH, context)
    adapter = one_linear(4, seed=1)
    once, twice = buffers(adapter), buffers(adapter)
    x_BLD = torch.randn(2, 3, 24)  # requires no gradient, as a first layer's input
    for grads, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            with context.use(BatchPlan((Segment(slice(0, 2), adapter, grads),))):
                wrapped(x_BLD).sum().backward()
    assert context.anchor.grad is None
    for name, value in once.items():
        assert value.abs().sum() > 0
        assert torch.equal(2 * value, twice[name])


def test_without_gradients_the_numbers_are_the_same_and_nothing_is_kept() -> None:
    context = PlanContext(torch.device("cpu"))
    wrapped = AdaptedLinear(nn.Linear(24, 40).requires_grad_(False), PATH, context)
    x_BLD = torch.randn(4, 3, 24)
    plan = BatchPlan((Segment(slice(1, 4), one_linear(4, seed=1)),))
    with context.use(plan):
        unrecorded = wrapped(x_BLD)
        recorded = wrapped(x_BLD.clone().requires_grad_())
        with torch.no_grad():
            fast = wrapped(x_BLD)
    assert not unrecorded.requires_grad
    assert recorded.requires_grad
    assert torch.equal(fast, recorded)
    assert torch.equal(fast, unrecorded)
    assert context.plan.segments == ()


def test_one_position_each_adds_all_adapters_at_once() -> None:
    """The stacked product of generation, against one adapter at a time."""
    context = PlanContext(torch.device("cpu"))
    wrapped = AdaptedLinear(nn.Linear(24, 40).requires_grad_(False), PATH, context)
    x_B1D = torch.randn(7, 1, 24)
    segments = (
        Segment(slice(0, 2), one_linear(3, seed=1)),
        Segment(torch.tensor([6, 3]), one_linear(8, seed=2)),
        Segment(slice(4, 5), one_linear(1, seed=3)),
    )
    plan = BatchPlan(segments)
    with torch.no_grad():
        with context.use(plan):
            wrapped(x_B1D)
            together = wrapped(x_B1D)  # meets what the first pass has prepared
        with context.use(BatchPlan()):
            apart = wrapped(x_B1D)
        for segment in segments:
            with context.use(BatchPlan((segment,))):
                apart[segment.rows] = wrapped(x_B1D)[segment.rows]
    # Sums as large as in the next test; over 1500 seeds they differed by at most 1.2e-4.
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_breaks_its_own_rows_only(length: int, matrix: str, value: float) -> None:
    context = PlanContext(torch.device("cpu"))
    wrapped = AdaptedLinear(nn.Linear(24, 40).requires_grad_(False), PATH, context)
    x_BLD = torch.randn(4, length, 24, requires_grad=True)
    healthy, broken = one_linear(3, seed=1), one_linear(2, seed=2)
    broken.master[f"{PATH}.{matrix}.weight"][0, 0] = value
    grads = [buffers(healthy), buffers(broken)]
    both = BatchPlan(
        (Segment(slice(0, 2), healthy, grads[0]), Segment(slice(2, 3), broken, grads[1]))
    )
    alone = BatchPlan((Segment(slice(0, 2), healthy),))
    with torch.no_grad():
        with context.use(alone):
            expected = wrapped(x_BLD)
        with context.use(both):
            actual = wrapped(x_BLD)
    # The broken neighbour makes the others go another way through the products. The absolute values
    # of an entry's summands add up to as much as 1600, which float32 rounds by 1e-4; where they
    # cancel, that shows. Measured over 2400 cases: at most 1.2e-4.
    torch.testing.assert_close(actual[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-5, atol=2e-4)
    assert not actual[2].isfinite().all()
    with context.use(both):
        backward(wrapped(x_BLD), torch.ones(4, length, 40))
    assert x_BLD.grad is not None
    assert x_BLD.grad[[0, 1, 3]].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads[0].values())


def test_touch_renews_the_copies() -> None:
    adapter = one_linear(4, seed=1, dtype=torch.bfloat16)
    before = adapter.pair(PATH)
    assert before is not None
    assert before[0].dtype == torch.bfloat16
    adapter.master[f"{PATH}.lora_A.weight"].add_(1)
    again = adapter.pair(PATH)
    assert again is not None
    assert again[0] is before[0]
    adapter.touch()
    after = adapter.pair(PATH)
    assert after is not None
    assert not torch.equal(after[0], before[0])
    assert adapter.pair("some.other") is None


def test_state_out_is_state_in() -> None:
    adapter = one_linear(4, seed=1)
    state = adapter.to_state()
    for array in state.weights.values():
        array.flags.writeable = False  # as arrays over received bytes are
    again = LoraTensors.from_state(state, device=torch.device("cpu"), dtype=torch.float32)
    adapter.master[f"{PATH}.lora_A.weight"].zero_()
    assert again.spec == adapter.spec
    assert again.master[f"{PATH}.lora_A.weight"].abs().sum() > 0


SPECS = (
    LoraSpec(rank=2, seed=1),
    LoraSpec(rank=8, seed=2, train_mlp=False),
    LoraSpec(rank=5, seed=3, alpha=16, train_attn=False, train_unembed=False),
)
TOKENS_BL = torch.randint(0, 512, (7, 19), generator=torch.Generator().manual_seed(5))
GRAD_BLD = torch.randn(7, 19, 64, generator=torch.Generator().manual_seed(6))
ROWS = (slice(0, 2), slice(2, 3), slice(3, 6))  # row 6 is the base model's


def run(
    base: BaseModel, adapters: list[LoraTensors], which: list[int]
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Hidden states and gradients with the rows of some of the adapters in one batch."""
    segments: list[Segment] = []
    rows: list[int] = []
    for i in which:
        own = list(range(7))[ROWS[i]]
        place = slice(len(rows), len(rows) + len(own))
        segments.append(Segment(place, adapters[i], buffers(adapters[i])))
        rows += own
    hidden_BLD = base.hidden(TOKENS_BL[rows], BatchPlan(tuple(segments)))
    backward(hidden_BLD, GRAD_BLD[rows].to(hidden_BLD.dtype))
    return hidden_BLD.detach(), [dict(segment.grads or {}) for segment in segments]


def test_whole_model_equals_dense_weights(
    qwen: BaseModel, qwen_folder: Path, make_adapter: MakeAdapter
) -> None:
    """Against a separate Transformers model whose weights are replaced and differentiated."""
    import transformers

    plain: Any = transformers
    model = plain.AutoModelForCausalLM.from_pretrained(qwen_folder).eval().requires_grad_(False)
    adapters = [make_adapter(qwen, spec) for spec in SPECS]
    ours_BLD, ours = run(qwen, adapters, [0, 1, 2])
    for i, adapter in enumerate(adapters):
        leaf = {name: value.clone().requires_grad_() for name, value in adapter.master.items()}
        dense: dict[str, Tensor] = {}
        for target in qwen.targets(adapter.spec):
            if (path := target.module_path) != "lm_head":
                a_RD, b_ER = leaf[f"{path}.lora_A.weight"], leaf[f"{path}.lora_B.weight"]
                weight_ED = model.get_submodule(path).weight
                dense[f"{path.removeprefix('model.')}.weight"] = (
                    weight_ED + adapter.scale * b_ER @ a_RD
                )
        call: Any = torch.func.functional_call
        expected = call(model.model, dense, (TOKENS_BL[ROWS[i]],)).last_hidden_state
        backward(expected, GRAD_BLD[ROWS[i]])
        # 1e-5: the two sum in different orders, through two layers.
        assert_near(ours_BLD[ROWS[i]], expected.detach(), 1e-5)
        for name, value in ours[i].items():
            grad = leaf[name].grad
            if name.startswith("lm_head"):
                assert grad is None  # the engines' own work
                assert value.abs().sum() == 0
            else:
                assert grad is not None
                # Float32 noise through the layers: against float64, rank 2 at scale 16 is off by
                # 3e-5 this way and by 6e-5 the dense way.
                assert_near(value, grad, 1e-4)


def test_together_equals_alone_bit_for_bit(qwen: BaseModel, make_adapter: MakeAdapter) -> None:
    """One thread and float32: no kernel here mixes rows, so nothing may differ."""
    adapters = [make_adapter(qwen, spec) for spec in SPECS]
    together_BLD, together = run(qwen, adapters, [0, 1, 2])
    for i in range(3):
        alone_BLD, (alone,) = run(qwen, adapters, [i])
        assert torch.equal(together_BLD[ROWS[i]], alone_BLD)
        for name, value in alone.items():
            assert torch.equal(together[i][name], value), name


def test_rows_without_an_adapter_see_the_base_model(
    qwen: BaseModel, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(qwen, SPECS[0])
    plan = BatchPlan((Segment(torch.tensor([1, 4]), adapter),))
    with torch.no_grad():
        mixed_BLD = qwen.hidden(TOKENS_BL, plan)
        base_BLD = qwen.hidden(TOKENS_BL, BatchPlan())
    same = [bool(torch.equal(mixed_BLD[row], base_BLD[row])) for row in range(7)]
    assert same == [True, False, True, True, False, True, True]


def test_bfloat16_is_near_float32(
    qwen: BaseModel, qwen_folder: Path, make_adapter: MakeAdapter
) -> None:
    half = load_base(str(qwen_folder), "bfloat16", max_rank=16)
    exact = run(qwen, [make_adapter(qwen, spec) for spec in SPECS], [0, 1, 2])
    rough = run(half, [make_adapter(half, spec) for spec in SPECS], [0, 1, 2])
    assert rough[0].dtype == torch.bfloat16
    assert_near(rough[0].float(), exact[0], 0.03)  # 8 bits of mantissa, two layers
    for mine, theirs in zip(rough[1], exact[1], strict=True):
        assert all(value.dtype == torch.float32 for value in mine.values())
        assert_near(
            torch.cat([value.flatten() for value in mine.values()]),
            torch.cat([theirs[name].flatten() for name in mine]),
            0.1,
        )


def test_an_adapter_on_the_head_alone_allows_backward(
    qwen: BaseModel, make_adapter: MakeAdapter
) -> None:
    adapter = make_adapter(qwen, LoraSpec(rank=2, seed=0, train_attn=False, train_mlp=False))
    grads = buffers(adapter)
    hidden_BLD = qwen.hidden(TOKENS_BL, BatchPlan((Segment(slice(0, 7), adapter, grads),)))
    backward(hidden_BLD, GRAD_BLD)
    assert all(value.abs().sum() == 0 for value in grads.values())
