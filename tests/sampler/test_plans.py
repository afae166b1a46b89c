"""Plans that keep stacked weights from batch to batch compute what fresh ones do."""

import torch

from tests.sampler.conftest import MakeDriver
from tests.sampler.driver import adapter, prompt, request
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.init import init_adapter
from twinkle_dask.model.lora import BatchPlan, LoraTensors, Segment
from twinkle_dask.sampler.plans import PlanMaker, segments_of
from twinkle_dask.types import LoraSpec


def test_segments_are_runs_of_one_adapter(base: BaseModel) -> None:
    a, b = (LoraTensors(LoraSpec(rank=1, seed=0), {}, dtype=base.dtype) for _ in range(2))
    found = segments_of([None, a, a, None, b])
    assert [(s.rows, s.adapter) for s in found] == [(slice(1, 3), a), (slice(4, 5), b)]
    assert segments_of([]) == ()


def test_kept_stacks_give_the_same_numbers(base: BaseModel) -> None:
    specs = [
        LoraSpec(rank=3, seed=1),
        LoraSpec(rank=5, seed=2, train_attn=False),
        LoraSpec(rank=2, seed=3, train_mlp=False, train_unembed=False),
    ]
    a, b, c = (
        LoraTensors.from_state(
            init_adapter(base.targets(spec), spec), device=base.device, dtype=base.dtype
        )
        for spec in specs
    )
    for worn in (a, b, c):
        for value in worn.master.values():
            value.normal_(0, 0.1, generator=torch.Generator().manual_seed(value.numel()))
    maker = PlanMaker()
    batches = ([a, b, c], [a, a, b, c], [None, a, b, b, c], [a, c], [None, c, a], [b], [None])
    for rows in batches:
        tokens_BL = torch.arange(3, 3 + len(rows)).unsqueeze(1)
        kept, fresh = maker.plan(list(rows)), BatchPlan(segments_of(list(rows)))
        with torch.no_grad():
            hidden_BLD = base.hidden(tokens_BL, fresh)
            assert torch.equal(base.hidden(tokens_BL, kept), hidden_BLD)
            expected = base.head.logits(hidden_BLD, fresh)
            assert torch.equal(base.head.logits(hidden_BLD, kept), expected)


def test_the_base_model_trains_as_before_after_sampling(base: BaseModel, make: MakeDriver) -> None:
    """Trainer and sampler take turns on one base model; the sampler's tensors know no gradients."""

    def gradient() -> torch.Tensor:
        state = adapter(base, 1)
        worn = LoraTensors.from_state(state, device=base.device, dtype=base.dtype)
        grads = {name: torch.zeros_like(value) for name, value in worn.master.items()}
        plan = BatchPlan((Segment(slice(0, 1), worn, grads),))
        torch.autograd.backward(base.hidden(torch.tensor([prompt(9)]), plan).square().sum())
        return torch.cat([grad.flatten() for grad in grads.values()])

    before = gradient()
    driver = make()
    driver.sampler.add_adapter("a", adapter(base, 1))
    work_id = driver.submit(request(prompt(9), 30), "a")
    driver.step(10)
    assert torch.equal(gradient(), before)
    driver.result(work_id)
    assert before.abs().max() > 0
