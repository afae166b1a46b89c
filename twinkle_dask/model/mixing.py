"""Whether a model's sequences may share one row, with attention alone kept apart.

Packing puts rows one after another and makes attention block-diagonal. That is right for a model
whose tokens meet in softmax attention and nowhere else. A convolution over positions, or a state
that is carried along, would run on from one row into the next; such models keep a row for each
sequence, padded on the right.

The test is in two parts, and both must pass: what the model says of itself, and what a packed pass
of two short sequences does. What is not known is padded: that is slower, and never wrong.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from twinkle_dask.model import attention

# Kinds of layers, as transformers' configurations list them, in which attention is all that mixes.
# "chunked_attention" is missing on purpose: its chunks are counted from the row's beginning.
_ATTENTION = frozenset({"full_attention", "sliding_attention"})
_STATEFUL = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase, nn.ZeroPad2d)


def why_padded(model: nn.Module, body: Any) -> str | None:
    """Why the rows of this model must stay apart; None if they may be packed.

    Runs a few short passes without gradients. If the answer is None, the model is left with
    ``attention.NAME`` for its implementation of attention, else with the one it came with.

    Args:
        model: A ``transformers`` causal language model.
        body: The same model without its head.
    """
    if reason := _by_description(model):
        return reason
    hugging_face = cast("Any", model)
    before: str = hugging_face.config._attn_implementation
    attention.register()
    hugging_face.set_attn_implementation(attention.NAME)
    if reason := _by_trial(body):
        hugging_face.set_attn_implementation(before)
    return reason


def _by_description(model: nn.Module) -> str | None:
    hugging_face = cast("Any", model)
    config = hugging_face.config.get_text_config()
    if getattr(hugging_face, "_is_stateful", False):
        return "it carries a state from token to token"
    if not getattr(hugging_face, "_supports_attention_backend", False):
        return "its attention cannot be exchanged for another implementation"
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := sorted(kinds - _ATTENTION):
        return f"it has layers of the kind {others[0]}"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked"
    found = next((type(m).__name__ for m in model.modules() if isinstance(m, _STATEFUL)), None)
    return None if found is None else f"it has a module that mixes positions ({found})"


def _by_trial(body: Any) -> str | None:
    """Two packed sequences against the same two as rows."""
    device = next(body.parameters()).device
    tokens_BL = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1], [5, 6, 7, 8]], device=device)
    first_L, second_L, other_L = tokens_BL
    positions_T = torch.arange(4, device=device).repeat(2)
    rows = attention.Rows.of([4, 4], device)

    def packed(sequence_L: Tensor) -> Tensor:
        """Hidden states of ``second_L`` with another sequence before it."""
        with attention.packed(rows):
            output = body(
                input_ids=torch.cat([sequence_L, second_L])[None],
                position_ids=positions_T[None],
                use_cache=False,
                return_dict=True,
            )
        hidden_LD: Tensor = output.last_hidden_state[0, 4:]
        return hidden_LD

    try:
        with torch.no_grad():
            after_first, after_other = packed(first_L), packed(other_L)
            apart = body(input_ids=tokens_BL, use_cache=False, return_dict=True).last_hidden_state
    # A layout that our attention cannot read fails in torch, somewhere.
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"it cannot run packed ({reason})"
    # Equal shapes take equal kernels, except that experts' products are cut by how many tokens they
    # have; so all that may differ is rounding, and far less than one position's part in attention.
    noise = 1e-5 if apart.dtype == torch.float32 else 1e-2
    if not _near(after_first, after_other, noise):
        return "packed sequences see each other"
    # Rows have another shape: bfloat16's rounding adds up over many layers. A position that saw the
    # other sequence, or sat in the wrong place, would change by tens of percent.
    if not _near(after_first, apart[1], 1e-3 if apart.dtype == torch.float32 else 0.05):
        return "a packed sequence is not what it is in a row of its own"
    return None


def _near(actual: Tensor, expected: Tensor, rel: float) -> bool:
    difference = (actual - expected).float().square().sum().sqrt()
    return bool(difference <= rel * expected.float().square().sum().sqrt())
