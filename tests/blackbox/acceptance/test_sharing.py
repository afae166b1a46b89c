"""Publishing, copies, access by token, and adapters for other programs: items 56 to 59 and 91."""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import peft
import pyrage  # pyright: ignore[reportMissingTypeStubs]
import pytest
import tinker
import torch
import transformers
from click.testing import CliRunner
from tinker import types
from tinker.cli.__main__ import main_cli  # pyright: ignore[reportMissingTypeStubs]

from tests.blackbox.conftest import KEY, OTHER_KEY
from tests.blackbox.data import batch, logprobs, train_one_step
from tests.blackbox.saved import arrays, folder_of, identical, weights_of
from tests.blackbox.states import HOUR, a_run, drawn, known, load
from tests.blackbox.wire import Wire
from twinkle_dask import LocalService

pytestmark = pytest.mark.timeout(60)

PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors"}

_age: Any = pyrage
_cli: Any = main_cli
_hf: Any = transformers
_peft_model: Any = peft.PeftModel


@pytest.fixture
def run(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return a_run(client)


@pytest.fixture
def rest(service: LocalService) -> tinker.RestClient:
    return tinker.RestClient(base_url=service.url, api_key=KEY)


@pytest.fixture
def other_rest(service: LocalService) -> tinker.RestClient:
    return tinker.RestClient(base_url=service.url, api_key=OTHER_KEY)


def fetch(urls: Mapping[str, str], folder: Path) -> Path:
    """Download files as a program that has no key."""
    folder.mkdir()
    for name, url in urls.items():
        answer = httpx.get(url)
        assert answer.status_code == 200
        assert int(answer.headers["content-length"]) == len(answer.content)
        (folder / name).write_bytes(answer.content)
    return folder


# ---- publishing


def test_56_what_is_published_can_be_read_by_all(
    run: tinker.TrainingClient,
    rest: tinker.RestClient,
    other_client: tinker.ServiceClient,
    other_rest: tinker.RestClient,
    service: LocalService,
) -> None:
    state = run.save_state("ck").result().path
    weights = run.save_weights_for_sampler("s").result().path
    for path in (state, weights, state):  # once more changes nothing
        rest.publish_checkpoint_from_tinker_path(path).result()
    assert known(rest, run.model_id)["weights/ck"].public
    saved = weights_of(service, run, "same")

    resumed = other_client.create_training_client_from_state_with_optimizer(state).result()
    assert identical(weights_of(service, resumed, "x"), saved)
    own = other_client.create_lora_training_client(
        run.get_info().model_data.model_name or "", rank=4, train_unembed=False
    ).result()
    load(own, state)
    assert identical(weights_of(service, own, "x"), saved)
    sampler = other_client.create_sampling_client(model_path=weights).result()
    expected = drawn(sampler)
    assert other_rest.get_weights_info_by_tinker_path(state).result().lora_rank == 4
    found = other_rest.get_training_run_by_tinker_path(state, "accessible").result()
    assert found.training_run_id == run.model_id
    # Only what is public is shown, and nothing of it is theirs to change.
    assert known(other_rest, run.model_id).keys() == {"weights/ck", "sampler_weights/s"}
    assert other_rest.list_user_checkpoints(limit=1).result().checkpoints[0].tinker_path != state
    attempts: list[Callable[[], object]] = [
        lambda: other_rest.delete_checkpoint_from_tinker_path(state).result(),
        lambda: other_rest.set_checkpoint_ttl_from_tinker_path(state, HOUR).result(),
        lambda: other_rest.publish_checkpoint_from_tinker_path(state).result(),
        lambda: other_rest.unpublish_checkpoint_from_tinker_path(state).result(),
    ]
    for attempt in attempts:
        with pytest.raises(tinker.PermissionDeniedError):
            attempt()

    for path in (state, weights, state):
        rest.unpublish_checkpoint_from_tinker_path(path).result()
    for attempt in (
        *attempts,
        lambda: other_client.create_training_client_from_state(state).result(),
        lambda: other_client.create_sampling_client(model_path=weights).result(),
        lambda: other_rest.get_weights_info_by_tinker_path(state).result(),
        lambda: other_rest.list_checkpoints(run.model_id).result(),
        lambda: other_rest.get_training_run_by_tinker_path(state, "accessible").result(),
    ):
        with pytest.raises(tinker.NotFoundError):
            attempt()
    assert drawn(sampler) == expected  # what was made of it stays


def test_56_publishing_again_is_no_conflict(run: tinker.TrainingClient, wire: Wire) -> None:
    run.save_state("ck").result()
    path = f"training_runs/{run.model_id}/checkpoints/weights/ck/publish"
    for method in ("POST", "POST", "DELETE", "DELETE"):
        answer = wire.request(method, path)
        assert (answer.status_code, answer.content) == (204, b"")


# ---- access by token


def test_50_weights_of_another_account_by_its_key(
    run: tinker.TrainingClient, other_client: tinker.ServiceClient, service: LocalService
) -> None:
    path = run.save_state("ck").result().path
    with pytest.raises(tinker.NotFoundError):
        other_client.create_training_client_from_state(path).result()
    with pytest.raises(tinker.BadRequestError, match="weights_access_token"):
        other_client.create_training_client_from_state(
            path, weights_access_token="tml-nobody-has-this-key"
        ).result()
    resumed = other_client.create_training_client_from_state(
        path, weights_access_token=KEY
    ).result()
    assert identical(weights_of(service, resumed, "x"), weights_of(service, run, "x"))


# ---- copies


def test_58_a_copy_shares_the_files_of_its_source(
    client: tinker.ServiceClient,
    run: tinker.TrainingClient,
    rest: tinker.RestClient,
    wire: Wire,
    service: LocalService,
) -> None:
    source = run.save_state("ck", user_metadata={"step": "7"}).result().path
    folder = folder_of(service, source)
    copy = rest.copy_weights(source, "archive", ttl_seconds=HOUR).result()
    assert copy != source
    assert copy.endswith("/weights/ck")
    holder = types.ParsedCheckpointTinkerPath.from_tinker_path(copy).training_run_id
    (held,) = known(rest, holder).values()
    assert held.user_metadata == {"step": "7"}
    assert held.expires_at is not None
    assert rest.get_training_run(holder).result().user_metadata == {"renderer_name": "plain"}
    assert holder in {
        one.training_run_id
        for one in rest.list_training_runs(project_id="archive", limit=50).result().training_runs
    }
    step = wire.post("optim_step", {"model_id": holder, "seq_id": 1, "adam_params": {}})
    assert step.status_code == 400
    assert "copied checkpoint" in step.json()["detail"]

    rest.delete_checkpoint_from_tinker_path(source).result()
    resumed = client.create_training_client_from_state_with_optimizer(copy).result()
    assert identical(weights_of(service, resumed, "x"), weights_of(service, run, "x"))
    assert folder.exists()
    rest.delete_checkpoint_from_tinker_path(copy).result()
    assert not folder.exists()


def test_58_a_repeated_copy_is_the_first_one(
    client: tinker.ServiceClient, run: tinker.TrainingClient, service: LocalService
) -> None:
    source = run.save_weights_for_sampler("s").result().path
    other = run.save_state("s").result().path
    url = f"{service.url}/api/v1/copy_weights"

    def copy(key: str, **body: Any) -> httpx.Response:
        headers = {"x-api-key": KEY, "x-idempotency-key": key}
        return httpx.post(url, json={"source_path": source, **body}, headers=headers)

    project = {"destination_project_id": "p"}
    first = copy("one", **project).json()["tinker_path"]
    assert first.endswith("/sampler_weights/s")
    assert copy("one", **project).json()["tinker_path"] == first
    assert copy("two", **project).json()["tinker_path"] != first
    assert copy("one", **project, source_path=other).status_code == 400

    session = client.holder.get_session_id()
    place = {"session_id": session, "model_seq_id": 40}
    into = copy("three", **place)
    assert into.json()["tinker_path"] == f"tinker://{session}:train:40/sampler_weights/s"
    assert copy("four", **place).json() == into.json()
    taken = copy("five", session_id=session, model_seq_id=0)
    assert taken.status_code == 400
    for body in ({}, {**place, **project}, {"session_id": session}, {**project, "ttl_seconds": 1}):
        assert copy("six", **body).status_code == 400, body


def test_58_copies_of_what_others_may_read(
    run: tinker.TrainingClient, rest: tinker.RestClient, other_rest: tinker.RestClient
) -> None:
    path = run.save_state("ck").result().path
    with pytest.raises(tinker.NotFoundError):
        other_rest.copy_weights(path, "p").result()
    by_token = other_rest.copy_weights(path, "p", weights_access_token=KEY).result()
    rest.publish_checkpoint_from_tinker_path(path).result()
    public = other_rest.copy_weights(path, "p").result()
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    for copy in (by_token, public):
        assert other_rest.get_weights_info_by_tinker_path(copy).result().lora_rank == 4
        assert not other_rest.list_checkpoints(copy.split("/")[2]).result().checkpoints[0].public
        with pytest.raises(tinker.NotFoundError):
            rest.get_weights_info_by_tinker_path(copy).result()


# ---- exports


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_57_external_weights_are_what_peft_loads(
    run: tinker.TrainingClient, rest: tinker.RestClient, model_folder: Path, tmp_path: Path
) -> None:
    path = run.save_weights_external("e1", ttl_seconds=HOUR).result().path
    assert path == f"tinker://{run.model_id}/external_weights/e1"
    listed = known(rest, run.model_id)["external_weights/e1"]
    assert listed.checkpoint_type == "external"
    answer = rest.get_external_weights_urls(path).result()
    assert answer.urls.keys() == PEFT_FILES
    assert answer.expires > datetime.now(UTC) + timedelta(minutes=10)
    folder = fetch(answer.urls, tmp_path / "adapter")
    assert listed.size_bytes == sum(file.stat().st_size for file in folder.iterdir())

    data = batch()
    plain = _hf.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    adapted = _peft_model.from_pretrained(plain, str(folder)).eval()
    for datum, expected in zip(
        data, logprobs(run.forward(data, "cross_entropy").result()), strict=True
    ):
        targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].tolist())
        with torch.no_grad():
            logits = adapted(torch.tensor([datum.model_input.to_ints()])).logits[0]
        scores = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
        np.testing.assert_allclose(scores.numpy(), expected, atol=2e-4)


