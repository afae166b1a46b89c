"""What people do without a service: plain Transformers and PEFT on the same weights."""

import warnings
from collections.abc import Sequence
from typing import Any

import peft
import torch
import transformers
from torch.nn import functional

from benchmarks._common import RANK, Options
from twinkle_dask.model.source import check_source

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Partly typed libraries, used through Any.
_hf: Any = transformers
_peft: Any = peft
_torch: Any = torch


def load_plain(asked: Options) -> Any:
    """The base model as Transformers gives it."""
    place = check_source(asked.source)
    gguf: dict[str, Any] = {}
    if place.gguf_file is not None:
        packed = _hf.GgufConfig(dequantize=True)
        gguf = {"gguf_file": place.gguf_file, "quantization_config": packed}
    return _hf.AutoModelForCausalLM.from_pretrained(
        place.location, dtype=asked.torch_dtype, attn_implementation="sdpa", **gguf
    )


class PeftLoop:
    """Several adapters on one model, trained in turns with ``set_adapter``.

    Rank, targets (head included), loss and optimizer are those of the service's runs.
    """

    def __init__(self, asked: Options, num_adapters: int) -> None:
        config = _peft.LoraConfig(
            r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules=[*_PROJECTIONS, "lm_head"]
        )
        with warnings.catch_warnings():
            # It warns of merging into a head tied to the embedding; nothing is merged here.
            warnings.simplefilter("ignore")
            self._model: Any = _peft.get_peft_model(load_plain(asked), config, "0")
            for i in range(1, num_adapters):
                self._model.add_adapter(str(i), config)
        self._optimizers = [self._optimizer(str(i)) for i in range(num_adapters)]

    def step(self, adapter: int, rows: Sequence[Sequence[int]], learning_rate: float) -> None:
        """Forward, backward and AdamW for one adapter."""
        self._model.set_adapter(str(adapter))
        tokens_BL = torch.tensor(rows)
        logits_BLV = self._model(input_ids=tokens_BL[:, :-1], use_cache=False).logits.float()
        loss: Any = functional.cross_entropy(
            logits_BLV.flatten(0, 1), tokens_BL[:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
        optimizer = self._optimizers[adapter]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()

    def _optimizer(self, adapter: str) -> Any:
        named: Any = self._model.named_parameters()
        mine = [value for name, value in named if f".{adapter}." in name and "lora_" in name]
        return _torch.optim.AdamW(mine, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
