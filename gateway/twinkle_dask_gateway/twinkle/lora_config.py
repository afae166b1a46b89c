"""PEFT's ``LoraConfig`` as the client sends it: a JSON text of some forty keys.

Unknown keys are let be, since every version of PEFT has more of them. Known ones that would change
training in a way that is not done here are refused unless they hold their defaults.
"""

import re
from collections.abc import Mapping
from typing import Any, Final, cast

import orjson

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.operations.values import LoraRequest

_MAX_BYTES: Final = 64 * 1024
_MODULE: Final = re.compile(r"\w+")

#: Values that ask for nothing, by key; and what to say of others.
_DEFAULTS: Final[Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "peft_type": ((None, "LORA"), "only LoRA adapters are trained"),
    "bias": ((None, "none"), "biases are not trained"),
    "use_dora": ((None, False), "DoRA is not offered"),
    "use_qalora": ((None, False), "QALoRA is not offered"),
    "use_bdlora": ((None, False), "BDLoRA is not offered"),
    "lora_bias": ((None, False), "adapters have no bias"),
    "modules_to_save": ((None, []), "no module of the base model is trained"),
    "exclude_modules": ((None, []), "name the modules to adapt in target_modules"),
    "layers_to_transform": ((None, []), "every layer is adapted; name modules in target_modules"),
    "rank_pattern": ((None, {}), "all modules have one rank"),
    "alpha_pattern": ((None, {}), "all modules have one lora_alpha"),
    "trainable_token_indices": ((None, [], {}), "embeddings are not trained"),
    "layer_replication": ((None, []), "layers are not replicated"),
    "init_lora_weights": ((None, True), "A begins at random and B at 0"),
    "inference_mode": ((None, False), "the adapter is made to be trained"),
    "alora_invocation_tokens": ((None, []), "activated LoRA is not offered"),
    "corda_config": ((None, {}), "A begins at random and B at 0"),
    "eva_config": ((None, {}), "A begins at random and B at 0"),
    "loftq_config": ((None, {}), "A begins at random and B at 0"),
    "lora_ga_config": ((None, {}), "A begins at random and B at 0"),
    "arrow_config": ((None, {}), "adapters are not combined"),
    "megatron_config": ((None, {}), "Megatron is not offered"),
    "ensure_weight_tying": ((None, False), "tied weights are not adapted"),
}


def read_lora(text: str | None) -> LoraRequest:
    """Read the config of ``add_adapter_to_model``.

    Raises:
        InvalidRequest: It is missing, or no such document.
        NotSupported: It asks for something that is not done here.
    """
    if text is None:
        raise InvalidRequest(
            "A LoraConfig is required: this service trains LoRA adapters, not whole models."
        )
    config = _parse(text)
    for name, (quiet, why) in _DEFAULTS.items():
        if name in config and config[name] not in quiet:
            raise NotSupported(
                f"LoraConfig.{name} = {str(config[name])[:60]!r} is not offered: {why}. Leave it "
                "at its default."
            )
    rank = config.get("r", 8)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise InvalidRequest("LoraConfig.r must be a whole number.")
    rslora = config.get("use_rslora")
    if not isinstance(rslora, bool | None):
        raise InvalidRequest("LoraConfig.use_rslora must be true or false.")
    names, pattern = _targets(config.get("target_modules"))
    if parameters := _texts(config.get("target_parameters") or [], "target_parameters"):
        if names is None:
            raise NotSupported(
                "LoraConfig.target_parameters goes with a list of target_modules here; list them."
            )
        names = (*names, *parameters)
    return LoraRequest(
        rank=rank,
        alpha=_number(config, "lora_alpha", 8.0),
        dropout=_number(config, "lora_dropout", 0.0),
        rslora=bool(rslora),
        train_unembed=False,
        targets=names,
        target_pattern=pattern,
    )


def _parse(text: str) -> dict[str, Any]:
    if len(text) > _MAX_BYTES:
        raise InvalidRequest(f"The LoraConfig is longer than {_MAX_BYTES // 1024} KiB.")
    try:
        value: Any = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest("config must be a LoraConfig as a JSON text.")
    config = cast(dict[str, Any], value)
    if (tag := config.get("_TWINKLE_TYPE_", "LoraConfig")) != "LoraConfig":
        raise InvalidRequest(f"config must be a LoraConfig, not {str(tag)[:60]!r}.")
    return config


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"LoraConfig.{name} must be a number.")
    return float(value)


def _targets(value: Any) -> tuple[tuple[str, ...] | None, str | None]:
    """Modules' names, or a pattern; neither for all linear modules but the output head."""
    if value is None:
        raise InvalidRequest(
            "LoraConfig.target_modules is missing; name modules, such as ['q_proj', 'v_proj'], or "
            "say 'all-linear'."
        )
    if value in ("all-linear", ["all-linear"]):
        return None, None
    if isinstance(value, str):
        # A text is a pattern to PEFT; of one that is a mere name nothing else can be meant.
        return ((value,), None) if _MODULE.fullmatch(value) else (None, value)
    return _texts(value, "target_modules"), None


def _texts(value: Any, name: str) -> tuple[str, ...]:
    listed = cast(list[Any], value) if isinstance(value, list) else [None]
    if not all(isinstance(one, str) for one in listed):
        raise InvalidRequest(f"LoraConfig.{name} must be a text or a list of texts.")
    return tuple(cast(list[str], listed))
