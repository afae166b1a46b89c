"""How many tokens a pass may hold: from what one token keeps for backward, and the memory left."""

import logging
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.init import init_adapter
from twinkle_dask.model.lora import BatchPlan, LoraTensors, Segment
from twinkle_dask.types import LoraSpec

log = logging.getLogger(__name__)

# On a processor a micro-batch is what others wait for, and more tokens make it no faster per token.
_MOST_ON_CPU = 2048
_MOST_ON_GPU = 16384
_LEAST = 256
# The rest is for adapters, the sampler's cache, logits, and what else runs on the machine.
_SHARE_OF_FREE = 0.4
_GRADIENTS_SHARE_OF_FREE = 0.1
_LEAST_GRADIENT_BYTES = 256 * 2**20
_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bounds of one pass.

    Attributes:
        tokens: Most tokens of a micro-batch; a longer row goes alone.
        checkpoint_tokens: Most tokens whose activations are kept; a pass of more computes each
            layer a second time in backward.
        gradient_bytes: Most bytes of gradients in the making, of which every work has its own.
    """

    tokens: int
    checkpoint_tokens: int
    gradient_bytes: int


def choose_budget(base: BaseModel, asked: int | None, *, fixed: bool) -> Budget:
    """Bounds for this model on this machine as it is now.

    Args:
        base: Tried out with a short pass.
        asked: The operator's bound, if any.
        fixed: The bound must be the same at every start.
    """
    free = free_bytes(base.device)
    per_token = saved_bytes_per_token(base)
    fits = max(_LEAST, int(_SHARE_OF_FREE * free / per_token))
    most = _MOST_ON_GPU if base.device.type == "cuda" else _MOST_ON_CPU
    tokens = asked or (most if fixed else min(most, fits))
    log.info(
        "A token keeps %.1f KB for backward; %.1f GB are free: %d tokens in a micro-batch",
        per_token / 1024,
        free / 2**30,
        tokens,
    )
    gradients = max(_LEAST_GRADIENT_BYTES, int(_GRADIENTS_SHARE_OF_FREE * free))
    return Budget(tokens=tokens, checkpoint_tokens=fits, gradient_bytes=gradients)


def saved_bytes_per_token(base: BaseModel) -> int:
    """What autograd keeps of one token when every group is adapted; measured, at a small rank."""
    spec = LoraSpec(rank=1, seed=0)
    state = init_adapter(base.targets(spec), spec)
    adapter = LoraTensors.from_state(state, device=base.device, dtype=base.dtype)
    grads = {name: torch.zeros_like(master) for name, master in adapter.master.items()}
    known = {p.untyped_storage().data_ptr() for p in base.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def give(tensor: Any) -> Any:
        return tensor

    tokens_BL = torch.zeros(1, _TOKENS, dtype=torch.int64, device=base.device)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, give):
        base.hidden(tokens_BL, BatchPlan((Segment(slice(0, 1), adapter, grads),)))
    return max(1, sum(found.values()) // _TOKENS)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses at the moment, where ``device`` computes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
