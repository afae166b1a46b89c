"""Checks 32 to 42 and 48 to 51: passes and steps."""

import json
import uuid
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from adapters import BATCH, feature, lora
from twinkle_client import init_twinkle_client
from twinkle_client.http import set_api_key, set_session_id
from twinkle_client.http.http_utils import _build_headers
from twinkle_client.model import MultiLoraTransformersModel

from tests.twinkle.conftest import KEY, MODEL, OTHER_KEY

TALK = {
    "messages": [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A cat."},
    ]
}


@pytest.fixture
def adapter(model: MultiLoraTransformersModel) -> MultiLoraTransformersModel:
    """A new adapter with an optimizer."""
    return fresh(model)


def fresh(model: MultiLoraTransformersModel, **more: Any) -> MultiLoraTransformersModel:
    model.add_adapter_to_model(f"a{uuid.uuid4().hex[:8]}", lora(), **more)
    model.set_optimizer("AdamW", lr=1e-2)
    return model


def refused(status: int, call: Callable[..., Any], *args: Any, **named: Any) -> str:
    with pytest.raises(requests.HTTPError) as info:
        call(*args, **named)
    assert info.value.response.status_code == status, str(info.value)
    return str(info.value)


def state(model: MultiLoraTransformersModel) -> dict[str, Any]:
    return model.get_state_dict().result


def set_weights(to: MultiLoraTransformersModel, source: MultiLoraTransformersModel) -> None:
    """Set an adapter to another's weights."""
    to.load(source.save("start").twinkle_path)


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_allclose(value, other[key], rtol=1e-5, atol=1e-7, err_msg=key)


def test_32_forward_backward_gives_loss_and_logps(adapter: MultiLoraTransformersModel) -> None:
    result = adapter.forward_backward(inputs=BATCH).result
    assert isinstance(result["loss"], float)
    assert result["logits"] is None
    assert result["past_key_values"] is None
    logps = np.asarray(result["logps"])
    assert logps.shape == (2, 6)
    counted = [[label != -100 for label in one["labels"]] for one in BATCH]
    total = -sum(logps[row, : len(mask)][mask].sum() for row, mask in enumerate(counted))
    assert result["loss"] == pytest.approx(total, rel=1e-5)


def test_33_a_single_element(adapter: MultiLoraTransformersModel) -> None:
    alone = adapter.forward_only(inputs=BATCH[0]).result["logps"]
    assert alone == adapter.forward_only(inputs=[BATCH[0]]).result["logps"]


def test_33_a_padded_batch_and_nested_rows(adapter: MultiLoraTransformersModel) -> None:
    plain = np.asarray(adapter.forward_only(inputs=BATCH).result["logps"])
    whole = {
        "input_ids": [BATCH[0]["input_ids"], [*BATCH[1]["input_ids"], 0]],
        "labels": [BATCH[0]["labels"], [*BATCH[1]["labels"], -100]],
        "attention_mask": [[1] * 6, [1, 1, 1, 1, 1, 0]],
        "position_ids": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, -1]],
    }
    np.testing.assert_allclose(
        adapter.forward_only(inputs=whole).result["logps"], plain, rtol=1e-5, atol=1e-6
    )
    nested = [{key: [value] for key, value in one.items()} for one in BATCH]
    np.testing.assert_allclose(
        adapter.forward_only(inputs=nested).result["logps"], plain, rtol=1e-5, atol=1e-6
    )


def test_33_padding_before_and_packed_rows(adapter: MultiLoraTransformersModel) -> None:
    plain = np.asarray(adapter.forward_only(inputs=BATCH).result["logps"])
    left = {
        "input_ids": [0, 0, *BATCH[1]["input_ids"]],
        "labels": [-100, -100, *BATCH[1]["labels"]],
        "attention_mask": [0, 0, 1, 1, 1, 1, 1],
    }
    logps = np.asarray(adapter.forward_only(inputs=left).result["logps"])
    np.testing.assert_allclose(logps[0, 2:], plain[1, :5], rtol=1e-5, atol=1e-6)
    packed = {
        "input_ids": BATCH[0]["input_ids"] + BATCH[1]["input_ids"],
        "labels": BATCH[0]["labels"] + BATCH[1]["labels"],
        "position_ids": [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4],
    }
    np.testing.assert_allclose(
        adapter.forward_only(inputs=packed).result["logps"], plain, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pixel_values": [[0.5]]}, "pixel_values"),
        ({"attention_mask": [1, 0, 1, 1, 1, 1]}, "zeros between tokens"),
        ({"position_ids": [0, 1, 2, 9, 10, 11]}, "jump"),
        ({"labels": [1, 2]}, "already shifted"),
        ({"input_ids": ["a", "b"]}, "integers"),
        ({"input_ids": [1, 2, 10**9], "labels": [1, 2, 3]}, "vocabulary"),
        ({"loss_scale": [0.5] * 6}, "loss_scale"),
    ],
)
def test_33_inputs_that_are_refused(
    adapter: MultiLoraTransformersModel, changed: Any, said: str
) -> None:
    assert said in refused(400, adapter.forward_only, [BATCH[0] | changed])
    assert adapter.forward_only(inputs=BATCH).result["logps"]


