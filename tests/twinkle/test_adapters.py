"""Checks 16 to 31: adapters and what they are set to."""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from peft import LoraConfig
from twinkle_client import init_twinkle_client
from twinkle_client.model import MultiLoraTransformersModel

from tests.twinkle.conftest import KEY, MODEL, OTHER_KEY

FEATURE = {"input_ids": [5, 6, 7, 8, 9], "labels": [6, 7, 8, 9, -100]}
CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def name() -> str:
    """An adapter's name that no other test uses."""
    return f"a{uuid.uuid4().hex[:8]}"


def refused(status: int, call: Callable[..., Any], *args: Any, **named: Any) -> str:
    """The message of a call that must be refused with a status."""
    with pytest.raises(requests.HTTPError) as info:
        call(*args, **named)
    assert info.value.response.status_code == status, str(info.value)
    return str(info.value)


def post(service: Any, client: Any, operation: str, body: Any, key: str = KEY) -> requests.Response:
    """A call that the client cannot make."""
    return requests.post(
        f"{service.url}/api/v1/model/{MODEL}/twinkle/{operation}",
        json=body,
        headers={"Authorization": f"Bearer {key}", "X-Twinkle-Session-Id": client._session_id},
        timeout=60,
    )


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|v)_proj", ["q_proj", "v_proj"]])
def test_16_adapters_with_targets_as_text_and_list(
    model: MultiLoraTransformersModel, targets: Any
) -> None:
    model.add_adapter_to_model(name(), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    weights = model.get_state_dict().result
    adapted = {key.rsplit(".lora_", 1)[0].rsplit(".", 1)[1] for key in weights}
    if targets == "all-linear":
        assert {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"} <= adapted
        assert "lm_head" not in adapted
    else:
        assert adapted == {"q_proj", "v_proj"}
    assert all(
        (len(value) if ".lora_A." in key else len(value[0])) == 4 for key, value in weights.items()
    )


def test_17_unknown_keys_of_the_config_are_tolerated(
    service: Any, client: Any, model: MultiLoraTransformersModel
) -> None:
    config = {"r": 4, "target_modules": "all-linear", "of_a_later_peft": {"x": 1}}
    body = {"adapter_name": name(), "config": json.dumps(config)}
    assert post(service, client, "add_adapter_to_model", body).status_code == 200


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
)
def test_17_settings_that_would_change_training_are_refused(
    service: Any, client: Any, model: MultiLoraTransformersModel, changed: Any, named: str
) -> None:
    config = {"r": 4, "target_modules": "all-linear"} | changed
    body = {"adapter_name": name(), "config": json.dumps(config)}
    answer = post(service, client, "add_adapter_to_model", body)
    assert answer.status_code == 400
    assert named in answer.json()["detail"]


def test_18_without_a_config(model: MultiLoraTransformersModel) -> None:
    assert "LoraConfig is required" in refused(400, model.add_adapter_to_model, name())


def test_19_a_config_that_is_an_object(model: MultiLoraTransformersModel) -> None:
    assert "config" in refused(422, model.add_adapter_to_model, name(), {"r": 4})


@pytest.mark.parametrize("bad", ["../x", "a/b", "", "~", "a..b", "x" * 65])
def test_20_bad_names(model: MultiLoraTransformersModel, bad: str) -> None:
    assert "not usable" in refused(400, model.add_adapter_to_model, bad, CONFIG)


def test_21_a_save_dir_that_does_not_exist(model: MultiLoraTransformersModel) -> None:
    refused(400, model.add_adapter_to_model, name(), CONFIG, save_dir="/nonexistent/folder")
    refused(400, model.add_adapter_to_model, name(), CONFIG, save_dir="/etc")


def test_21_checkpoints_land_in_save_dir(start_service: Any, tmp_path: Path) -> None:
    with start_service(save_roots=[str(tmp_path)]) as service:
        (tmp_path / "mine").mkdir()
        client = init_twinkle_client(base_url=service.url, api_key=KEY)
        try:
            model = MultiLoraTransformersModel(MODEL)
            model.add_adapter_to_model(name(), CONFIG, save_dir=str(tmp_path / "mine"))
            saved = model.save("one")
        finally:
            client.close()
        assert Path(saved.checkpoint_dir).is_relative_to(tmp_path / "mine")
        assert (Path(saved.checkpoint_dir) / "adapter_config.json").exists()


def test_22_one_name_in_two_sessions(service: Any) -> None:
    states = []
    for _ in range(2):
        client = init_twinkle_client(base_url=service.url, api_key=KEY)
        model = MultiLoraTransformersModel(MODEL)
        model.add_adapter_to_model("same", CONFIG)
        states.append(model.get_state_dict().result)
        client.close()
    first, second = states
    assert first.keys() == second.keys()
    assert any(first[key] != second[key] for key in first)


def test_23_a_name_that_is_taken_does_no_damage(model: MultiLoraTransformersModel) -> None:
    taken = name()
    model.add_adapter_to_model(taken, CONFIG)
    model.set_optimizer("AdamW", lr=1e-2)
    model.forward_backward(inputs=[FEATURE])
    model.clip_grad_and_step()
    before = model.get_state_dict().result
    assert "choose another name" in refused(409, model.add_adapter_to_model, taken, CONFIG)
    assert model.get_state_dict().result == before
    model.forward_backward(inputs=[FEATURE])
    model.clip_grad_and_step()
    assert model.get_state_dict().result != before


def test_25_a_rank_that_is_too_large_leaves_nothing(
    client: Any, model: MultiLoraTransformersModel
) -> None:
    used, again = client.get_capacity_info().used_loras, name()
    refused(
        400, model.add_adapter_to_model, again, LoraConfig(r=100_000, target_modules="all-linear")
    )
    unknown = LoraConfig(r=4, target_modules=["no_such_module"])
    assert "no_such_module" in refused(400, model.add_adapter_to_model, again, unknown)
    assert client.get_capacity_info().used_loras == used
    model.add_adapter_to_model(again, CONFIG)
    assert client.get_capacity_info().used_loras == used + 1


def test_26_settings_answer_nothing(model: MultiLoraTransformersModel) -> None:
    model.add_adapter_to_model(name(), CONFIG)
    assert model.set_template("Template", max_length=64) is None
    assert model.set_processor("InputProcessor", padding_side="right") is None
    assert model.set_loss("CrossEntropyLoss", reduction="mean") is None
    assert model.set_optimizer("AdamW", lr=1e-3) is None
    assert model.set_lr_scheduler("LinearLR", total_iters=4) is None
    assert model.add_metric("GRPOMetric", is_training=True) is None


@pytest.mark.parametrize(
    ("call", "cls"),
    [
        ("set_loss", "cross_entropy"),
        ("set_optimizer", "Adamm"),
        ("set_lr_scheduler", "NoLR"),
        ("set_template", "NoTemplate"),
        ("set_processor", "NoProcessor"),
        ("add_metric", "NoMetric"),
        ("apply_patch", "NoPatch"),
        ("set_loss", "ms://somebody/plugin"),
        ("set_loss", "__class__"),
    ],
)
def test_27_unknown_classes_are_named(
    model: MultiLoraTransformersModel, call: str, cls: str
) -> None:
    model.add_adapter_to_model(name(), CONFIG)
    assert repr(cls) in refused(400, getattr(model, call), cls)


def test_27_unknown_settings_are_named(model: MultiLoraTransformersModel) -> None:
    model.add_adapter_to_model(name(), CONFIG)
    assert "'learning_rate'" in refused(400, model.set_optimizer, "Adam", learning_rate=1)
    assert "'gamma'" in refused(400, model.set_loss, "DPOLoss", gamma=1)


def test_28_a_step_without_an_optimizer(model: MultiLoraTransformersModel) -> None:
    model.add_adapter_to_model(name(), CONFIG)
    model.forward_backward(inputs=[FEATURE])
    assert "set_optimizer" in refused(400, model.step)
    assert "set_optimizer" in refused(400, model.clip_grad_and_step)
    assert "set_optimizer" in refused(400, model.set_lr_scheduler, "LinearLR")


def test_29_calls_before_add_adapter(model: MultiLoraTransformersModel) -> None:
    for call in (model.step, model.zero_grad, model.backward, model.get_train_configs):
        refused(422, call)
    assert "add_adapter_to_model" in refused(400, model.forward_only, [FEATURE])
    model.adapter_name = "never-added"
    assert "add_adapter_to_model" in refused(404, model.forward_backward, [FEATURE])


def test_29_adapters_of_others_are_not_found(
    service: Any, client: Any, model: MultiLoraTransformersModel
) -> None:
    mine = name()
    model.add_adapter_to_model(mine, CONFIG)
    body = {"adapter_name": mine}
    assert post(service, client, "get_train_configs", body).status_code == 200
    assert post(service, client, "get_train_configs", body, OTHER_KEY).status_code == 404


def test_31_train_configs_in_lines(model: MultiLoraTransformersModel) -> None:
    model.add_adapter_to_model(name(), CONFIG, gradient_accumulation_steps=3)
    assert "set_optimizer" in model.get_train_configs().result
    model.set_optimizer("SGD", lr=0.25)
    model.set_lr_scheduler("LinearLR")
    number = sum(len(value) * len(value[0]) for value in model.get_state_dict().result.values())
    told = model.get_train_configs().result
    assert "Optimizer: SGD" in told
    assert "Learning rate: 0.25" in told
    assert "Lr scheduler: LinearLR" in told
    assert "accumulation steps: 3" in told
    assert f"Trainable params: {number:,d} ||" in told
    assert '"r": 4' in told
