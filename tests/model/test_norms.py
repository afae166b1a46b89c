"""The fast RMSNorm against the modules that it replaces."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from twinkle_dask.model.norms import FastRMSNorm, replace_norms


def module(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    made = kind(48, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(made.get_parameter("weight"), 0.8, 0.3, generator=generator)
    return nn.ModuleDict({"norm": made.to(dtype)}).requires_grad_(False)


def through(norm: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y: Tensor = norm(leaf)
    torch.autograd.backward([y], [grad])
    assert leaf.grad is not None
    return y.detach(), leaf.grad


# float32: rounding; bfloat16: a result may fall on the other side of one step, 2^-8.
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("shape", [(3, 48), (2, 5, 48), (1, 2, 4, 48)])
def test_equals_what_it_replaces(
    kind: type[nn.Module], shape: tuple[int, ...], dtype: torch.dtype, rel: float
) -> None:
    parent = module(kind, dtype)
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    before = through(parent.get_submodule("norm"), x, grad)
    assert replace_norms(parent) == 1
    assert isinstance(parent.get_submodule("norm"), FastRMSNorm)
    for actual, expected in zip(
        through(parent.get_submodule("norm"), x, grad), before, strict=True
    ):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=rel, atol=rel)


def test_a_row_is_the_same_bit_for_bit_among_others() -> None:
    parent = module(LlamaRMSNorm, torch.float32)
    replace_norms(parent)
    x, grad = torch.randn(9, 48), torch.randn(9, 48)
    together = through(parent.get_submodule("norm"), x, grad)
    alone = through(parent.get_submodule("norm"), x[4:6], grad[4:6])
    assert all(torch.equal(a[4:6], b) for a, b in zip(together, alone, strict=True))


class OtherRMSNorm(nn.Module):
    """Named like one, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(48))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight / (x.abs().mean(-1, keepdim=True) + self.eps)


def test_what_computes_something_else_stays() -> None:
    parent = nn.ModuleDict({"norm": OtherRMSNorm()}).requires_grad_(False)
    assert replace_norms(parent) == 0


class GatedRMSNorm(LlamaRMSNorm):
    """The same without its gate, which it may be given."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        y: Tensor = super().forward(hidden_states)
        return y if gate is None else y * gate


class FailingRMSNorm(LlamaRMSNorm):
    """Wants another shape."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        raise IndexError(hidden_states.shape)


@pytest.mark.parametrize("kind", [GatedRMSNorm, FailingRMSNorm])
def test_what_takes_more_or_cannot_be_tried_stays(kind: type[nn.Module]) -> None:
    parent = module(kind, torch.float32)
    assert replace_norms(parent) == 0
    assert isinstance(parent.get_submodule("norm"), kind)
