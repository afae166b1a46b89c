"""Attention as Transformers' ``sdpa``, except where torch's bfloat16 backward is slow on a CPU.

torch 2.13's backward of flash attention costs about 20 ms a layer on one AMX core for 1024 bfloat16
tokens however short the rows are, a quarter of a training pass of SmolLM2-135M; in float32 it costs
9 ms in rows of 64 and 13 ms in rows of 128, and rounds less. From 256 tokens bfloat16 is as fast.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

ATTENTION = "twinkle_dask"
_SHORT_ROW = 192

_sdpa: Any = sdpa_attention.sdpa_attention_forward


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any
) -> tuple[Tensor, None]:
    """Shapes are those of Transformers: (B, heads, L, head size) in, (B, L, heads, head size) out."""
    if (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.requires_grad
        and query.shape[2] <= _SHORT_ROW
    ):
        out, _ = _sdpa(module, query.float(), key.float(), value.float(), mask, **settings)
        return out.to(query.dtype), None
    return _sdpa(module, query, key, value, mask, **settings)


def use_attention(model: Any) -> None:
    """Switch a Transformers model that was loaded with ``sdpa`` to this attention."""
    transformers.AttentionInterface.register(ATTENTION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
