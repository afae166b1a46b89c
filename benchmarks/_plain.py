"""What people do without a service: plain Transformers and PEFT on the same weights."""

import warnings
from collections.abc import Sequence
from typing import Any

import peft
import torch
import transformers
from torch.nn import functional

from benchmarks._common import Options
from twinkle_dask.model.source import check_source

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_IGNORED = -100  # the target of padding

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

    Targets (head included), alpha, loss and optimizer are those of the service's runs.
    """

    def __init__(self, asked: Options, ranks: Sequence[int]) -> None:
        configs = [adapter_config(rank) for rank in ranks]
        with warnings.catch_warnings():
            # It warns of merging into a head tied to the embedding; nothing is merged here.
            warnings.simplefilter("ignore")
            self._model: Any = _peft.get_peft_model(load_plain(asked), configs[0], "0")
            for i, config in enumerate(configs[1:], start=1):
                self._model.add_adapter(str(i), config)
        self._optimizers = [self._optimizer(str(i)) for i in range(len(ranks))]

    def step(
        self,
        adapter: int,
        rows: Sequence[Sequence[int]],
        learning_rate: float,
        rows_at_once: int | None = None,
    ) -> None:
        """Forward, backward and AdamW for one adapter.

        Args:
            adapter: Its number.
            rows: Tokens, padded on the right to the longest row that they are computed with.
            learning_rate: Of this step.
            rows_at_once: How many rows a pass takes, gradients being added up; by default all.
        """
        self._model.set_adapter(str(adapter))
        size = rows_at_once or len(rows)
        for start in range(0, len(rows), size):
            summed_loss(self._model, rows[start : start + size]).backward()
        optimizer = self._optimizers[adapter]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()

    def _optimizer(self, adapter: str) -> Any:
        named: Any = self._model.named_parameters()
        mine = [value for name, value in named if f".{adapter}." in name and "lora_" in name]
        return _torch.optim.AdamW(mine, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)


def adapter_config(rank: int) -> Any:
    """PEFT's configuration of what the service makes by default."""
    return _peft.LoraConfig(
        r=rank, lora_alpha=32, lora_dropout=0.0, target_modules=[*_PROJECTIONS, "lm_head"]
    )


def summed_loss(model: Any, rows: Sequence[Sequence[int]]) -> Any:
    """Cross entropy of the next tokens, from full logits.

    There is no attention mask: rows are causal and padded on the right, so a mask changes no
    number, and the loop is faster without.
    """
    longest = max(map(len, rows))
    inputs = [list(row[:-1]) + [0] * (longest - len(row)) for row in rows]
    targets = [list(row[1:]) + [_IGNORED] * (longest - len(row)) for row in rows]
    device = model.device
    logits_BLV = model(input_ids=torch.tensor(inputs, device=device), use_cache=False).logits
    return functional.cross_entropy(
        logits_BLV.float().flatten(0, 1),
        torch.tensor(targets, device=device).flatten(),
        reduction="sum",
        ignore_index=_IGNORED,
    )
