"""Sessions, health, capacity and who may ask (acceptance checks 1 to 15)."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
import requests
from adapters import feature, lora
from peft import LoraConfig
from twinkle_client import init_twinkle_client
from twinkle_client.http import http_post, set_session_id
from twinkle_client.manager import TwinkleClient
from twinkle_client.model import MultiLoraTransformersModel

from tests.twinkle.conftest import KEY, MODEL, OTHER_KEY
from twinkle_dask.local import LocalService

BEARER = {"Authorization": f"Bearer {KEY}"}


@contextmanager
def connected(url: str, key: str | None = KEY, **more: Any) -> Generator[TwinkleClient]:
    client = init_twinkle_client(base_url=url, api_key=key, **more)
    try:
        yield client
    finally:
        client.close()


def test_01_a_client_has_a_session(client: TwinkleClient) -> None:
    assert client._session_id


@pytest.mark.parametrize("end", ["", "/", "/api/v1", "/api/v1/"])
def test_02_the_address_may_end_as_it_likes(service: LocalService, end: str) -> None:
    with connected(service.url + end) as client:
        assert client.health_check()


def test_03_address_and_key_from_the_environment(service: LocalService) -> None:
    """In a process of its own, since the client reads them when it is imported."""
    script = (
        "from twinkle_client.manager import TwinkleClient\n"
        "client = TwinkleClient()\n"
        "assert client.health_check()\n"
        "print(client.get_server_capabilities().supported_models[0].model_name)\n"
        "client.close()\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TWINKLE_SERVER_URL": service.url, "TWINKLE_SERVER_TOKEN": KEY},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.split() == [MODEL]


def test_04_health(service: LocalService, client: TwinkleClient) -> None:
    assert client.health_check() is True
    client.base_url = "http://127.0.0.1:9/api/v1"
    assert client.health_check() is False
    # Watchdogs have no key for the first, and a key for the second.
    assert requests.get(f"{service.url}/api/v1/twinkle/healthz").json() == {"status": "ok"}
    deep = requests.get(f"{service.url}/api/v1/twinkle/healthz/deep", headers=BEARER)
    assert deep.status_code == 200
    assert deep.json() == {
        "healthy": True,
        "models": {MODEL: {"healthy": True, "status_code": 200}},
    }


def test_05_capabilities_are_the_configured_models(client: TwinkleClient) -> None:
    found = client.get_server_capabilities()
    assert [model.model_name for model in found.supported_models] == [MODEL]


def test_06_heartbeats_carry_the_session(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a proxy that writes down what passes."""
    passed: list[tuple[str, dict[str, str], bytes]] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            passed.append((self.path, dict(self.headers), body))
            answer = requests.post(service.url + self.path, body, headers=dict(self.headers))
            self.send_response(answer.status_code)
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with connected(url, session_heartbeat_interval=0.2) as client:
            session = client._session_id
            deadline = time.monotonic() + 20
            while len(passed) < 4 and time.monotonic() < deadline:
                time.sleep(0.05)
    finally:
        server.shutdown()
        server.server_close()
    beats = [one for one in passed if one[0].endswith("/session_heartbeat")]
    assert len(beats) >= 3
    for _, headers, body in beats:
        assert session.encode() in body
        assert headers["X-Twinkle-Session-Id"] == session
    # What was opened there is a session like any other: see the second part of test 9.
    assert passed[0][0] == "/api/v1/twinkle/create_session"


def test_07_a_heartbeat_for_no_session(client: TwinkleClient) -> None:
    with pytest.raises(requests.HTTPError, match="404") as caught:
        http_post(client._get_url("/session_heartbeat"), json_data={"session_id": "session_none"})
    assert "no session" in str(caught.value)
    answer = http_post(
        client._get_url("/session_heartbeat"), json_data={"session_id": client._session_id}
    )
    assert answer.json() == {}


def test_07_a_session_of_another_key_is_not_there(service: LocalService) -> None:
    with connected(service.url, OTHER_KEY) as other:
        theirs = other._session_id
    with connected(service.url) as client, pytest.raises(requests.HTTPError, match="404"):
        http_post(client._get_url("/session_heartbeat"), json_data={"session_id": theirs})


def test_08_capacity_adds_up_and_changes(
    client: TwinkleClient, model: MultiLoraTransformersModel
) -> None:
    before = client.get_capacity_info()
    assert before.max_loras == before.used_loras + before.free_loras
    model.add_adapter_to_model("one", lora())
    after = client.get_capacity_info()
    assert after.used_loras == before.used_loras + 1
    assert after.free_loras == before.free_loras - 1
    assert after.max_loras == before.max_loras


def test_09_two_clients_have_two_sessions(service: LocalService) -> None:
    with connected(service.url) as first, connected(service.url) as second:
        assert first._session_id != second._session_id