def test_34_trajectories_are_encoded_with_the_adapters_template(
    adapter: MultiLoraTransformersModel,
) -> None:
    assert "set_template" in refused(400, adapter.forward_only, [TALK])
    adapter.set_template("Template", max_length=256)
    talked = adapter.forward_backward(inputs=[TALK]).result
    assert isinstance(talked["loss"], float)
    # Each element for itself, whatever the first one is.
    mixed = np.asarray(adapter.forward_only(inputs=[BATCH[0], TALK]).result["logps"])
    assert mixed.shape == (2, len(talked["logps"][0]))
    np.testing.assert_allclose(mixed[1], talked["logps"][0], rtol=1e-4, atol=1e-5)


def test_35_forward_only_adds_no_gradient(adapter: MultiLoraTransformersModel) -> None:
    before = state(adapter)
    adapter.forward_only(inputs=BATCH)
    adapter.clip_grad_and_step()
    assert state(adapter) == before


def test_36_the_base_model_alone(adapter: MultiLoraTransformersModel) -> None:
    untrained = np.asarray(adapter.forward_only(inputs=BATCH).result["logps"])
    for _ in range(3):
        adapter.forward_backward(inputs=BATCH)
        adapter.clip_grad_and_step()
    trained = np.asarray(adapter.forward_only(inputs=BATCH).result["logps"])
    base = np.asarray(adapter.forward_only(inputs=BATCH, disable_lora=True).result["logps"])
    assert np.abs(trained - untrained).max() > 1e-3
    np.testing.assert_allclose(base, untrained, rtol=1e-5, atol=1e-6)
    assert "disable_lora" in refused(400, adapter.forward_backward, BATCH, disable_lora=True)


def test_36_temperature_and_logits(adapter: MultiLoraTransformersModel) -> None:
    row = BATCH[0]
    result = adapter.forward_only(inputs=[row], temperature=2.0, return_logits=True).result
    logits = np.asarray(result["logits"])
    assert logits.shape[:2] == (1, 6)
    scores = logits[0] - np.log(np.exp(logits[0]).sum(-1, keepdims=True))
    labels = np.maximum(row["labels"], 0)
    np.testing.assert_allclose(
        scores[np.arange(6), labels], result["logps"][0], rtol=1e-4, atol=1e-5
    )
    plain = adapter.forward_only(inputs=[row], return_logits=True).result["logits"]
    np.testing.assert_allclose(np.asarray(plain), logits * 2, rtol=1e-4, atol=1e-5)


def test_37_the_loss_falls(adapter: MultiLoraTransformersModel) -> None:
    losses = []
    for _ in range(20):
        losses.append(adapter.forward_backward(inputs=BATCH).result["loss"])
        adapter.clip_grad_and_step()
    assert losses[-1] < 0.85 * losses[0]


def test_38_the_norm_is_a_number_as_text(adapter: MultiLoraTransformersModel) -> None:
    adapter.forward_backward(inputs=BATCH)
    assert float(adapter.clip_grad_norm(1e9).result) > 0
    for _ in range(2):
        adapter.forward_backward(inputs=BATCH, gradient_accumulation_steps=2)
    assert float(adapter.clip_grad_norm().result) > 0
    adapter.zero_grad()
    adapter.forward_backward(inputs=BATCH)
    assert adapter.clip_grad_norm().result == "None"