def test_57_files_for_recipients_alone(
    run: tinker.TrainingClient, rest: tinker.RestClient, service: LocalService, tmp_path: Path
) -> None:
    own, other = _age.x25519.Identity.generate(), _age.x25519.Identity.generate()
    keys = [str(identity.to_public()) for identity in (own, other)]
    path = run.save_weights_external("e", age_encryption_recipients=keys).result().path
    urls = rest.get_external_weights_urls(path).result().urls
    assert urls.keys() == {f"{name}.age" for name in PEFT_FILES}
    folder = fetch(urls, tmp_path / "encrypted")
    for identity in (own, other):
        content = _age.decrypt((folder / "adapter_model.safetensors.age").read_bytes(), [identity])
        (tmp_path / "plain").write_bytes(content)
        assert identical(arrays(tmp_path / "plain"), weights_of(service, run, f"x{id(identity)}"))
    stranger = _age.x25519.Identity.generate()
    with pytest.raises(_age.DecryptError):
        _age.decrypt((folder / "adapter_config.json.age").read_bytes(), [stranger])


def test_57_what_is_no_recipient_is_refused_at_once(run: tinker.TrainingClient) -> None:
    for key in ("age1nonsense", "", "ssh-ed25519 AAAA"):
        with pytest.raises(tinker.BadRequestError, match="Recipient 0"):
            run.save_weights_external("e", age_encryption_recipients=[key]).result()
    assert train_one_step(run, batch()) > 0