def test_09_metadata_of_a_session_is_kept(service: LocalService) -> None:
    with connected(service.url, session_metadata={"team": "blue"}) as client:
        url = f"{service.url}/api/v1/sessions/search"
        found = requests.post(url, json={"session_id": client._session_id}, headers=BEARER)
        if found.status_code == 404:
            pytest.fail(found.text)
        (one,) = found.json()["sessions"]
        assert one["user_metadata"] == {"team": "blue"}


def test_10_without_a_key_nothing_is_told(service: LocalService) -> None:
    url = f"{service.url}/api/v1/twinkle/get_server_capabilities"
    for headers in ({}, {"Authorization": "Bearer wrong-key-that-is"}, {"Authorization": KEY[:-1]}):
        answer = requests.get(url, headers=headers)
        assert answer.status_code == 401
        assert "key" in answer.json()["detail"]
    # Twinkle's own header wins, since proxies use the other one for themselves.
    both = {"Authorization": "Basic x", "Twinkle-Authorization": f"Bearer {KEY}"}
    assert requests.get(url, headers=both).status_code == 200
    with pytest.raises(requests.HTTPError, match="401"):
        init_twinkle_client(base_url=service.url, api_key="wrong-key-that-is")


def test_11_an_unknown_model(client: TwinkleClient) -> None:
    with pytest.raises(requests.HTTPError, match="404") as caught:
        MultiLoraTransformersModel("acme/unknown")
    assert MODEL in str(caught.value)  # what is served


@pytest.mark.parametrize("scheme", ["ms://", "hf://"])
def test_12_schemes_of_hubs_are_left_out(client: TwinkleClient, scheme: str) -> None:
    MultiLoraTransformersModel(f"{scheme}{MODEL}").add_adapter_to_model("one", lora())


def test_13_ids_with_a_slash(service: LocalService, client: TwinkleClient) -> None:
    assert "/" in MODEL
    answer = requests.get(f"{service.url}/api/v1/model/{MODEL}/healthz", headers=BEARER)
    assert answer.json()["healthy"] is True
    MultiLoraTransformersModel(MODEL).add_adapter_to_model("one", lora())


@pytest.mark.parametrize("header", ["serve_multiplexed_model_id", "Serve-Multiplexed-Model-Id"])
def test_14_headers_for_routing_are_harmless(service: LocalService, header: str) -> None:
    answer = requests.post(
        f"{service.url}/api/v1/twinkle/create_session",
        json={"metadata": None},
        headers={**BEARER, header: "anything", "x-request-id": "20260101_000000-abcdef01"},
    )
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "20260101_000000-abcdef01"


def test_14_no_header_for_routing_is_needed(service: LocalService) -> None:
    answer = requests.post(f"{service.url}/api/v1/twinkle/create_session", json={}, headers=BEARER)
    assert answer.status_code == 200
    assert re.fullmatch(r"[\w-]+", answer.json()["session_id"])


def test_15_the_servers_words_are_in_the_error(model: MultiLoraTransformersModel) -> None:
    with pytest.raises(requests.HTTPError) as caught:
        model.add_adapter_to_model("../x", LoraConfig(target_modules="all-linear", r=4))
    text = str(caught.value)
    assert text.startswith("400")
    assert "not usable" in text
    assert "Traceback" not in text


def test_a_call_without_a_session_says_what_to_do(service: LocalService) -> None:
    url = f"{service.url}/api/v1/model/{MODEL}/twinkle/save"
    answer = requests.post(url, json={"adapter_name": "x"}, headers=BEARER)
    assert answer.status_code == 400
    assert "X-Twinkle-Session-Id" in answer.json()["detail"]


def test_a_session_of_another_key_serves_nobody_else(service: LocalService) -> None:
    with connected(service.url, OTHER_KEY) as other:
        theirs = other._session_id
    with connected(service.url):
        set_session_id(theirs)
        with pytest.raises(requests.HTTPError, match="404"):
            MultiLoraTransformersModel(MODEL).add_adapter_to_model("one", lora())


def test_99_a_long_call_keeps_nobody_waiting(
    service: LocalService, client: TwinkleClient, model: MultiLoraTransformersModel
) -> None:
    model.add_adapter_to_model("long", lora())
    rows = [feature(*([7] * 500)) for _ in range(24)]
    call = Thread(target=lambda: model.forward_only(inputs=rows))
    call.start()
    answered = 0
    url = f"{service.url}/api/v1/twinkle"
    with requests.Session() as other:
        other.headers["Authorization"] = f"Bearer {OTHER_KEY}"
        session = other.post(f"{url}/create_session", json={}).json()
        while call.is_alive():
            assert other.get(f"{url}/training_runs").status_code == 200
            assert other.post(f"{url}/session_heartbeat", json=session).status_code == 200
            answered += 1
    call.join()
    assert answered > 3


