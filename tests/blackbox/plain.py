"""The same training in plain PyTorch and transformers: ``W + scale * B @ A``, autograd, AdamW."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tinker import types

from tests.blackbox.saved import Weights, arrays

_hf: Any = transformers
_PREFIX = "base_model.model."


def load(folder: Path) -> Any:
    """The base model in float32."""
    return _hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class PlainRun:
    """An adapter that the service saved, on the base model.

    Args:
        model: From ``load``; stays as it is.
        checkpoint: A folder of the service.
    """

    def __init__(self, model: Any, checkpoint: Path) -> None:
        config = json.loads((checkpoint / "adapter_config.json").read_text())
        self._model = model
        self._scale = config["lora_alpha"] / config["r"]
        saved = arrays(checkpoint / "adapter_model.safetensors")
        self.leaves = {
            name: torch.tensor(array, requires_grad=True) for name, array in saved.items()
        }

    @property
    def weights(self) -> Weights:
        return {name: leaf.detach().numpy().copy() for name, leaf in self.leaves.items()}

    def logprobs(self, datum: types.Datum) -> torch.Tensor:
        """Of the shape of the datum's targets, with autograd's memory."""
        merged: dict[str, torch.Tensor] = {}
        for name, A_RD in self.leaves.items():
            if name.endswith(".lora_A.weight"):
                path = name.removesuffix(".lora_A.weight")
                B_ER = self.leaves[f"{path}.lora_B.weight"]
                path = path.removeprefix(_PREFIX)
                W_ED = self._model.get_submodule(path).weight.detach()
                merged[path] = W_ED + self._scale * B_ER @ A_RD
        # The head is tied to the embedding, which stays as it is, so it is applied here.
        head_VD = merged.pop("lm_head", self._model.lm_head.weight.detach())
        body = {f"{path.removeprefix('model.')}.weight": W for path, W in merged.items()}
        tokens = torch.tensor(datum.model_input.to_ints())[None]
        hidden = torch.func.functional_call(self._model.model, body, (tokens,)).last_hidden_state
        lp_NV = torch.log_softmax(hidden[0] @ head_VD.T, -1)
        targets = tensor(datum, "target_tokens")
        return lp_NV.gather(1, targets.reshape(len(lp_NV), -1)).reshape(targets.shape)

    def gradient(self, loss: torch.Tensor) -> dict[str, NDArray[np.float32]]:
        grads = torch.autograd.grad(loss, list(self.leaves.values()))
        return {name: grad.numpy() for name, grad in zip(self.leaves, grads, strict=True)}


def tensor(datum: types.Datum, name: str) -> torch.Tensor:
    """A dense loss input."""
    return datum.loss_fn_inputs[name].to_torch()


def cross_entropy(datum: types.Datum, lp: torch.Tensor) -> torch.Tensor:
    return -(tensor(datum, "weights") * lp).sum()


def importance_sampling(datum: types.Datum, lp: torch.Tensor) -> torch.Tensor:
    ratio = torch.exp(lp - tensor(datum, "logprobs"))
    return -(ratio * tensor(datum, "advantages")).sum()


def ppo(datum: types.Datum, lp: torch.Tensor, low: float = 0.8, high: float = 1.2) -> torch.Tensor:
    ratio = torch.exp(lp - tensor(datum, "logprobs"))
    advantages = tensor(datum, "advantages")
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages).sum()


def cispo(
    datum: types.Datum, lp: torch.Tensor, low: float = 0.0, high: float = 4.0
) -> torch.Tensor:
    ratio = torch.exp(lp - tensor(datum, "logprobs")).detach()
    return -(ratio.clamp(low, high) * lp * tensor(datum, "advantages")).sum()


def dro(datum: types.Datum, lp: torch.Tensor, beta: float = 0.05) -> torch.Tensor:
    log_ratio = lp - tensor(datum, "logprobs")
    return -(lp * tensor(datum, "advantages") - beta / 2 * log_ratio**2).sum()


def gspo(
    datum: types.Datum, lp: torch.Tensor, low: float = 1 - 3e-4, high: float = 1 + 4e-4
) -> torch.Tensor:
    counted = tensor(datum, "sequence_ratio_mask") != 0
    log_s = (lp - tensor(datum, "logprobs"))[counted].mean().detach()
    ratio = torch.exp(log_s + lp - lp.detach())
    advantages = tensor(datum, "advantages")
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages).sum()


def stable_reinforce(
    datum: types.Datum, lp: torch.Tensor, kl_coeff: float = 0.01, high: float = 2.0
) -> torch.Tensor:
    log_ratio = lp - tensor(datum, "logprobs")
    ratio = torch.exp(log_ratio)
    beyond = high - 1 - np.log(high) + (high - 1) * (log_ratio - np.log(high))
    k = torch.where(ratio <= high, ratio - 1 - log_ratio, beyond)
    weight = ratio.clamp(max=high).detach()
    return (-weight * lp * tensor(datum, "advantages") + kl_coeff * k).sum()