def test_57_a_name_is_taken_once(client: tinker.ServiceClient, run: tinker.TrainingClient) -> None:
    path = run.save_weights_external("e").result().path
    with pytest.raises(tinker.BadRequestError, match=r"'e'.* exists already"):
        run.save_weights_external("e").result()
    for attempt in (client.create_training_client_from_state, client.create_sampling_client):
        with pytest.raises(tinker.BadRequestError, match="exported for other programs"):
            attempt(path).result()


def test_57_an_address_opens_its_own_file_and_nothing_else(
    run: tinker.TrainingClient,
    rest: tinker.RestClient,
    other_rest: tinker.RestClient,
    wire: Wire,
) -> None:
    path = run.save_weights_external("e").result().path
    urls = rest.get_external_weights_urls(path).result().urls
    url = urls["adapter_config.json"]
    whole = httpx.get(url).content
    for byte_range, expected in (
        ("bytes=0-9", whole[:10]),
        ("bytes=10-", whole[10:]),
        ("bytes=-7", whole[-7:]),
        (f"bytes=5-{10**9}", whole[5:]),
    ):
        part = httpx.get(url, headers={"range": byte_range})
        assert (part.status_code, part.content) == (206, expected)
        assert part.headers["content-range"].endswith(f"/{len(whole)}")
    beyond = httpx.get(url, headers={"range": f"bytes={len(whole)}-"})
    assert beyond.status_code == 416
    base, _, query = url.partition("?")
    root = base.removesuffix("adapter_config.json")
    for forged in (
        base,
        f"{root}adapter_model.safetensors?{query}",
        f"{root}state.json?{query}",
        f"{root}../state.json?{query}",
        f"{root}archive.tar?{query}",
        url.replace("expires=", "expires=9"),
        url[:-1] + ("A" if url[-1] != "A" else "B"),
    ):
        assert httpx.get(forged).status_code in {403, 404}, forged

    with pytest.raises(tinker.NotFoundError):
        other_rest.get_external_weights_urls(path).result()
    state = run.save_state("ck").result().path.removeprefix("tinker://")
    refused = wire.get(
        f"training_runs/{state.replace('/', '/checkpoints/', 1)}/external_weights_urls"
    )
    assert refused.status_code == 400
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert httpx.get(url).status_code == 404


