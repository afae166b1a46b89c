"""How PEFT writes an adapter: the names of its tensors and its ``adapter_config.json``.

Routed experts are parameters, not modules. PEFT wraps their module once for each parameter, the
first one innermost, and so calls the tensors of ``experts.gate_up_proj`` and ``experts.down_proj``
by the names ``experts.base_layer`` and ``experts``.
"""

import re

from twinkle_dask.lora_targets import is_target
from twinkle_dask.types import AdapterState, Json, LoraSpec

_EXPERTS = (
    (".experts.gate_up_proj.lora_", ".experts.base_layer.lora_"),
    (".experts.down_proj.lora_", ".experts.lora_"),
)
# Projections of which a model has one in attention and one in the MLP: PEFT needs more of the path.
_IN_BOTH_HALVES = frozenset({"c_proj"})


def peft_name(name: str) -> str:
    """A weight's name in PEFT's file, without the prefix."""
    for own, theirs in _EXPERTS:
        name = name.replace(own, theirs)
    return name


def own_name(name: str) -> str:
    """The inverse of ``peft_name``."""
    for own, theirs in _EXPERTS:
        name = name.replace(theirs, own)
    return name


def peft_config(adapter: AdapterState, base_model: str) -> Json:
    """Settings of a PEFT ``LoraConfig``, all of those that say what the adapter computes.

    Targets are what the tenant named, or else the last parts of the adapted paths; PEFT matches
    them in every layer, and the groups of ``twinkle_dask.model.targets`` adapt a name in all layers
    or in none. A model that sees has the same names in its vision tower, which is therefore
    excluded.
    """
    paths = {name.rsplit(".lora_", 1)[0] for name in adapter.weights}
    experts = {path for path in paths if path.split(".")[-2:-1] == ["experts"]}
    alpha = adapter.spec.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "auto_mapping": None,
        "inference_mode": True,
        "r": adapter.spec.rank,
        # PEFT declares an int, and divides by r or its root either way.
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": _target_modules(adapter.spec, paths - experts),
        "target_parameters": sorted({".".join(path.split(".")[-2:]) for path in experts}) or None,
        "exclude_modules": _elsewhere(paths),
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "lora_bias": False,
        "lora_dropout": adapter.spec.dropout,
        "fan_in_fan_out": False,
        "use_rslora": adapter.spec.rslora,
        "use_dora": False,
        "init_lora_weights": True,
    }


def _target_modules(spec: LoraSpec, paths: set[str]) -> list[str]:
    if spec.targets is None:
        return sorted({_last_parts(path) for path in paths})
    return sorted({name for name in spec.targets if any(is_target(path, name) for path in paths)})


def _elsewhere(paths: set[str]) -> str | None:
    """A pattern of everything outside of the decoder, if that is a part of a part of the model."""
    stems = {stem[1] for path in paths if (stem := re.match(r"(.+?)\.[^.]+\.\d+\.", path))}
    inner = sorted(re.escape(stem) for stem in stems if "." in stem)
    return rf"(?!(?:{'|'.join(inner)})\.|lm_head$).*" if inner else None


def _last_parts(path: str) -> str:
    parts = path.split(".")
    return ".".join(parts[-2:]) if parts[-1] in _IN_BOTH_HALVES else parts[-1]
