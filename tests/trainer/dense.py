"""The same training in plain PyTorch: dense ``W + scale * B @ A``, full logits, autograd, AdamW.

Slow and obvious on purpose; one row at a time, nothing shared with the code under test.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

import torch
import transformers
from torch import Tensor

from twinkle_dask.types import AdamParams, AdapterState, Datum, ForwardBackward, LossName, LossSpec

_hf: Any = transformers


def load(folder: Path) -> Any:
    """The plain transformers model in float32."""
    return _hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class DenseRun:
    def __init__(self, model: Any, state: AdapterState) -> None:
        self._model = model
        rank = state.spec.rank
        self._scale = state.spec.alpha / (rank**0.5 if state.spec.rslora else rank)
        self.weights = {k: torch.tensor(v, requires_grad=True) for k, v in state.weights.items()}
        self._optimizer: Any = torch.optim.AdamW(list(self.weights.values()))

    def logprobs(self, datum: Datum) -> Tensor:
        frozen = dict(self._model.named_parameters())
        merged: dict[str, Tensor] = {}
        for name in self.weights:
            if name.endswith(".lora_A.weight"):
                path = name.removesuffix(".lora_A.weight")
                # Routed experts are a parameter of their own, all others a module's weight.
                place = path if path in frozen else f"{path}.weight"
                base = self._weight(place)
                merged[place] = base.detach() + self._scale * self._delta(path, base.shape)
        head = merged.pop("lm_head.weight", self._model.lm_head.weight.detach())
        prefix = f"{self._model.base_model_prefix}."
        body = {
            name.removeprefix(prefix): weight
            for name, weight in (frozen | merged).items()
            if name.startswith(prefix)
        }
        tokens = torch.tensor(datum.tokens, dtype=torch.int64)[None]
        call: Any = torch.func.functional_call
        hidden = call(self._model.base_model, body, (tokens,)).last_hidden_state
        bias = 0 if self._model.lm_head.bias is None else self._model.lm_head.bias.detach()
        logp_NV = torch.log_softmax(hidden[0] @ head.T + bias, -1)
        targets = torch.tensor(datum.target_tokens)
        return logp_NV.gather(1, targets.view(len(logp_NV), -1)).view(targets.shape)

    def _weight(self, place: str) -> Tensor:
        module, _, name = place.rpartition(".")
        return getattr(self._model.get_submodule(module), name)

    def _delta(self, path: str, shape: torch.Size) -> Tensor:
        a, b = (self.weights[f"{path}.lora_{x}.weight"] for x in "AB")
        if len(shape) == 3:  # experts, as PEFT lays them out
            a_ERD = a.view(shape[0], -1, shape[2])
            b_ORE = b.view(shape[1], -1, shape[0])
            return torch.einsum("ore,erd->eod", b_ORE, a_ERD)
        # GPT-2 keeps its weights the other way round.
        transposed = type(self._model.get_submodule(path)).__name__ == "Conv1D"
        return (b @ a).T if transposed else b @ a

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
    """The formulas as ``docs/losses.md`` writes them, for one datum."""
    assert isinstance(batch.loss, LossSpec)
    config, name = batch.loss.config, batch.loss.name
    weights = inputs.get("weights", torch.ones_like(lp))
    if name is LossName.CROSS_ENTROPY:
        return -(weights * lp).sum()
    advantages, q = inputs["advantages"], inputs["logprobs"]
    ratio = torch.exp(lp - q)

    def clip(x: Tensor) -> Tensor:
        low, high = (
            inputs.get(key, torch.tensor(config.get(key, 0.0)))
            for key in ("clip_low_threshold", "clip_high_threshold")
        )
        return torch.min(torch.max(x, low), high)

    match name:
        case LossName.IMPORTANCE_SAMPLING:
            terms = -ratio * advantages
        case LossName.PPO:
            terms = -torch.min(ratio * advantages, clip(ratio) * advantages)
        case LossName.CISPO:
            terms = -clip(ratio).detach() * lp * advantages
        case LossName.DRO:
            terms = -(lp * advantages - 0.5 * config["beta"] * (lp - q) ** 2)
        case LossName.GSPO:
            log_s = (lp.detach() - q)[inputs["sequence_ratio_mask"] != 0].mean()
            ratio = torch.exp(log_s + lp - lp.detach())
            terms = -torch.min(ratio * advantages, clip(ratio) * advantages)
        case LossName.STABLE_REINFORCE:
            most = inputs.get("clip_high_threshold", torch.tensor(config["clip_high_threshold"]))
            log_ratio = lp - q
            near = torch.exp(torch.min(log_ratio, most.log())) - 1 - log_ratio
            far = most - 1 - most.log() + (most - 1) * (log_ratio - most.log())
            k = torch.where(ratio <= most, near, far)
            advantaged = (advantages != 0).float()
            terms = -torch.min(ratio, most).detach() * advantages * lp
            terms = terms + config["kl_coeff"] * k * advantaged
        case _:
            assert_never(name)
    return (weights * terms).sum()
