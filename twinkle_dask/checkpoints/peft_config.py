"""The ``adapter_config.json`` with which PEFT puts an adapter on exactly the modules it has."""

from twinkle_dask.types import AdapterState, Json


def peft_config(adapter: AdapterState, base_model: str) -> Json:
    """Settings of a PEFT ``LoraConfig``, all of those that say what the adapter computes.

    ``target_modules`` are the last parts of the adapted modules' paths; PEFT matches them in every
    layer, and ``twinkle_dask.model.targets`` adapts a name in all layers or in none.
    """
    paths = {name.rsplit(".lora_", 1)[0] for name in adapter.weights}
    alpha = adapter.spec.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "auto_mapping": None,
        "inference_mode": True,
        "r": adapter.spec.rank,
        # PEFT declares an int; scale is lora_alpha / r either way.
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in paths}),
        "exclude_modules": None,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "lora_bias": False,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