def test_91_an_older_client_is_sent_to_an_archive(
    run: tinker.TrainingClient, wire: Wire, service: LocalService
) -> None:
    paths = {
        "weights/ck": run.save_state("ck").result().path,
        "sampler_weights/s": run.save_weights_for_sampler("s").result().path,
        "external_weights/e": run.save_weights_external("e").result().path,
    }
    saved = weights_of(service, run, "same")
    for address in paths:
        answer = wire.get(f"training_runs/{run.model_id}/checkpoints/{address}/archive")
        assert answer.status_code == 302
        assert parsedate_to_datetime(answer.headers["expires"]) > datetime.now(UTC)
        archive = httpx.get(answer.headers["location"])
        assert int(archive.headers["content-length"]) == len(archive.content)
        with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
            assert set(tar.getnames()) == PEFT_FILES
            member = tar.extractfile("adapter_model.safetensors")
            assert member is not None
            content = member.read()
        assert (
            content
            == (
                folder_of(service, f"tinker://{run.model_id}/weights/same")
                / "adapter_model.safetensors"
            ).read_bytes()
        )
    assert saved
    missing = wire.get(f"training_runs/{run.model_id}/checkpoints/weights/none/archive")
    assert missing.status_code == 404


# ---- the command line


def test_59_the_command_line_downloads_a_training_checkpoint(
    run: tinker.TrainingClient, service: LocalService, tmp_path: Path
) -> None:
    path = run.save_state("ck").result().path
    command = [sys.executable, "-m", "tinker.cli", "checkpoint", "download", path]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)],
        env={**os.environ, "TINKER_BASE_URL": service.url, "TINKER_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("adapter_model.safetensors")
    assert (file.parent / "adapter_config.json").exists()
    assert identical(arrays(file), arrays(folder_of(service, path) / file.name))


def test_59_the_command_line_manages_checkpoints(
    run: tinker.TrainingClient,
    rest: tinker.RestClient,
    service: LocalService,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this process: to start the command takes seconds each time."""
    monkeypatch.setenv("TINKER_BASE_URL", service.url)
    monkeypatch.setenv("TINKER_API_KEY", KEY)

    def command(*arguments: str) -> str:
        done = CliRunner().invoke(_cli, arguments)
        assert done.exit_code == 0, done.output
        return done.output

    path = run.save_state("ck").result().path
    listed = json.loads(command("--format", "json", "checkpoint", "list", "--run-id", run.model_id))
    assert [one["tinker_path"] for one in listed["checkpoints"]] == [path]
    assert path in command("--format", "json", "checkpoint", "list", "--limit", "3")
    assert path in command("checkpoint", "info", path)
    command("checkpoint", "publish", path)
    assert known(rest, run.model_id)["weights/ck"].public
    command("checkpoint", "unpublish", path)
    command("checkpoint", "set-ttl", path, "--ttl", str(HOUR))
    (checkpoint,) = known(rest, run.model_id).values()
    assert not checkpoint.public
    assert checkpoint.expires_at is not None
    command("checkpoint", "delete", "--yes", path)
    assert known(rest, run.model_id) == {}
