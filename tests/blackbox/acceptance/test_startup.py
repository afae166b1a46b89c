"""How a client begins, keeps and ends a session: items 1, 2 and 7 to 13."""

import contextlib
import json
import logging
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import pytest
import tinker
from tinker import types

from tests.blackbox.conftest import ALIAS, KEY, MODEL
from tests.blackbox.data import batch, train_one_step
from tests.blackbox.proxy import Answer, Proxy, proxy
from tests.blackbox.wire import Wire
from twinkle_dask import LocalService, local_service

STEP: dict[str, Any] = {"adam_params": {"learning_rate": 1e-3}}


@pytest.fixture
def between(service: LocalService) -> Generator[Proxy]:
    with proxy(service.url) as running:
        yield running


def work(url: str, key: str = KEY) -> None:
    """A step and a sample."""
    with tinker.ServiceClient(base_url=url, api_key=key) as client:
        run = client.create_lora_training_client(MODEL, rank=4).result()
        assert train_one_step(run, batch()) > 0
        sampler = client.create_sampling_client(base_model=MODEL).result()
        prompt = types.ModelInput.from_ints([20, 21])
        response = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1)).result()
        assert len(response.sequences) == 1


def test_01_a_client_works_with_its_own_defaults(between: Proxy) -> None:
    between.answers["client/config"] = Answer(200, {})
    work(between.url)
    assert between.paths()[0] == "client/config"
    # Without flags it keeps to its key.
    assert "auth/token" not in between.paths()
    assert {one.key for one in between.heard} == {KEY}


def test_01_a_client_is_told_what_is_switched_on(wire: Wire) -> None:
    config = wire.post("client/config", {"sdk_version": "0.38.0"}).json()
    assert config["pjwt_auth_enabled"] is True
    assert config["parallel_fwdbwd_chunks"] is True


def test_02_dynamic_config_is_served(wire: Wire) -> None:
    dynamic = wire.post("client/dynamic_config", {"sdk_version": "0.38.0"})
    assert dynamic.status_code == 200
    assert dynamic.json()["refresh_interval_sec"] >= 10


def test_02_dynamic_config_may_be_absent(between: Proxy) -> None:
    between.answers["client/dynamic_config"] = Answer(404, {"detail": "no"})
    work(between.url)
    assert [one.status for one in between.heard if one.path == "client/dynamic_config"] == [404]


def test_07_a_heartbeat_comes_and_is_taken(between: Proxy) -> None:
    """Once, after the ten seconds that the SDK waits before its first one."""
    with tinker.ServiceClient(base_url=between.url, api_key=KEY) as client:
        session = client.holder.get_session_id()
        (beat,) = between.wait_for("session_heartbeat", timeout_s=40)
    assert beat.status == 200
    assert beat.json()["session_id"] == session


def test_08_a_closed_session_takes_neither_beats_nor_work(
    service: LocalService, wire: Wire
) -> None:
    client = tinker.ServiceClient(base_url=service.url, api_key=KEY)
    run = client.create_lora_training_client(MODEL, rank=4).result()
    session = client.holder.get_session_id()
    beat = {"session_id": session, "type": "session_heartbeat"}
    assert wire.post("session_heartbeat", beat).json() == {"type": "session_heartbeat"}
    client.close("success", detail="done").result()
    assert wire.post("session_heartbeat", beat).status_code == 410
    # The first ending stands, and a second is no mistake.
    finish = {"reason": {"type": "errored"}, "detail": None}
    assert wire.post(f"sessions/{session}/finish", finish).status_code == 200
    attempts: tuple[tuple[str, dict[str, Any]], ...] = (
        ("optim_step", {"model_id": run.model_id, "seq_id": 1, **STEP}),
        (
            "create_model",
            {"session_id": session, "model_seq_id": 5, "base_model": MODEL, "lora_config": {}},
        ),
        (
            "create_sampling_session",
            {"session_id": session, "sampling_session_seq_id": 5, "base_model": MODEL},
        ),
    )
    for path, body in attempts:
        answer = wire.post(path, body)
        assert answer.status_code == 400
        assert session in answer.json()["detail"]
    assert reasons(service, session) == ["success"]


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [(None, "success"), (ValueError, "errored"), (Interrupted, "interrupted")],
)
def test_09_a_session_ends_as_its_block_did(
    service: LocalService, error: type[BaseException] | None, reason: str
) -> None:
    session = ""
    with (
        contextlib.suppress(ValueError, Interrupted),
        tinker.ServiceClient(base_url=service.url, api_key=KEY) as client,
    ):
        session = client.holder.get_session_id()
        if error is not None:
            raise error
    assert reasons(service, session) == [reason]


