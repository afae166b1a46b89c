"""PEFT's LoraConfig as the Twinkle client sends it."""

import contextlib
import json
from typing import Any

import pytest

from twinkle_dask.errors import InvalidRequest, NotSupported, RequestError
from twinkle_dask_gateway.twinkle.lora_config import read_lora

#: All that peft 0.19 sends of ``LoraConfig(target_modules="all-linear")``.
QUIET: dict[str, Any] = {
    "task_type": None,
    "peft_type": "LORA",
    "auto_mapping": None,
    "peft_version": "0.19.0",
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
    "r": 8,
    "target_modules": "all-linear",
    "exclude_modules": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "trainable_token_indices": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "use_dora": False,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "layer_replication": None,
    "lora_bias": False,
    "target_parameters": None,
    "arrow_config": None,
    "ensure_weight_tying": False,
    "_TWINKLE_TYPE_": "LoraConfig",
}


def test_what_the_client_sends() -> None:
    lora = read_lora(json.dumps(QUIET))
    assert (lora.rank, lora.alpha, lora.dropout, lora.rslora, lora.targets) == (
        8,
        8.0,
        0.0,
        False,
        None,
    )


def test_what_is_honoured() -> None:
    changed = {
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "target_modules": ["v_proj", "q_proj", "q_proj"],
    }
    lora = read_lora(json.dumps(QUIET | changed))
    assert (lora.rank, lora.alpha, lora.dropout, lora.rslora) == (4, 32.0, 0.1, True)
    assert lora.targets == ("v_proj", "q_proj", "q_proj")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("exclude_modules", ["q_proj"]),
        ("layers_to_transform", 3),
        ("rank_pattern", {"q_proj": 2}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", False),
        ("peft_type", "LOHA"),
        ("inference_mode", True),
    ],
)
def test_what_would_change_training_is_refused(name: str, value: Any) -> None:
    with pytest.raises(NotSupported, match=name):
        read_lora(json.dumps(QUIET | {name: value}))


def test_a_text_is_a_pattern_unless_it_is_a_name() -> None:
    pattern = read_lora(json.dumps(QUIET | {"target_modules": r".*\.(q|v)_proj"}))
    assert (pattern.targets, pattern.target_pattern) == (None, r".*\.(q|v)_proj")
    name = read_lora(json.dumps(QUIET | {"target_modules": "q_proj"}))
    assert (name.targets, name.target_pattern) == (("q_proj",), None)


def test_parameters_of_experts_are_targets_too() -> None:
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    changed = {"target_modules": ["q_proj"], "target_parameters": experts}
    assert read_lora(json.dumps(QUIET | changed)).targets == ("q_proj", *experts)
    with pytest.raises(NotSupported, match="target_parameters"):
        read_lora(json.dumps(QUIET | {"target_parameters": experts}))


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "null",
        "[]",
        '"text"',
        "1",
        json.dumps(QUIET | {"r": "8"}),
        json.dumps(QUIET | {"r": True}),
        json.dumps(QUIET | {"lora_alpha": "much"}),
        json.dumps(QUIET | {"use_rslora": 1}),
        json.dumps(QUIET | {"target_modules": None}),
        json.dumps(QUIET | {"target_modules": [1]}),
        json.dumps(QUIET | {"_TWINKLE_TYPE_": "DatasetMeta"}),
        json.dumps(QUIET | {"peft_version": "x" * 70_000}),
    ],
)
def test_what_is_no_config(text: str | None) -> None:
    with pytest.raises(InvalidRequest):
        read_lora(text)


def test_values_of_other_kinds_are_refused_and_never_raise() -> None:
    for name in QUIET:
        for value in (None, 1, 1.5, "x", [], {}, [1], {"a": 1}, True):
            with contextlib.suppress(RequestError):
                read_lora(json.dumps(QUIET | {name: value}))
