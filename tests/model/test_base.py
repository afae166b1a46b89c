"""What the engines rely on holds for each supported family, and others are refused by name."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.model.conftest import MakeAdapter
from tests.models import tiny_gemma3, tiny_llama, tiny_mistral, tiny_qwen3
from twinkle_dask.errors import StartupError
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.loading import load_base
from twinkle_dask.model.lora import BatchPlan, Segment
from twinkle_dask.model.targets import Group
from twinkle_dask.types import LoraSpec

hf: Any = transformers
EVERYTHING = LoraSpec(rank=2, seed=0)
TOKENS_BL = torch.randint(0, 512, (3, 24), generator=torch.Generator().manual_seed(1))

Maker = Callable[[Path], Path]
FAMILIES = [tiny_qwen3, tiny_llama, tiny_mistral, tiny_gemma3]


@pytest.fixture(params=FAMILIES, ids=lambda maker: maker.__name__)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, BaseModel]:
    maker: Maker = request.param
    folder = maker(tmp_path)
    return folder, load_base(str(folder), "float32", max_rank=8)


def test_every_linear_is_found_and_grouped(family: tuple[Path, BaseModel]) -> None:
    base = family[1]
    targets = base.targets(EVERYTHING)
    layers = 4 if base.facts.architecture.startswith("Qwen3") else 2
    assert Counter(target.group for target in targets) == {
        Group.ATTN: 4 * layers,
        Group.MLP: 3 * layers,
        Group.UNEMBED: 1,
    }
    assert targets[-1].module_path == base.head.path == "lm_head"
    assert targets[0].module_path == "model.layers.0.self_attn.q_proj"
    only_mlp = base.targets(LoraSpec(rank=2, seed=0, train_attn=False, train_unembed=False))
    assert {target.group for target in only_mlp} == {Group.MLP}
    assert not base.targets(
        LoraSpec(rank=2, seed=0, train_attn=False, train_mlp=False, train_unembed=False)
    )


def test_logits_are_those_of_transformers(family: tuple[Path, BaseModel]) -> None:
    folder, base = family
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected: Tensor = model(TOKENS_BL).logits
        actual = base.head.logits(base.hidden(TOKENS_BL, BatchPlan()), BatchPlan())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_every_body_weight_gets_a_gradient(
    family: tuple[Path, BaseModel], make_adapter: MakeAdapter
) -> None:
    base = family[1]
    adapter = make_adapter(base, LoraSpec(rank=2, seed=0, train_unembed=False))
    grads = {name: torch.zeros_like(value) for name, value in adapter.master.items()}
    hidden_BLD = base.hidden(TOKENS_BL, BatchPlan((Segment(slice(1, 3), adapter, grads),)))
    torch.autograd.backward([hidden_BLD], [torch.randn(hidden_BLD.shape)])
    assert [name for name, value in grads.items() if not value.any()] == []


def test_padding_on_the_right_changes_nothing(family: tuple[Path, BaseModel]) -> None:
    base = family[1]
    with torch.no_grad():
        padded = base.hidden(TOKENS_BL, BatchPlan())[:, :17]
        short = base.hidden(TOKENS_BL[:, :17], BatchPlan())
    torch.testing.assert_close(padded, short, rtol=1e-5, atol=1e-5)


def test_a_cache_gives_the_same_hidden_states(
    family: tuple[Path, BaseModel], make_adapter: MakeAdapter
) -> None:
    """Prompt first, then token by token, past the sliding window of the models that have one."""
    base = family[1]
    adapters = [make_adapter(base, LoraSpec(rank=rank, seed=rank)) for rank in (2, 4)]
    plan = BatchPlan((Segment(slice(0, 1), adapters[0]), Segment(slice(1, 2), adapters[1])))
    cache = hf.DynamicCache()
    with torch.no_grad():
        whole = base.hidden(TOKENS_BL, plan)
        parts = [base.hidden(TOKENS_BL[:, :20], plan, cache=cache)]
        parts += [base.hidden(TOKENS_BL[:, i : i + 1], plan, cache=cache) for i in range(20, 24)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_nothing_of_the_base_model_can_learn(qwen: BaseModel, make_adapter: MakeAdapter) -> None:
    adapter = make_adapter(qwen, EVERYTHING)
    grads = {name: torch.zeros_like(value) for name, value in adapter.master.items()}
    hidden_BLD = qwen.hidden(TOKENS_BL, BatchPlan((Segment(slice(0, 3), adapter, grads),)))
    assert hidden_BLD.requires_grad
    assert not qwen.head.weight_VD.requires_grad
    assert not qwen.hidden(TOKENS_BL, BatchPlan()).requires_grad


def test_an_adapter_on_a_tied_head_changes_the_logits_alone(
    qwen: BaseModel, make_adapter: MakeAdapter
) -> None:
    head_only = LoraSpec(rank=2, seed=0, train_attn=False, train_mlp=False)
    adapter = make_adapter(qwen, head_only)
    plan = BatchPlan((Segment(slice(0, 2), adapter),))
    with torch.no_grad():
        hidden_BLD = qwen.hidden(TOKENS_BL, plan)
        assert torch.equal(hidden_BLD, qwen.hidden(TOKENS_BL, BatchPlan()))
        logits_BLV = qwen.head.logits(hidden_BLD, plan)
        a_RD, b_ER = (adapter.master[f"lm_head.lora_{x}.weight"] for x in "AB")
        dense_VD = qwen.head.weight_VD + adapter.scale * b_ER @ a_RD
        torch.testing.assert_close(
            logits_BLV[:2], hidden_BLD[:2] @ dense_VD.T, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(logits_BLV[2], hidden_BLD[2] @ qwen.head.weight_VD.T)


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

REFUSED = {
    "experts": (
        hf.Llama4TextConfig(
            **SMALL, head_dim=16, intermediate_size_mlp=64, num_local_experts=2, moe_layers=[1]
        ),
        r"experts \(Llama4TextExperts\)",
    ),
    "sinks": (hf.GptOssConfig(**SMALL, head_dim=16, num_local_experts=2), "attention"),
    "short convolutions": (
        hf.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
        r"conv\.in_proj \(Linear\)",
    ),
    "softcapping": (hf.Gemma2Config(**SMALL, head_dim=16), r"final_logit_softcapping=30\.0"),
    "scaling": (hf.GraniteConfig(**SMALL, logits_scaling=8.0), r"logits_scaling=8\.0"),
    "scale": (hf.CohereConfig(**SMALL), r"logit_scale=0\.0625"),
    "state space": (
        hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4),
        "does not support an attention implementation",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_architecture_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(StartupError, match=reason):
        load_base(str(tmp_path), "float32", max_rank=8)


def bypass(model: Any) -> None:
    mlp = model.model.layers[1].mlp

    def forward(x: Tensor) -> Tensor:
        inner: Tensor = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        return inner @ mlp.down_proj.weight.T

    mlp.forward = forward


def look_ahead(model: Any) -> None:
    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output + output.mean(1, keepdim=True)

    model.model.norm.register_forward_hook(hook)


def bend_logits(model: Any) -> None:
    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output.tanh()

    model.lm_head.register_forward_hook(hook)


TRICKS = [
    (bypass, r"model\.layers\.1\.mlp\.down_proj"),
    (look_ahead, "not causal"),
    (bend_logits, "logits are not the plain product"),
]


@pytest.mark.parametrize(("trick", "reason"), TRICKS)
def test_what_no_list_of_names_would_catch_is_refused(
    trick: Callable[[Any], None], reason: str, qwen: BaseModel, qwen_folder: Path
) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(qwen_folder)
    trick(model)
    with pytest.raises(StartupError, match=reason):
        BaseModel(model, qwen.facts, tokenizer=None)