def test_status_counts_what_is_the_tenants_own(service: LocalService) -> None:
    def counts(key: str) -> dict[str, int]:
        headers = {"Authorization": f"Bearer {key}"}
        answer = requests.get(f"{service.url}/api/v1/twinkle/status", headers=headers).json()
        assert answer["cleanup"]["running"] is True
        assert answer["cleanup"]["expiration_timeout"] > 0
        return answer["resources"]

    mine, theirs = counts(KEY), counts(OTHER_KEY)
    with connected(service.url):
        assert counts(KEY)["sessions"] == mine["sessions"] + 1
        assert counts(OTHER_KEY) == theirs


# The public contract (section 8 of the reference), without what only their own services call.
GATEWAY = """
GET /healthz
GET /get_server_capabilities
POST /telemetry
POST /create_session
POST /session_heartbeat
POST /create_sampling_session
POST /retrieve_future
GET /training_runs
GET /training_runs/{}
GET /training_runs/{}/checkpoints
DELETE /training_runs/{}/checkpoints/{}
POST /training_runs/{}/checkpoints/{}/publish
POST /weights_info
POST /create_model
POST /get_info
POST /unload_model
POST /forward
POST /forward_backward
POST /optim_step
POST /save_weights
POST /save_weights_for_sampler
POST /load_weights
POST /asample
GET /twinkle/healthz
GET /twinkle/healthz/deep
GET /twinkle/capacity_info
GET /twinkle/get_server_capabilities
POST /twinkle/create_session
POST /twinkle/session_heartbeat
GET /twinkle/training_runs
GET /twinkle/training_runs/{}
GET /twinkle/training_runs/{}/checkpoints
DELETE /twinkle/training_runs/{}/checkpoints/{}
GET /twinkle/checkpoint_path/{}/{}
POST /twinkle/weights_info
GET /twinkle/status
GET /models
POST /chat/completions
GET /model/{}/healthz
GET /model/{}/twinkle/upload_status/{}
POST /sampler/{}/twinkle/create
POST /sampler/{}/twinkle/sample
POST /sampler/{}/twinkle/set_template
POST /sampler/{}/twinkle/add_adapter_to_sampler
POST /sampler/{}/twinkle/apply_patch
POST /sampler/{}/twinkle/sample_stream
POST /processor/twinkle/create
POST /processor/twinkle/call
"""
MODEL_OPERATIONS = """
create add_adapter_to_model set_template set_processor set_loss set_optimizer set_lr_scheduler
add_metric apply_patch forward forward_only calculate_loss backward forward_backward clip_grad_norm
step zero_grad lr_step clip_grad_and_step calculate_metric get_train_configs get_state_dict save
load resume_from_checkpoint upload_to_hub
"""


def test_the_public_contract_is_part_of_our_document(service: LocalService) -> None:
    document = requests.get(f"{service.url}/api/v1/openapi.json", headers=BEARER).json()
    ours = {
        (method.upper(), re.sub(r"\{[^}]*\}", "{}", path.removeprefix("/api/v1")))
        for path, operations in document["paths"].items()
        for method in operations
    }
    # Tinker's checkpoints are kind and name here, which their one parameter covers.
    ours |= {
        (method, path.replace("/checkpoints/{}/{}", "/checkpoints/{}")) for method, path in ours
    }
    wanted = {tuple(line.split()) for line in GATEWAY.split("\n") if line}
    wanted |= {("POST", f"/model/{{}}/twinkle/{name}") for name in MODEL_OPERATIONS.split()}
    assert wanted - ours == set()


def test_every_route_of_the_face_says_what_it_takes_and_gives(service: LocalService) -> None:
    document = requests.get(f"{service.url}/api/v1/openapi.json", headers=BEARER).json()
    schemas = document["components"]["schemas"]
    assert not [name for name in schemas if "__" in name]  # two of the same name
    for path, operations in document["paths"].items():
        if "/twinkle/" not in path:
            continue
        for method, operation in operations.items():
            answers = operation["responses"]
            assert "200" in answers, path
            given = {one["name"]: one for one in operation.get("parameters", ())}
            if method == "post":
                assert "requestBody" in operation, path
            if given or method == "post":
                assert "422" in answers, path
            assert set(re.findall(r"{(\w+)", path)) <= {
                name for name, one in given.items() if one["in"] == "path"
            }, path
    listed = document["paths"]["/api/v1/twinkle/training_runs"]["get"]["parameters"]
    defaults = {one["name"]: one["schema"].get("default") for one in listed}
    assert (defaults["limit"], defaults["offset"]) == (20, 0)
