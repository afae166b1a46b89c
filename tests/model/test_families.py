"""Each family of models: what is adapted, what it computes, and that PEFT computes the same.

``tests/trainer/test_families.py`` trains them.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.models import FAMILIES, tiny_family
from twinkle_dask.checkpoints import folders
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.init import init_adapter
from twinkle_dask.model.loading import load_base
from twinkle_dask.model.lora import BatchPlan, LoraTensors, Segment
from twinkle_dask.model.mixing import why_padded
from twinkle_dask.model.targets import Group, Target, chosen
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.types import AdapterState, LoraSpec, RunState

hf: Any = transformers
peft_model: Any = peft.PeftModel
EVERYTHING = LoraSpec(rank=3, seed=0)
TOKENS_BL = torch.randint(0, 512, (3, 70), generator=torch.Generator().manual_seed(1))


def parts(parent: str, names: str, layers: int = 2) -> dict[str, int]:
    """In how many layers there are these parts."""
    return {f"{parent}.{name}": layers for name in names.split()}


ATTENTION = parts("self_attn", "q_proj k_proj v_proj o_proj")
SWIGLU = "gate_proj up_proj down_proj"
FUSED = parts("mlp", "gate_up_proj down_proj")
EXPERTS = "gate_up_proj down_proj"
LLAMA = (ATTENTION, parts("mlp", SWIGLU))
MIXED = ATTENTION | parts("linear_attn", "in_proj_qkv in_proj_z in_proj_a in_proj_b out_proj")

# What train_attn adapts, and what train_mlp does.
EXPECTED: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    **dict.fromkeys(("qwen3", "qwen2", "llama", "smollm2", "smollm3"), LLAMA),
    **dict.fromkeys(("mistral", "gemma3", "olmo3", "stablelm"), LLAMA),
    "qwen3_5": (MIXED, parts("mlp", SWIGLU, 4)),
    "phi3": (parts("self_attn", "qkv_proj o_proj"), FUSED),
    "glm4": (ATTENTION, FUSED),
    "starcoder2": (ATTENTION, parts("mlp", "c_fc c_proj")),
    "gpt_neox": (
        parts("attention", "query_key_value dense"),
        parts("mlp", "dense_h_to_4h dense_4h_to_h"),
    ),
    "gpt2": (parts("attn", "c_attn c_proj"), parts("mlp", "c_fc c_proj")),
    "qwen3_moe": (ATTENTION, parts("mlp.experts", EXPERTS)),
    "mixtral": (ATTENTION, parts("mlp.experts", EXPERTS)),
    "qwen2_moe": (ATTENTION, parts("mlp.experts", EXPERTS) | parts("mlp.shared_expert", SWIGLU)),
    "qwen3_5_moe": (
        MIXED,
        parts("mlp.experts", EXPERTS, 4) | parts("mlp.shared_expert", SWIGLU, 4),
    ),
    "deepseek_v3": (
        parts("self_attn", "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"),
        parts("mlp", SWIGLU, 1)
        | parts("mlp.experts", EXPERTS, 1)
        | parts("mlp.shared_experts", SWIGLU, 1),
    ),
}
# For a state, for attention of their own, and for values of another size than their keys.
PADDED = {"qwen3_5", "qwen3_5_moe", "stablelm"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, BaseModel]:
    folder = tiny_family(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, folder, load_base(str(folder), "float32", max_rank=8)


def random_state(base: BaseModel, spec: LoraSpec) -> AdapterState:
    rng = np.random.default_rng(2)
    fresh = init_adapter(base.targets(spec), spec)
    weights = {
        name: rng.normal(0, 0.05, array.shape).astype(np.float32) if ".lora_B." in name else array
        for name, array in fresh.weights.items()
    }
    return AdapterState(spec=spec, weights=weights)


def logits(base: BaseModel, tokens_BL: Tensor, plan: BatchPlan) -> Tensor:
    with torch.no_grad():
        return base.head.logits(base.hidden(tokens_BL, plan), plan)


def test_what_each_group_adapts(family: tuple[str, Path, BaseModel]) -> None:
    name, _, base = family
    *body, head = base.targets(EVERYTHING)
    for group, expected in zip((Group.ATTN, Group.MLP), EXPECTED[name], strict=True):
        paths = [target.module_path for target in body if target.group is group]
        assert Counter(re.sub(r".*\.\d+\.", "", path, count=1) for path in paths) == expected
    assert (head.module_path, head.group) == ("lm_head", Group.UNEMBED)


def test_every_target_is_a_real_part_of_its_size(family: tuple[str, Path, BaseModel]) -> None:
    _, folder, base = family
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    for target in base.targets(EVERYTHING):
        shape = (target.out_features, target.in_features)
        parent, _, last = target.module_path.rpartition(".")
        part = getattr(model.get_submodule(parent), last)
        if isinstance(part, nn.Parameter):
            assert tuple(part.shape) == (target.num_experts, *shape)
        else:
            assert tuple(part.weight.shape) in (shape, shape[::-1])


def test_logits_are_those_of_transformers(family: tuple[str, Path, BaseModel]) -> None:
    _, folder, base = family
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected: Tensor = model(TOKENS_BL).logits
    torch.testing.assert_close(logits(base, TOKENS_BL, BatchPlan()), expected, rtol=1e-5, atol=1e-5)


def test_padding_on_the_right_changes_nothing(family: tuple[str, Path, BaseModel]) -> None:
    base = family[2]
    adapter = LoraTensors.from_state(
        random_state(base, EVERYTHING), device=base.device, dtype=base.dtype
    )
    plan = BatchPlan((Segment(slice(0, 2), adapter),))
    padded = TOKENS_BL.clone()
    padded[:, 37:] = 0
    short = logits(base, TOKENS_BL[:, :37], plan)
    torch.testing.assert_close(logits(base, padded, plan)[:, :37], short, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [slice(0, 2), torch.tensor([2, 0])])
def test_rows_of_indices_and_of_slices(
    rows: slice | Tensor, family: tuple[str, Path, BaseModel]
) -> None:
    """In a batch each row has what it has alone, with its adapter or without one."""
    base = family[2]
    states = (random_state(base, spec) for spec in (EVERYTHING, LoraSpec(rank=2, seed=3)))
    one, other = (
        LoraTensors.from_state(state, device=base.device, dtype=base.dtype) for state in states
    )
    left = 2 if isinstance(rows, slice) else 1
    plan = BatchPlan((Segment(rows, one), Segment(slice(left, left + 1), other)))
    mixed_BLV = logits(base, TOKENS_BL, plan)
    for row in range(3):
        alone = BatchPlan((Segment(slice(0, 1), other if row == left else one),))
        expected_LV = logits(base, TOKENS_BL[row : row + 1], alone)[0]
        torch.testing.assert_close(mixed_BLV[row], expected_LV, rtol=1e-4, atol=1e-5)


# Which of its warnings come with which model says nothing about the adapter.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"train_unembed": False, "train_attn": False},
        {"train_unembed": False, "train_mlp": False},
    ],
    ids=["all", "mlp", "attn"],
)
def test_peft_computes_the_same_logits(
    switches: dict[str, Any], family: tuple[str, Path, BaseModel], tmp_path: Path
) -> None:
    name, folder, base = family
    if name == "deepseek_v3" and switches.get("train_mlp", True):
        pytest.skip("PEFT 0.21 takes its dense projections for those of Transformers 4's experts")
    spec = LoraSpec(rank=3, seed=1, alpha=7.5, **switches)
    state = random_state(base, spec)
    saved = RunState(adapter=state)
    folders.write_state(BlobStore(tmp_path), "saved", saved, base_model=str(folder))
    back = folders.read_adapter(BlobStore(tmp_path), "saved")
    assert back.weights.keys() == state.weights.keys()

    adapter = LoraTensors.from_state(back, device=base.device, dtype=base.dtype)
    ours = logits(base, TOKENS_BL, BatchPlan((Segment(slice(0, 3), adapter),)))
    plain = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        unadapted = plain(TOKENS_BL).logits
        theirs = peft_model.from_pretrained(plain, str(tmp_path / "saved")).eval()(TOKENS_BL).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - unadapted).abs().max() > 0.01


def test_who_may_be_packed(family: tuple[str, Path, BaseModel]) -> None:
    name, _, base = family
    assert base.mixes_only_by_attention == (name not in PADDED)


def test_what_mixes_positions_unseen_is_found_by_trial(tmp_path: Path) -> None:
    """Causal, and every module is a known one, but a sum runs on from token to token."""
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_family(tmp_path, "llama"))
    assert why_padded(model, model.base_model) is None

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output + output.cumsum(1)

    handle = model.model.norm.register_forward_hook(hook)
    assert why_padded(model, model.base_model) == "packed sequences see each other"
    handle.remove()
    model.config.layer_types = ["full_attention", "a_new_kind"]
    assert why_padded(model, model.base_model) == "it has layers of the kind a_new_kind"


def test_positions_that_are_counted_from_the_beginning_are_padded(tmp_path: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_family(tmp_path, "gpt2"))
    embedding = model.transformer.wpe

    def forget(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.arange(inputs[0].shape[-1])[None],)

    embedding.register_forward_pre_hook(forget)
    reason = why_padded(model, model.base_model)
    assert reason == "a packed sequence is not what it is in a row of its own"


def test_a_group_without_targets_is_refused() -> None:
    attention = Target(module_path="a.q_proj", in_features=2, out_features=2, group=Group.ATTN)
    with pytest.raises(InvalidRequest, match="train_mlp and train_unembed"):
        chosen((attention,), LoraSpec(rank=1, seed=0))
