"""A loaded model tried on short rows, before any tenant's: it must be what the engines rely on.

Takes milliseconds, and catches architectures that no list of names would.

Shapes: B rows, L positions, V vocabulary, D hidden size.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from twinkle_dask.errors import StartupError
from twinkle_dask.model.linears import AdaptedLinear
from twinkle_dask.model.lora import BatchPlan
from twinkle_dask.model.vision import Patch, Vision

if TYPE_CHECKING:
    from twinkle_dask.model.base import BaseModel


def try_out(
    base: "BaseModel", model: nn.Module, adapted: Mapping[str, nn.Module], *, flat: bool
) -> list[tuple[AdaptedLinear, Tensor]]:
    """Run two rows: adapters reach what they should, attention is causal, the head is all.

    Args:
        base: Nearly made.
        model: The whole model, which computes its logits in its own way.
        adapted: By path, everything that adapters can be on, the head left out.
        flat: Some of it may see tokens without their rows.

    Raises:
        StartupError: A part is not called on rows of tokens, a token sees later ones, or logits are
            more than the head's product.

    Returns:
        Each linear as it was called, with what it was called on.
    """
    calls: list[tuple[AdaptedLinear, Tensor]] = []
    called: list[nn.Module] = []
    tokens_BL = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=base.device)

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shape = tuple(size for size in inputs[0].shape[:-1] if size != 1)
        # Beside experts rows may be flattened, since plans are over positions then.
        if shape == tokens_BL.shape or (flat and shape == (tokens_BL.numel(),)):
            called.append(module)
            if isinstance(module, AdaptedLinear):
                calls.append((module, inputs[0]))

    hooks = [part.register_forward_pre_hook(note) for part in adapted.values()]
    try:
        with torch.no_grad():
            hidden_BLD = base.hidden(tokens_BL, BatchPlan())
            in_body, called_in_body = list(calls), set(called)
            expected_BLV = _logits(model, input_ids=tokens_BL)
    finally:
        for hook in hooks:
            hook.remove()
    if silent := [path for path, part in adapted.items() if part not in called_in_body]:
        raise StartupError(
            "This architecture is not supported: it does not call its linear layers on rows of "
            f"tokens ({', '.join(silent[:4])}), so adapters on them would have no effect."
        )
    if not _close(hidden_BLD[0, :-1], hidden_BLD[1, :-1]):
        raise StartupError(
            "This model is not causal: what a token sees depends on the tokens after it."
        )
    if not _close(base.head.logits(hidden_BLD, BatchPlan()), expected_BLV):
        raise StartupError(
            "This architecture is not supported yet: its logits are not the plain product of "
            "the last hidden state and the output head."
        )
    return in_body


def try_to_see(base: "BaseModel", model: nn.Module, vision: Vision) -> None:
    """Compare a row with an image with what the whole model makes of it.

    Raises:
        StartupError: They differ.
    """
    placeholder, length = vision.facts.placeholder, vision.facts.num_positions
    tokens_BL = torch.tensor([[1, 2, *[placeholder] * length, 4, 5]], device=base.device)
    example = vision.examples()[0]
    with torch.no_grad():
        patch = Patch(2, vision.look(example))
        hidden_BLD = base.hidden(tokens_BL, BatchPlan(), patches=[patch])
        expected_BLV = _logits(model, input_ids=tokens_BL, **vision.inputs(example))
    if not _close(base.head.logits(hidden_BLD, BatchPlan()), expected_BLV):
        raise StartupError(
            "This architecture is not supported: an image is more to it than hidden states in the "
            "place of tokens."
        )


def _logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    output = cast("Any", model)(**inputs, use_cache=False)
    return output.logits.float()


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to bfloat16 noise, measured against the largest value."""
    return bool((a - b).abs().max() <= 0.02 * b.abs().max())
