"""Saving, loading, listing, deleting and uploading (acceptance checks 52 to 67)."""

import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from adapters import BATCH, logps, lora, step, trained
from peft import PeftModel
from transformers import AutoModelForCausalLM
from twinkle_client import init_twinkle_client
from twinkle_client.manager import TwinkleClient
from twinkle_client.model import MultiLoraTransformersModel

from tests.twinkle.conftest import KEY, MODEL, OTHER_KEY
from twinkle_dask.local import LocalService


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints may be written and uploaded to."""
    folder = tmp_path_factory.mktemp("targets")
    for name in ("saves", "uploads", "outside"):
        (folder / name).mkdir()
    (folder / "saves" / "link").symlink_to(folder / "outside")
    return folder


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Any], targets: Path) -> Generator[LocalService]:
    settings = {
        "save_roots": [str(targets / "saves")],
        "upload_roots": [str(targets / "uploads")],
    }
    with start_service(**settings) as running:
        yield running


@contextmanager
def tenant(service: LocalService, key: str) -> Generator[TwinkleClient]:
    client = init_twinkle_client(base_url=service.url, api_key=key)
    try:
        yield client
    finally:
        client.close()


def run_of(client: TwinkleClient, name: str = "main") -> str:
    return f"{client._session_id}-{name}"


def test_52_a_save_is_a_folder_that_peft_knows(model: MultiLoraTransformersModel) -> None:
    kept = trained(model).save("first")
    assert re.fullmatch(r"twinkle://[\w.-]+-main/weights/first", kept.twinkle_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(
        os.listdir(kept.checkpoint_dir)
    )


def test_53_names_become_usable(client: TwinkleClient, model: MultiLoraTransformersModel) -> None:
    trained(model)
    names = {
        given: model.save(given).twinkle_path.rpartition("/")[2]
        for given in ("ck 1/x", "a.b", "..", "../../etc")
    }
    assert names == {"ck 1/x": "ck_1_x", "a.b": "a_b", "..": "__", "../../etc": "______etc"}
    first, second = (model.save(None).twinkle_path.rpartition("/")[2] for _ in range(2))
    assert first != second
    assert re.fullmatch(r"\d{8}_\d{6}_\d+", first)
    # The same name takes the place of the former one.
    before = client.list_checkpoints(run_of(client))
    model.save("a.b")
    after = client.list_checkpoints(run_of(client))
    assert len(before) == len(after)
    assert after[-1].checkpoint_id == "weights/a_b"


def test_54_resuming_goes_on_as_if_nothing_had_happened(model: MultiLoraTransformersModel) -> None:
    trained(model, steps=3)
    kept = model.save("middle", save_optimizer=True, consumed_train_samples=6)
    rate = model.calculate_metric(is_training=True).result
    expected = step(model, 3)
    other = MultiLoraTransformersModel(MODEL)
    other.add_adapter_to_model("again", lora())
    other.set_loss("CrossEntropyLoss")
    other.set_optimizer("AdamW", lr=1e-2)
    other.set_lr_scheduler("LinearLR", start_factor=1.0, end_factor=0.1, total_iters=10)
    progress = other.resume_from_checkpoint(kept.twinkle_path)
    assert progress == {
        "cur_step": 3,
        "consumed_train_samples": 6,
        "gradient_accumulation_steps": 1,
    }
    assert step(other, 3) == pytest.approx(expected, rel=1e-5)
    assert "learning rate" in " ".join(rate)
    both = [one.calculate_metric(is_training=True).result for one in (model, other)]
    rates = [{key: now[key] for key in now if "learning rate" in key} for now in both]
    assert rates[0] == rates[1] != {}


def test_54_nothing_is_saved_between_intervals(model: MultiLoraTransformersModel) -> None:
    trained(model, steps=3)
    kept = model.save("every-second", interval=2)
    assert (kept.twinkle_path, kept.checkpoint_dir) == ("", None)
    step(model)
    assert model.save("every-second", interval=2).twinkle_path.endswith("/every-second")


def test_54_without_its_optimizer_nothing_resumes(model: MultiLoraTransformersModel) -> None:
    kept = trained(model).save("weights-only")
    with pytest.raises(requests.HTTPError, match="400") as caught:
        model.resume_from_checkpoint(kept.twinkle_path)
    assert "without its optimizer" in str(caught.value)
    model.load(kept.twinkle_path)
    step(model)


def test_55_weights_alone_and_the_counters(model: MultiLoraTransformersModel) -> None:
    kept = trained(model, steps=2).save("kept", consumed_train_samples=4)
    expected = logps(model)
    step(model, 2)
    assert not np.allclose(logps(model), expected, atol=1e-6)
    progress = model.resume_from_checkpoint(kept.twinkle_path, resume_only_model=True)
    assert (progress["cur_step"], progress["consumed_train_samples"]) == (2, 4)
    assert np.allclose(logps(model), expected, atol=1e-5)


@pytest.mark.parametrize("called", ["address", "tinker", "place", "name"])
def test_56_what_a_checkpoint_may_be_called(model: MultiLoraTransformersModel, called: str) -> None:
    kept = trained(model).save("here", save_optimizer=True)
    expected = logps(model)
    step(model)
    model.load(
        {
            "address": kept.twinkle_path,
            "tinker": kept.twinkle_path.replace("twinkle://", "tinker://"),
            "place": kept.checkpoint_dir,
            "name": "here",
        }[called]
    )
    assert np.allclose(logps(model), expected, atol=1e-5)


def test_56_another_runs_checkpoint_of_the_same_key_only(
    service: LocalService, model: MultiLoraTransformersModel
) -> None:
    kept = trained(model).save("mine", save_optimizer=True)
    expected = logps(model)
    with tenant(service, KEY):
        second = MultiLoraTransformersModel(MODEL)
        second.add_adapter_to_model("second", lora())
        second.load(kept.twinkle_path)
        assert np.allclose(logps(second), expected, atol=1e-5)
    with tenant(service, OTHER_KEY):
        theirs = trained(MultiLoraTransformersModel(MODEL), "theirs")
        before = logps(theirs)
        for name in (kept.twinkle_path, kept.checkpoint_dir):
            for load in (theirs.load, theirs.resume_from_checkpoint):
                with pytest.raises(requests.HTTPError, match="404"):
                    load(name)
        assert np.allclose(logps(theirs), before, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("/etc", 404),
        ("../../checkpoints", 404),
        ("hf://acme/adapter", 400),
        ("acme/adapter", 404),
        ("twinkle://a/b", 400),
        ("twinkle://../weights/x", 400),
        ("none", 404),
        ("", 404),
    ],
)
def test_56_nothing_else_is_opened(
    model: MultiLoraTransformersModel, name: str, status: int
) -> None:
    trained(model, steps=1)
    with pytest.raises(requests.HTTPError, match=str(status)) as caught:
        model.load(name)
    assert "Traceback" not in str(caught.value)


def test_57_of_weights_for_sampling_the_newest_are_kept(
    client: TwinkleClient, model: MultiLoraTransformersModel
) -> None:
    trained(model)
    model.save("stays")
    paths = [model.save("policy", is_sampler=True).twinkle_path for _ in range(3)]
    assert len(set(paths)) == 3
    found = client.list_checkpoints(run_of(client))
    kept = [one for one in found if one.checkpoint_type == "sampler"]
    assert [one.twinkle_path for one in kept] == [paths[-1]]
    assert "weights/stays" in [one.checkpoint_id for one in found]
    run = client.get_training_run(run_of(client))
    assert run.last_sampler_checkpoint["twinkle_path"] == paths[-1]


def test_58_lists_are_oldest_first(
    client: TwinkleClient, model: MultiLoraTransformersModel
) -> None:
    trained(model)
    for name in ("z", "m", "a"):
        model.save(name)
    found = client.list_checkpoints(run_of(client))
    assert [one.checkpoint_id for one in found] == ["weights/z", "weights/m", "weights/a"]
    assert all(one.size_bytes > 1000 for one in found)
    assert all(one.time.utcoffset() == timedelta(0) for one in found)
    assert {one.checkpoint_type for one in found} == {"training"}
    newest = client.get_latest_checkpoint_path(run_of(client))
    assert newest == client.get_checkpoint_path(run_of(client), "weights/a").path
    model.load(newest)


def test_59_what_is_deleted_is_gone(
    client: TwinkleClient, model: MultiLoraTransformersModel
) -> None:
    kept = trained(model).save("to-go")
    model.save("stays")
    assert client.delete_checkpoint(run_of(client), "weights/to-go").success is True
    for again in (
        lambda: client.delete_checkpoint(run_of(client), "weights/to-go"),
        lambda: client.get_checkpoint_path(run_of(client), "weights/to-go"),
        lambda: client.get_weights_info(kept.twinkle_path),
        lambda: model.load(kept.twinkle_path),
    ):
        with pytest.raises(requests.HTTPError, match="404"):
            again()
    assert not Path(kept.checkpoint_dir).exists()
    run = client.get_training_run(run_of(client))
    assert run.last_checkpoint["checkpoint_id"] == "weights/stays"


@pytest.mark.parametrize(
    "path", ["weights/..%2f..%2fx", "weights/~x", "%2e%2e/x", "weights/a%00b", "weights//x", "x"]
)
def test_60_no_way_out(client: TwinkleClient, service: LocalService, path: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for method, place in (
        ("GET", f"checkpoint_path/{run_of(client)}/{path}"),
        ("GET", f"checkpoint_path/..%2f..%2fx/{path}"),
        ("DELETE", f"training_runs/{run_of(client)}/checkpoints/{path}"),
    ):
        answer = requests.request(method, f"{service.url}/api/v1/twinkle/{place}", headers=headers)
        assert answer.status_code in {400, 404}, (place, answer.text)
        if ".." not in path and "%2e" not in path:
            assert answer.status_code == 400, (place, answer.text)


def test_61_weights_info_is_complete(
    client: TwinkleClient, model: MultiLoraTransformersModel
) -> None:
    kept = trained(model, rank=8).save("kept")
    info = client.get_weights_info(kept.twinkle_path)
    assert info.training_run_id == run_of(client)
    assert (info.base_model, info.is_lora, info.lora_rank) == (MODEL, True, 8)
    assert info.model_owner
    assert KEY not in info.model_owner
    assert client.get_training_run(run_of(client)).model_owner == info.model_owner


def test_62_pages_of_runs(client: TwinkleClient, model: MultiLoraTransformersModel) -> None:
    for name in ("one", "two", "three"):
        MultiLoraTransformersModel(MODEL).add_adapter_to_model(name, lora())
    runs, cursor = client.list_training_runs_with_cursor(limit=2, offset=0)
    assert [run.training_run_id for run in runs] == [
        run_of(client, "three"),
        run_of(client, "two"),
    ]
    assert (cursor.limit, cursor.offset) == (2, 0)
    following, same = client.list_training_runs_with_cursor(limit=2, offset=2)
    assert following[0].training_run_id == run_of(client, "one")
    assert same.total_count == cursor.total_count >= 3
    assert client.list_training_runs(limit=5, offset=cursor.total_count) == []
    for limit, offset in ((-1, 0), (0, 0), (1, -1)):
        with pytest.raises(requests.HTTPError, match="422"):
            client.list_training_runs(limit=limit, offset=offset)
    with pytest.raises(requests.HTTPError, match="403"):
        client.list_training_runs(all_users=True)


def test_63_others_see_nothing(
    service: LocalService, client: TwinkleClient, model: MultiLoraTransformersModel
) -> None:
    kept = trained(model).save("mine")
    mine = run_of(client)
    with tenant(service, OTHER_KEY) as other:
        assert mine not in [run.training_run_id for run in other.list_training_runs(limit=1000)]
        for ask in (
            lambda: other.get_training_run(mine),
            lambda: other.list_checkpoints(mine),
            lambda: other.get_checkpoint_path(mine, "weights/mine"),
            lambda: other.delete_checkpoint(mine, "weights/mine"),
            lambda: other.get_weights_info(kept.twinkle_path),
        ):
            with pytest.raises(requests.HTTPError, match="404"):
                ask()
    with tenant(service, KEY) as again:
        assert again.get_weights_info(kept.twinkle_path).training_run_id == mine


def test_64_a_run_tells_its_adapter(
    client: TwinkleClient, model: MultiLoraTransformersModel
) -> None:
    model.add_adapter_to_model("named", lora(8))
    run = client.get_training_run(run_of(client, "named"))
    assert run.user_metadata["adapter_name"] == "named"
    assert (run.lora_rank, run.is_lora, run.base_model) == (8, True, MODEL)
    assert run.last_request_time.utcoffset() == timedelta(0)
    assert client.find_training_run_by_model(MODEL)


def test_66_plain_peft_gives_the_same_logits(
    model: MultiLoraTransformersModel, model_folder: Path
) -> None:
    kept = trained(model, steps=4).save("for-peft")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, kept.checkpoint_dir).eval()
    ours = logps(model)
    for row, feature in zip(ours, BATCH, strict=True):
        tokens = torch.tensor([feature["input_ids"]])
        with torch.no_grad():
            scores = adapted(tokens).logits.log_softmax(-1)[0]
        theirs = [scores[at, token].item() for at, token in enumerate(feature["input_ids"][1:])]
        assert row[: len(theirs)] == pytest.approx(theirs, abs=1e-4)


def test_67_an_upload_ends_in_the_operators_folder(
    model: MultiLoraTransformersModel, targets: Path
) -> None:
    kept = trained(model).save("sent")
    model.upload_to_hub(kept.twinkle_path, "acme/adapter", poll_interval=0.05)
    (folder,) = (targets / "uploads").glob("*/acme/adapter")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    # A save's answer may be handed on as it is, and so may its folder.
    model.upload_to_hub(kept, "acme/second", poll_interval=0.05)
    model.upload_to_hub(kept.checkpoint_dir, "acme/third", poll_interval=0.05)


def test_67_an_upload_that_fails_says_why(model: MultiLoraTransformersModel) -> None:
    kept = trained(model, steps=1).save("sent")
    with pytest.raises(RuntimeError, match="hub") as caught:
        model.upload_to_hub(kept.twinkle_path, "acme/x", hub_token="hf_none", poll_interval=0.05)
    assert "hf_none" not in str(caught.value)


@pytest.mark.parametrize("token", ["hf_Ü", "hf_x\r\nCookie: y", "hf x"])
def test_67_a_token_that_is_none_is_refused_at_once(
    model: MultiLoraTransformersModel, token: str
) -> None:
    with pytest.raises(requests.HTTPError, match="400"):
        model.upload_to_hub("twinkle://nobody/weights/x", "acme/x", hub_token=token)


@pytest.mark.parametrize("source", ["/etc", "twinkle://nobody/weights/x"])
def test_67_nothing_else_is_uploaded(model: MultiLoraTransformersModel, source: str) -> None:
    with pytest.raises(requests.HTTPError, match="404"):
        model.upload_to_hub(source, "acme/adapter")
    headers = {"Authorization": f"Bearer {KEY}"}
    status = requests.get(f"{model.server_url}/upload_status/req_x", headers=headers)
    assert status.status_code == 404


def test_67_a_target_cannot_lead_out(model: MultiLoraTransformersModel) -> None:
    kept = trained(model, steps=1).save("sent")
    for name in ("../x", "/etc/x", "a/../b", "", "s3://bucket/x"):
        with pytest.raises(requests.HTTPError, match="400"):
            model.upload_to_hub(kept.twinkle_path, name)


def test_21_checkpoints_also_go_to_save_dir(
    client: TwinkleClient, model: MultiLoraTransformersModel, targets: Path
) -> None:
    saves = targets / "saves"
    model.add_adapter_to_model("main", lora(), save_dir=str(saves))
    kept = model.save("kept")
    folder = Path(kept.checkpoint_dir)
    assert folder.is_relative_to(saves.resolve())
    assert (folder / "adapter_config.json").is_file()
    assert client.get_training_run(run_of(client)).save_dir == str(saves.resolve())
    model.load(kept.checkpoint_dir)
    first = model.save("policy", is_sampler=True)
    second = model.save("policy", is_sampler=True)
    assert not Path(first.checkpoint_dir).exists()
    assert Path(second.checkpoint_dir).is_dir()
    for bad in (targets / "outside", saves / "link", saves / "none", "/etc"):
        with pytest.raises(requests.HTTPError, match="400"):
            MultiLoraTransformersModel(MODEL).add_adapter_to_model(
                "other", lora(), save_dir=str(bad)
            )
