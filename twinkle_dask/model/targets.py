"""What of a decoder can wear adapters, and to which group each part belongs.

A model with a projection that is not understood is refused: to leave it out silently would train
something other than what the tenant asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

from torch import nn

from twinkle_dask.errors import InvalidRequest, StartupError
from twinkle_dask.lora_targets import named
from twinkle_dask.model.experts import EXPERT_WEIGHTS, can_adapt
from twinkle_dask.types import LoraSpec


class Group(StrEnum):
    """What a tenant can switch with ``train_attn``, ``train_mlp`` and ``train_unembed``."""

    ATTN = "attn"
    MLP = "mlp"
    UNEMBED = "unembed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One linear, or one matrix of all routed experts: its path, its sizes D and E, its group.

    Attributes:
        module_path: Of the module in the Hugging Face model; for experts of the parameter.
        num_experts: How many linears of this size the path stands for. Their adapters lie in two
            matrices, as PEFT's ``target_parameters`` has them: A (experts * rank, D), expert by
            expert, and B (E, rank * experts), rank by rank.
    """

    module_path: str
    in_features: int
    out_features: int
    group: Group
    num_experts: int = 1

    def shapes(self, rank: int) -> dict[str, tuple[int, int]]:
        """The shapes of an adapter's two weights here, by name."""
        stacked = self.num_experts * rank
        return {
            f"{self.module_path}.lora_A.weight": (stacked, self.in_features),
            f"{self.module_path}.lora_B.weight": (self.out_features, stacked),
        }


# The last part of a module's path. Full and linear attention share a group, as for Tinker.
# fmt: off
_ATTN = frozenset({
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "query_key_value", "dense",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "c_attn", "q_attn",
    "in_proj_qkv", "in_proj_qkvz", "in_proj_z", "in_proj_a", "in_proj_b", "in_proj_ba",
})
_MLP = frozenset({
    "gate_proj", "up_proj", "down_proj", "gate_up_proj",
    "fc1", "fc2", "fc_in", "fc_out", "c_fc", "dense_h_to_4h", "dense_4h_to_h",
})
# fmt: on
# In GPT-2 and its kin both halves of a block end in a projection of this name.
_BY_PARENT = {"attn.c_proj": Group.ATTN, "mlp.c_proj": Group.MLP}

# What decides between experts is no projection of the hidden state: PEFT and Tinker leave it alone.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
# Modules with matrices that are no projections of the hidden state.
_NOT_PROJECTIONS = (nn.Embedding, nn.Conv1d)


def body_targets(body: nn.Module, prefix: str) -> tuple[Target, ...]:
    """Everything in a decoder's body that can be adapted, in the order of its modules.

    Args:
        body: The model without its head, its linears being ``nn.Linear``.
        prefix: The body's own path in the whole model, with a trailing dot.

    Raises:
        StartupError: Something in the body multiplies by a matrix and is none of these.
    """
    targets: list[Target] = []
    unknown: list[str] = []
    modules = dict(cast("Iterable[tuple[str, nn.Module]]", body.named_modules()))
    routed = {name.rpartition(".")[0] for name in modules if name.endswith(".experts")}
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        if (
            isinstance(module, _NOT_PROJECTIONS)
            or not _has_matrix(module)
            or (own in _ROUTERS and parent in routed)
        ):
            continue
        group = _group(name)
        if can_adapt(module):
            targets += _expert_targets(f"{prefix}{name}", module)
        # A subclass of nn.Linear may compute something else (quantised weights, say).
        elif group is None or type(module) is not nn.Linear:
            unknown.append(f"{prefix}{name} ({type(module).__name__})")
        else:
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
            f"{shown}. Supported are decoders built of torch.nn.Linear projections, such as Qwen3, "
            "Llama, Mistral and Gemma 3 text models, and fused experts such as Qwen3-MoE's."
        )
    return tuple(targets)


def chosen(targets: tuple[Target, ...], spec: LoraSpec) -> tuple[Target, ...]:
    """The targets that ``spec`` adapts.

    Raises:
        InvalidRequest: The spec names or switches on what this model has nothing of, or wants
            dropout where PEFT has none.
    """
    if spec.targets is not None:
        paths = set(named(spec.targets, tuple(target.module_path for target in targets)))
        found = tuple(target for target in targets if target.module_path in paths)
    else:
        found = _switched_on(targets, spec)
    routed = [target.module_path for target in found if target.num_experts > 1]
    if len(routed) != len(EXPERT_WEIGHTS) * len({path.rpartition(".")[0] for path in routed}):
        raise InvalidRequest(
            f"Routed experts are adapted whole: name {' and '.join(EXPERT_WEIGHTS)}, or neither."
        )
    if spec.dropout and routed:
        raise InvalidRequest(
            "Adapters of routed experts take no dropout, as in PEFT: set lora_dropout to 0, or "
            "choose other target modules."
        )
    return found


def _switched_on(targets: tuple[Target, ...], spec: LoraSpec) -> tuple[Target, ...]:
    on = {Group.ATTN: spec.train_attn, Group.MLP: spec.train_mlp, Group.UNEMBED: spec.train_unembed}
    empty = [group for group in on if on[group] and group not in {t.group for t in targets}]
    if empty:
        names = " and ".join(f"train_{group}" for group in empty)
        raise InvalidRequest(f"This base model has nothing to adapt for {names}; switch it off.")
    return tuple(target for target in targets if on[target.group])


def _expert_targets(path: str, experts: nn.Module) -> list[Target]:
    weights = cast("Any", experts)
    targets: list[Target] = []
    for name in EXPERT_WEIGHTS:
        num_experts, out_features, in_features = getattr(weights, name).shape
        targets.append(
            Target(
                module_path=f"{path}.{name}",
                in_features=in_features,
                out_features=out_features,
                group=Group.MLP,
                num_experts=num_experts,
            )
        )
    return targets


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def _group(name: str) -> Group | None:
    parts = name.split(".")
    if "experts" in parts:  # a list of modules, each of which would see tokens without their rows
        return None
    if parts[-1] in _ATTN:
        return Group.ATTN
    return Group.MLP if parts[-1] in _MLP else _BY_PARENT.get(".".join(parts[-2:]))
