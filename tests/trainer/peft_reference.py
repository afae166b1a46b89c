"""The same adapter in plain PEFT and PyTorch: full logits, autograd, one row at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from twinkle_dask.checkpoints import folders
from twinkle_dask.model.dropout import Dropout
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.types import AdapterState, Int32Array, RunState

hf: Any = transformers
peft_model: Any = peft.PeftModel

PREFIX = "base_model.model."


class PeftRun:
    """An adapter as a checkpoint has it, loaded by PEFT; in eval mode, so nothing is dropped."""

    def __init__(self, base: Path, state: AdapterState, place: Path) -> None:
        folders.write_state(BlobStore(place), "saved", RunState(adapter=state), base_model="base")
        plain = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = peft_model.from_pretrained(plain, str(place / "saved"), is_trainable=True)
        self.model.eval()

    def logits(self, tokens: Int32Array, *, adapter: bool = True) -> Tensor:
        """Of one row, (N, V)."""
        return self._forward(tokens, adapter=adapter).logits[0]

    def hidden(self, tokens: Int32Array) -> Tensor:
        """Of one row after the final norm, (N, D)."""
        return self._forward(tokens, adapter=True).hidden_states[-1][0]

    def _forward(self, tokens: Int32Array, *, adapter: bool) -> Any:
        row = torch.tensor(tokens, dtype=torch.int64)[None]
        if adapter:
            return self.model(row, output_hidden_states=True)
        with self.model.disable_adapter():
            return self.model(row, output_hidden_states=True)

    def gradients(self) -> Mapping[str, Tensor]:
        """By our names; zeros where nothing arrived."""
        return {
            name.removeprefix(PREFIX).replace(".default.", "."): (
                torch.zeros_like(weight) if weight.grad is None else weight.grad
            )
            for name, weight in self.model.named_parameters()
            if ".lora_" in name
        }


class _Dropped(torch.nn.Module):
    """In the place of a linear's dropout: leaves out what the engine leaves out of a row."""

    def __init__(self, path: str, share: float) -> None:
        super().__init__()
        self._path = path
        self._share = share
        self.row: tuple[int, int] | None = None

    def forward(self, x_BLD: Tensor) -> Tensor:
        if self.row is None:
            return x_BLD
        seed, row = self.row
        drop = Dropout.of(self._share, seed, [row], [x_BLD.shape[1]], x_BLD.device)
        return x_BLD * drop.kept(x_BLD.shape[2], self._path) / (1 - self._share)


class DroppingPeftRun(PeftRun):
    """The same, which also leaves out what a seed says."""

    def __init__(self, base: Path, state: AdapterState, place: Path) -> None:
        super().__init__(base, state, place)
        self._dropped: list[_Dropped] = []
        for name, module in self.model.named_modules():
            if hasattr(module, "lora_dropout"):
                own = module.lora_dropout["default"]
                assert isinstance(own, torch.nn.Dropout)
                assert own.p == state.spec.dropout
                self._dropped.append(_Dropped(name.removeprefix(PREFIX), own.p))
                module.lora_dropout["default"] = self._dropped[-1]

    def dropping(self, row: tuple[int, int] | None) -> None:
        """From now on leave out what this (seed, row) does; None leaves out nothing."""
        for dropped in self._dropped:
            dropped.row = row