def test_10_telemetry_is_accepted_and_healthz_is_open(wire: Wire) -> None:
    telemetry = {"events": [{"event": "SESSION_START"}], "session_id": "s", "platform": "Linux"}
    assert wire.post("telemetry", telemetry).json() == {"status": "accepted"}
    assert wire.get("healthz").json() == {"status": "ok"}


def test_10_a_mistake_shows_at_once(client: tinker.ServiceClient) -> None:
    """The SDK drains its telemetry before it raises; a bad answer there would cost 30 s."""
    run = client.create_lora_training_client(MODEL, rank=4).result()
    assert run.get_telemetry() is not None
    began = time.monotonic()
    with pytest.raises(tinker.BadRequestError):
        run.forward_backward(batch(), cast(Any, "none")).result()
    with pytest.raises(tinker.NotFoundError):
        client.create_sampling_client(model_path=f"tinker://{run.model_id}/weights/no").result()
    assert time.monotonic() - began < 10


def test_11_a_base_url_may_end_with_a_slash(service: LocalService) -> None:
    work(f"{service.url}/")


@pytest.mark.timeout(120)
def test_11_12_13_a_prefix_notices_and_a_model_of_ones_own(
    model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notices = {"info": "Hello.", "warning": "Restart at noon.", "error": "Disk failing."}
    with local_service(
        {MODEL: str(model_folder)}, url_prefix="/a/b", notices=notices, tokens={"lifetime_s": 120}
    ) as service:
        assert service.url.endswith("/a/b")
        with caplog.at_level(logging.INFO, logger="tinker"):
            work(f"{service.url}/", service.api_key)
        told = {record.message: record.levelno for record in caplog.records}
        assert told["Hello."] == logging.INFO
        assert told["Restart at noon."] == logging.WARNING
        assert told["Disk failing."] == logging.ERROR
        rest = tinker.RestClient(base_url=service.url, api_key=service.api_key)
        (session,) = rest.list_sessions().result().sessions
        assert rest.export_session_trace(session).result().startswith(f"{service.url}/api/v1/")


def test_12_without_a_notice_nothing_is_logged(
    service: LocalService, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING, logger="tinker"),
        tinker.ServiceClient(base_url=service.url, api_key=KEY) as client,
    ):
        assert client.holder.get_session_id()
    assert caplog.messages == []


def test_13_capabilities_list_every_model(service: LocalService) -> None:
    rest = tinker.RestClient(base_url=service.url, api_key=KEY)
    models = rest.get_server_capabilities().result().supported_models
    assert {model.model_name: model.max_context_length for model in models} == {
        MODEL: 2048,
        ALIAS: 2048,
    }


def test_15_an_alias_has_a_tokenizer_without_the_network(
    client: tinker.ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words: list[list[int]] = []
    for name in (MODEL, ALIAS):
        run = client.create_lora_training_client(name, rank=4).result()
        assert run.get_info().model_data.model_name == name
        tokenizer: Any = run.get_tokenizer()
        words.append(tokenizer.encode("hello world"))
    assert words[0] == words[1] != []


def reasons(service: LocalService, session: str) -> list[str]:
    log = (service.data_dir / "server.log").read_text().splitlines()
    lines = [json.loads(line) for line in log if line.startswith("{")]
    return [
        line["reason"]
        for line in lines
        if line["event"] == "session_ended" and line["session"] == session
    ]
