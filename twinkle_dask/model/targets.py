"""Which linears of a decoder can wear adapters, and to which group each belongs.

A model with a projection that is not understood is refused: to leave it out silently would train
something other than what the tenant asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

from torch import nn

from twinkle_dask.errors import StartupError
from twinkle_dask.types import LoraSpec


class Group(StrEnum):
    """What a tenant can switch with ``train_attn``, ``train_mlp`` and ``train_unembed``."""

    ATTN = "attn"
    MLP = "mlp"
    UNEMBED = "unembed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One linear: its path in the Hugging Face model, its sizes D and E, its group."""

    module_path: str
    in_features: int
    out_features: int
    group: Group


# The last part of a module's path. Full and linear attention share a group, as for Tinker.
# fmt: off
_ATTN = frozenset({
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "query_key_value", "dense",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "in_proj_qkv", "in_proj_qkvz", "in_proj_z", "in_proj_a", "in_proj_b", "in_proj_ba",
})
_MLP = frozenset({
    "gate_proj", "up_proj", "down_proj", "gate_up_proj",
    "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h",
})
# fmt: on

# Modules with matrices that are no projections of the hidden state.
_NOT_PROJECTIONS = (nn.Embedding, nn.Conv1d)


def body_targets(body: nn.Module, prefix: str) -> tuple[Target, ...]:
    """Every linear of a decoder's body, in the order of its modules.

    Args:
        body: The model without its head.
        prefix: The body's own path in the whole model, with a trailing dot.

    Raises:
        StartupError: Something in the body multiplies by a matrix and is no known linear.
    """
    targets: list[Target] = []
    unknown: list[str] = []
    modules = cast("Iterable[tuple[str, nn.Module]]", body.named_modules())
    for name, module in modules:
        if isinstance(module, _NOT_PROJECTIONS) or not _has_matrix(module):
            continue
        group = _group(name)
        # A subclass of nn.Linear may compute something else (quantised weights, say).
        if group is None or type(module) is not nn.Linear:
            unknown.append(f"{prefix}{name} ({type(module).__name__})")
            continue
        targets.append(
            Target(
                module_path=f"{prefix}{name}",
                in_features=module.in_features,
                out_features=module.out_features,
                group=group,
            )
        )
    if unknown:
        shown = ", ".join(unknown[:4]) + (f" and {len(unknown) - 4} more" if unknown[4:] else "")
        raise StartupError(
            "This architecture is not supported: no adapter can be put on "
            f"{shown}. Supported are dense decoders built of torch.nn.Linear projections, such as "
            "Qwen3, Llama, Mistral and Gemma 3 text models."
        )
    return tuple(targets)


def chosen(targets: tuple[Target, ...], spec: LoraSpec) -> tuple[Target, ...]:
    """The targets that ``spec`` adapts."""
    on = {Group.ATTN: spec.train_attn, Group.MLP: spec.train_mlp, Group.UNEMBED: spec.train_unembed}
    return tuple(target for target in targets if on[target.group])


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def _group(name: str) -> Group | None:
    parts = name.split(".")
    if "experts" in parts:  # sees tokens without their rows
        return None
    if parts[-1] in _ATTN:
        return Group.ATTN
    return Group.MLP if parts[-1] in _MLP else None
