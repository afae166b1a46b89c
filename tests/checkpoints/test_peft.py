"""A checkpoint is a PEFT adapter: PEFT's logits are ours, every module included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from tests.models import tiny_gemma3, tiny_llama, tiny_qwen3
from twinkle_dask.checkpoints import folders
from twinkle_dask.model.init import init_adapter
from twinkle_dask.model.loading import load_base
from twinkle_dask.model.lora import BatchPlan, LoraTensors, Segment
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.types import AdapterState, LoraSpec, RunState

hf: Any = transformers
peft_model: Any = peft.PeftModel
lora_config: Any = peft.LoraConfig

SPECS = {
    "all": LoraSpec(rank=4, seed=1),
    "odd rank and alpha": LoraSpec(rank=3, seed=1, alpha=7.5),
    "attention": LoraSpec(rank=4, seed=1, train_mlp=False, train_unembed=False),
    "mlp": LoraSpec(rank=4, seed=1, train_attn=False, train_unembed=False),
    "head": LoraSpec(rank=4, seed=1, train_attn=False, train_mlp=False),
    "rslora": LoraSpec(rank=4, seed=1, alpha=3.0, rslora=True, dropout=0.1),
    "named": LoraSpec(rank=4, seed=1, targets=("down_proj", "self_attn.q_proj")),
    "one layer": LoraSpec(
        rank=4, seed=1, rslora=True, targets=("layers.1.self_attn.v_proj", "lm_head")
    ),
}


def with_random_b(state: AdapterState) -> AdapterState:
    rng = np.random.default_rng(2)
    weights = {
        name: rng.normal(0, 0.05, array.shape).astype(np.float32) if ".lora_B." in name else array
        for name, array in state.weights.items()
    }
    return AdapterState(spec=state.spec, weights=weights)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("maker", [tiny_qwen3, tiny_llama, tiny_gemma3])
def test_peft_computes_the_same_logits(
    maker: Callable[[Path], Path], spec: LoraSpec, tmp_path: Path
) -> None:
    folder = str(maker(tmp_path / "base"))
    base = load_base(folder, "float32", max_rank=8)
    state = with_random_b(init_adapter(base.targets(spec), spec))
    folders.write_state(BlobStore(tmp_path), "saved", RunState(adapter=state), base_model=folder)

    adapter = LoraTensors.from_state(state, device=base.device, dtype=base.dtype)
    plan = BatchPlan((Segment(slice(0, 2), adapter),))
    tokens_BL = torch.arange(40).view(2, 20)
    plain = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        ours = base.head.logits(base.hidden(tokens_BL, plan), plan)
        unadapted = plain(tokens_BL).logits
        model = peft_model.from_pretrained(plain, str(tmp_path / "saved")).eval()
        theirs = model(tokens_BL).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - unadapted).abs().max() > 0.01  # the adapter says something

    config = lora_config.from_pretrained(str(tmp_path / "saved"))
    assert (config.r, config.lora_alpha) == (spec.rank, spec.alpha)
    assert (config.use_rslora, config.lora_dropout) == (spec.rslora, spec.dropout)
    if spec.targets is not None:
        assert config.target_modules == set(spec.targets)
    adapted = [name for name, _ in model.named_modules() if name.endswith(".lora_A.default")]
    assert len(adapted) == len(base.targets(spec))
    assert not [name for name in model.state_dict() if "modules_to_save" in name]