def test_39_the_parts_equal_the_whole(client: Any) -> None:
    fused, split = (fresh(MultiLoraTransformersModel(MODEL)) for _ in range(2))
    set_weights(split, fused)
    for one in (fused, split):
        one.set_loss("CrossEntropyLoss", reduction="mean")
        one.set_optimizer("AdamW", lr=1e-2)
        one.set_lr_scheduler("StepLR", step_size=1, gamma=0.5)
    for _ in range(3):
        whole = fused.forward_backward(inputs=BATCH).result
        fused.clip_grad_and_step()
        parts = split.forward(inputs=BATCH).result
        loss = split.calculate_loss().result
        split.backward()
        split.clip_grad_norm()
        split.step()
        split.zero_grad()
        split.lr_step()
        assert loss == whole["loss"]
        assert parts["logps"] == whole["logps"]
    assert state(fused) == state(split)
    rates = [one.calculate_metric().result["learning rate"] for one in (fused, split)]
    assert rates[0] == rates[1] == f"{1e-2 / 8:.6e}"


def test_39_parts_out_of_order(adapter: MultiLoraTransformersModel) -> None:
    assert "forward" in refused(400, adapter.calculate_loss)
    assert "calculate_loss" in refused(400, adapter.backward)
    adapter.forward(inputs=BATCH)
    assert "calculate_loss" in refused(400, adapter.backward)
    adapter.forward_only(inputs=BATCH)
    adapter.calculate_loss()
    assert "forward_only" in refused(400, adapter.backward)


def test_39_settings_and_a_waiting_batch_survive_a_restart(
    start_service: Any, tmp_path: Path
) -> None:
    settings = {"data_dir": tmp_path / "kept"}
    with start_service(**settings) as service:
        client = init_twinkle_client(base_url=service.url, api_key=KEY)
        before = fresh(MultiLoraTransformersModel(MODEL), gradient_accumulation_steps=2)
        before.set_loss("CrossEntropyLoss", reduction="mean")
        before.set_lr_scheduler("StepLR", step_size=1, gamma=0.5)
        one = before.forward_backward(inputs=BATCH).result["loss"]
        before.forward(inputs=BATCH)
        other = before.calculate_loss().result
        session = client._session_id
        client.close()
    with start_service(**settings) as service:
        client = init_twinkle_client(base_url=service.url, api_key=KEY)
        set_session_id(session)
        after = MultiLoraTransformersModel(MODEL)
        after.adapter_name = before.adapter_name
        weights = state(after)
        after.backward()
        after.clip_grad_and_step()
        told = after.calculate_metric().result
        assert told["loss"] == f"{(one + other) / 2:.4f}"
        assert told["learning rate"] == f"{5e-3:.6e}"
        assert "accumulation steps: 2" in after.get_train_configs().result
        assert state(after) != weights
        client.close()


def test_40_weights_change_every_second_step(model: MultiLoraTransformersModel) -> None:
    adapter = fresh(model, gradient_accumulation_steps=2)
    states = [state(adapter)]
    for _ in range(4):
        adapter.forward_backward(inputs=BATCH)
        adapter.clip_grad_and_step()
        states.append(state(adapter))
    changed = [one != other for one, other in pairwise(states)]
    assert changed == [False, True, False, True]


def test_40_accumulated_halves_equal_the_whole(client: Any) -> None:
    whole, halves = (fresh(MultiLoraTransformersModel(MODEL)) for _ in range(2))
    set_weights(halves, whole)
    whole.forward_backward(inputs=BATCH)
    first = whole.clip_grad_norm(1e9).result
    for one in BATCH:  # the default loss is a sum, normalised by tokens when it is clipped
        halves.forward_backward(inputs=[one], gradient_accumulation_steps=2)
    second = halves.clip_grad_norm(1e9).result
    assert float(first) == pytest.approx(float(second), rel=1e-5)


def test_41_the_schedule_moves_the_learning_rate(adapter: MultiLoraTransformersModel) -> None:
    adapter.set_lr_scheduler("LinearLR", start_factor=1.0, end_factor=0.5, total_iters=5)
    rates = []
    for _ in range(3):
        adapter.forward_backward(inputs=BATCH)
        adapter.clip_grad_and_step()
        rates.append(float(adapter.calculate_metric().result["learning rate"]))
    assert rates == pytest.approx([9e-3, 8e-3, 7e-3])
    adapter.set_lr_scheduler("CosineWarmupScheduler", num_warmup_steps=4, num_training_steps=8)
    assert float(adapter.calculate_metric().result["learning rate"]) == 0


