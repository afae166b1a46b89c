"""The same training in plain PyTorch: dense ``W + scale * B @ A``, full logits, autograd, AdamW.

Slow and obvious on purpose; one row at a time, nothing shared with the code under test.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from twinkle_dask.types import AdamParams, AdapterState, Datum, ForwardBackward, LossName

_hf: Any = transformers


def load(folder: Path) -> Any:
    """The plain transformers model in float32."""
    return _hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class DenseRun:
    def __init__(self, model: Any, state: AdapterState) -> None:
        self._model = model
        self._scale = state.spec.alpha / state.spec.rank
        self.weights = {k: torch.tensor(v, requires_grad=True) for k, v in state.weights.items()}
        self._optimizer: Any = torch.optim.AdamW(list(self.weights.values()))

    def logprobs(self, datum: Datum) -> Tensor:
        frozen = dict(self._model.named_parameters())
        merged: dict[str, Tensor] = {}
        for name in self.weights:
            if name.endswith(".lora_A.weight"):
                path = name.removesuffix(".lora_A.weight")
                delta = self.weights[f"{path}.lora_B.weight"] @ self.weights[name]
                base = self._model.get_submodule(path).weight.detach()
                merged[f"{path}.weight"] = base + self._scale * delta
        head = merged.pop("lm_head.weight", self._model.lm_head.weight.detach())
        body = {k.removeprefix("model."): v for k, v in (frozen | merged).items()}
        tokens = torch.tensor(datum.tokens, dtype=torch.int64)[None]
        hidden = torch.func.functional_call(self._model.model, body, (tokens,)).last_hidden_state
        logp_NV = torch.log_softmax(hidden[0] @ head.T, -1)
        targets = torch.tensor(datum.target_tokens)
        return logp_NV.gather(1, targets.view(len(logp_NV), -1)).view(targets.shape)

    def forward_backward(self, batch: ForwardBackward) -> tuple[list[Tensor], float]:
        """Logprobs and summed loss; gradients are added to the weights' ``grad``."""
        logprobs: list[Tensor] = []
        total = 0.0
        for datum in batch.data:
            lp = self.logprobs(datum)
            value = loss(batch, lp, {k: torch.tensor(v) for k, v in datum.loss_inputs.items()})
            if batch.backward:
                torch.autograd.backward(value)
            logprobs.append(lp.detach())
            total += float(value.detach())
        return logprobs, total

    def step(self, adam: AdamParams) -> float:
        """Clip, step, and forget the gradient; its norm before clipping."""
        settings = {
            "lr": adam.learning_rate,
            "betas": (adam.beta1, adam.beta2),
            "eps": adam.eps,
            "weight_decay": adam.weight_decay,
        }
        self._optimizer.param_groups[0].update(settings)
        most = adam.grad_clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(list(self.weights.values()), most)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)


def loss(batch: ForwardBackward, lp: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """The reference's formulas, word for word."""
    config = batch.loss.config
    weights = inputs.get("weights", torch.ones_like(lp))
    if batch.loss.name is LossName.CROSS_ENTROPY:
        return -(weights * lp).sum()
    advantages = inputs["advantages"]
    ratio = torch.exp(lp - inputs["logprobs"])
    if batch.loss.name is LossName.IMPORTANCE_SAMPLING:
        return -(weights * ratio * advantages).sum()
    clipped = torch.clamp(ratio, config["clip_low_threshold"], config["clip_high_threshold"])
    return -(weights * torch.min(ratio * advantages, clipped * advantages)).sum()
