"""Keys and tokens: items 3 to 6."""

import contextlib
import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from tests.blackbox.accounts import create_key, tinker_cli
from tests.blackbox.conftest import KEY, MODEL
from tests.blackbox.data import batch, train_one_step
from tests.blackbox.proxy import Heard, Proxy, proxy
from tests.blackbox.servers import run
from tests.blackbox.wire import Wire
from twinkle_dask import LocalService

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def between(service: LocalService) -> Generator[Proxy]:
    with proxy(service.url) as running:
        yield running


@pytest.mark.parametrize("key", ["tml-unknown", f"{KEY}x", KEY[:-1], "tml-" + "x" * 5000])
def test_03_a_wrong_key_is_refused(service: LocalService, key: str) -> None:
    client = tinker.ServiceClient(base_url=service.url, api_key=key)
    with pytest.raises(tinker.AuthenticationError, match="API key"):
        client.create_lora_training_client(MODEL, rank=4).result()


def test_04_after_the_exchange_all_calls_carry_the_token(between: Proxy) -> None:
    with tinker.ServiceClient(base_url=between.url, api_key=KEY) as client:
        run = client.create_lora_training_client(MODEL, rank=4).result()
        assert train_one_step(run, batch()) > 0
    first, second, *others = between.heard
    assert (first.path, first.key) == ("client/config", KEY)
    assert (second.path, second.key, second.status) == ("auth/token", KEY, 200)
    keys = {one.key for one in others}
    assert len(keys) == 1
    assert keys.pop().startswith("eyJ")
    assert {"create_session", "create_model", "forward_backward", "optim_step"} <= {
        one.path for one in others
    }
    assert {one.status for one in others} <= {200, 204, 408}


def test_05_a_rejected_token_is_replaced_and_the_request_sent_again(between: Proxy) -> None:
    damaged: list[str] = []

    def damage(request: Heard) -> None:
        if request.path == "get_server_capabilities" and not damaged:
            damaged.append(request.headers["x-api-key"])
            request.headers["x-api-key"] = request.headers["x-api-key"][:-4] + "AAAA"

    between.changes.append(damage)
    rest = tinker.RestClient(base_url=between.url, api_key=KEY)
    assert rest.get_server_capabilities().result().supported_models
    # What else the client says of its own accord (telemetry) may come in between.
    about = {"auth/token", "get_server_capabilities"}
    told = [(one.path, one.status) for one in between.heard if one.path in about]
    assert told[-3:] == [
        ("get_server_capabilities", 401),
        ("auth/token", 200),
        ("get_server_capabilities", 200),
    ]


def test_05_a_key_that_is_revoked_takes_its_tokens_along(service: LocalService) -> None:
    key = create_key(service, "short-lived")
    rest = tinker.RestClient(base_url=service.url, api_key=key)
    assert rest.get_server_capabilities().result()
    token = token_of(service, key)
    with Wire(service.url, token) as wire:
        assert wire.get("sessions").status_code == 200
        assert wire.request("DELETE", "auth/apikey/me").status_code == 200
        rejected = wire.get("sessions")
        assert rejected.status_code == 401
        assert rejected.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    # The client exchanges its key again, and that is what fails.
    with pytest.raises(tinker.AuthenticationError, match="not known"):
        rest.get_server_capabilities().result()


def test_06_whoami(service: LocalService) -> None:
    key = create_key(service, "laptop", "--tenant", "alice", "--email", "alice@example.org")
    me = tinker.RestClient(base_url=service.url, api_key=key).whoami().result()
    assert me.user_urn == "tml:user:alice"
    assert me.org_urn == "tml:organization:alice"
    assert me.email == "alice@example.org"
    configured = tinker.RestClient(base_url=service.url, api_key=KEY).whoami().result()
    assert configured.email is None
    assert configured.user_urn != me.user_urn


def test_06_the_command_line_logs_in_and_out(service: LocalService, tmp_path: Path) -> None:
    key = create_key(service, "cli", "--tenant", "alice", "--note", "for a test")

    def cli(*arguments: str, told: str = "") -> str:
        ended = tinker_cli(service, None, tmp_path, *arguments, told=told)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert "'cli'" in cli("auth", "login", told=f"{key}\n")
    stored = json.loads((tmp_path / ".tinker" / "credentials.json").read_text())
    (record,) = stored["keys"].values()
    assert (record["name"], record["note"]) == ("cli", "for a test")
    assert record["details"]["org_details"]["name"] == "alice"
    assert "Tinker accessible: yes" in cli("auth", "status")
    assert "tml:user:alice" in cli("auth", "whoami")
    assert "cli" in cli("auth", "logout")


# ---- keys


def test_keys_are_made_listed_and_revoked_beside_the_server(service: LocalService) -> None:
    first, second = (create_key(service, name, "--tenant", "bob") for name in ("one", "two"))
    with tinker.ServiceClient(base_url=service.url, api_key=first) as client:
        made = client.create_lora_training_client(MODEL, rank=4).result().model_id
    # Keys of one tenant share everything.
    assert known(service, second, f"training_runs/{made}") == 200
    listed = run("keys", "list", "--data-dir", str(service.data_dir)).stdout
    assert first not in listed
    assert second[-4:] in listed
    key_id = details(service, second)["key_id"]
    revoked = run("keys", "revoke", str(key_id), "--data-dir", str(service.data_dir))
    assert revoked.returncode == 0, revoked.stderr
    while known(service, second) == 200:  # until the server has looked again
        time.sleep(0.1)
    assert known(service, second) == 401
    assert known(service, first) == 200
    again = run("keys", "revoke", str(key_id), "--data-dir", str(service.data_dir))
    assert again.returncode == 2
    assert "before" in again.stderr
    # The trail tells who did what.
    entries = tinker.AdminClient(base_url=service.url, api_key=first).get_audit_log(
        event_type="organizations"
    )
    events = [(one.event, one.event_details["key"]) for one in entries.result().entries]
    assert events[:3] == [
        ("api_key_revoked", "two"),
        ("api_key_created", "two"),
        ("api_key_created", "one"),
    ]


def test_a_configured_key_is_not_revoked(wire: Wire, service: LocalService) -> None:
    refused = wire.request("DELETE", "auth/apikey/me")
    assert refused.status_code == 403
    assert "configuration" in refused.json()["detail"]
    assert known(service, KEY) == 200
    configured = str(details(service, KEY)["key_id"])
    told = run("keys", "revoke", configured, "--data-dir", str(service.data_dir))
    assert told.returncode == 2
    assert "configuration" in told.stderr


@pytest.mark.parametrize(
    ("name", "why"), [("two words", "letters"), ("../up", "letters"), ("x" * 65, "64")]
)
def test_a_tenant_has_a_plain_name(tmp_path: Path, name: str, why: str) -> None:
    ended = run("keys", "create", name, "--data-dir", str(tmp_path))
    assert ended.returncode == 2
    assert why in ended.stderr


def token_of(service: LocalService, key: str) -> str:
    with Wire(service.url, key) as wire:
        return wire.post("auth/token", {}).json()["jwt"]


def details(service: LocalService, key: str) -> dict[str, Any]:
    with Wire(service.url, key) as wire:
        return wire.get("auth/apikey/me").json()


def known(service: LocalService, key: str, path: str = "sessions") -> int:
    with contextlib.closing(httpx.Client(headers={"x-api-key": key})) as client:
        return client.get(f"{service.url}/api/v1/{path}").status_code