def test_42_training_and_evaluation_apart(adapter: MultiLoraTransformersModel) -> None:
    adapter.set_loss("CrossEntropyLoss", reduction="mean")
    loss = adapter.forward_backward(inputs=BATCH).result["loss"]
    norm = adapter.clip_grad_norm().result
    adapter.forward_only(inputs=[BATCH[0]])
    other = adapter.calculate_loss().result
    evaluated = adapter.calculate_metric(is_training=False).result
    trained = adapter.calculate_metric(is_training=True).result
    assert trained["loss"] == f"{loss:.4f}"
    assert evaluated["loss"] == f"{other:.4f}"
    assert float(trained["grad_norm"]) == pytest.approx(float(norm), abs=1e-6)
    assert (trained["total_tokens"], evaluated["total_tokens"]) == (9, 5)
    assert trained["iters"] == 0
    assert set(trained) >= {"learning rate", "total time elapse", "speed", "accuracy"}
    assert "total_tokens" not in adapter.calculate_metric(is_training=True).result


def test_48_inputs_that_are_too_long(adapter: MultiLoraTransformersModel) -> None:
    long = feature(*([5] * 100_000))
    assert "context" in refused(400, adapter.forward_backward, [long])
    assert isinstance(adapter.forward_backward(inputs=BATCH).result["loss"], float)


@pytest.mark.parametrize("empty", [[], [{"input_ids": [], "labels": []}], "text", [[1, 2]]])
def test_49_nothing_to_train_on(adapter: MultiLoraTransformersModel, empty: Any) -> None:
    assert "inputs" in refused(400, adapter.forward_backward, empty)
    assert isinstance(adapter.forward_backward(inputs=BATCH).result["loss"], float)


def test_49_a_loss_without_labels(adapter: MultiLoraTransformersModel) -> None:
    assert "labels" in refused(400, adapter.forward_backward, [{"input_ids": [4, 5, 6]}])


def diverge(adapter: MultiLoraTransformersModel) -> None:
    for _ in range(9):
        adapter.forward_backward(inputs=BATCH)
        adapter.clip_grad_and_step(max_grad_norm="inf")


def test_50_answers_are_json_whatever_the_loss(adapter: MultiLoraTransformersModel) -> None:
    adapter.set_optimizer("SGD", lr=1e15)
    with pytest.raises(requests.HTTPError, match="nothing was added"):
        diverge(adapter)

    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    def answer(operation: str, **more: Any) -> requests.Response:
        body = {"adapter_name": adapter.adapter_name, **more}
        url = f"{adapter.server_url}/{operation}"
        found = requests.post(url, json=body, headers=headers(), timeout=60)
        json.loads(found.text, parse_constant=no_constant)
        return found

    scored = answer("forward_only", inputs=BATCH)
    assert scored.status_code == 400
    assert "diverge" in scored.json()["detail"]
    assert answer("get_state_dict").status_code == 200
    assert answer("calculate_metric", is_training=True).status_code == 200


def headers() -> dict[str, str]:
    return _build_headers()


def test_51_tenants_do_not_touch_each_others_weights(service: Any) -> None:
    def as_tenant(key: str, session: str) -> None:
        set_api_key(key)
        set_session_id(session)

    ours = init_twinkle_client(base_url=service.url, api_key=KEY)
    mine = fresh(MultiLoraTransformersModel(MODEL))
    alone = fresh(MultiLoraTransformersModel(MODEL))
    set_weights(alone, mine)
    theirs = init_twinkle_client(base_url=service.url, api_key=OTHER_KEY)
    other = fresh(MultiLoraTransformersModel(MODEL))
    for _ in range(3):
        as_tenant(KEY, ours._session_id)
        mine.forward_backward(inputs=BATCH)
        as_tenant(OTHER_KEY, theirs._session_id)
        other.forward_backward(inputs=[BATCH[1]])
        other.clip_grad_and_step(max_grad_norm=5.0)
        as_tenant(KEY, ours._session_id)
        mine.clip_grad_and_step()
    for _ in range(3):
        alone.forward_backward(inputs=BATCH)
        alone.clip_grad_and_step()
    same(state(mine), state(alone))
    ours.close()
    theirs.close()
