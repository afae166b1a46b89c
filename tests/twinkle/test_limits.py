"""Expiry, lifetimes, limits and restarts (acceptance checks 24, 30, 65, 95 to 98, 100)."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from adapters import BATCH, feature, logps, lora, step, trained
from twinkle_client import init_twinkle_client
from twinkle_client.common.serialize import serialize_object
from twinkle_client.http import http_post
from twinkle_client.manager import TwinkleClient
from twinkle_client.model import MultiLoraTransformersModel

from tests.twinkle.conftest import KEY, MODEL, OTHER_KEY
from twinkle_dask.local import LocalService

SESSION_S = 2.0
LIFETIME_S = 10.0
MAX_RUNS = 3
MAX_TOKENS = 100
RATE = 40
WINDOW_S = 2.0


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Any]) -> Generator[LocalService]:
    """With everything short, and few of everything."""
    limits = {
        "session_timeout_s": SESSION_S,
        "run_lifetime_s": LIFETIME_S,
        "max_runs": MAX_RUNS,
        "max_input_tokens": MAX_TOKENS,
        "operations_per_s": RATE / WINDOW_S,
        "input_tokens_per_s": 400 / WINDOW_S,
        "rate_window_s": WINDOW_S,
        "queue_timeout_s": 0.5,
    }
    with start_service(limits=limits, journal={"prune_interval_s": 0.2}) as running:
        yield running


@pytest.fixture
def client(service: LocalService) -> Generator[TwinkleClient]:
    """A client whose heartbeats are frequent enough, and whose session is over after the test."""
    with connected(service) as client:
        yield client
    wait_for(lambda: capacity(service) == 0)


@contextmanager
def connected(
    service: LocalService, key: str = KEY, interval_s: float = 0.5
) -> Generator[TwinkleClient]:
    client = init_twinkle_client(
        base_url=service.url, api_key=key, session_heartbeat_interval=interval_s
    )
    try:
        yield client
    finally:
        client.close()


def capacity(service: LocalService, key: str = KEY) -> int:
    """How many adapters a tenant has."""
    headers = {"Authorization": f"Bearer {key}"}
    answer = requests.get(f"{service.url}/api/v1/twinkle/capacity_info", headers=headers).json()
    assert answer["used_loras"] + answer["free_loras"] == answer["max_loras"]
    return answer["used_loras"]


def wait_for(done: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_refusal(call: Callable[[], object]) -> requests.HTTPError:
    """Call again and again until it is refused."""
    refusals: list[requests.HTTPError] = []

    def refused() -> bool:
        try:
            call()
        except requests.HTTPError as error:
            refusals.append(error)
        return bool(refusals)

    wait_for(refused)
    return refusals[0]


def added(name: str) -> MultiLoraTransformersModel:
    model = MultiLoraTransformersModel(MODEL)
    model.add_adapter_to_model(name, lora())
    return model


def test_24_and_30_the_configured_number_of_adapters(
    service: LocalService, old: requests.Session, client: TwinkleClient
) -> None:
    models = [added(f"a{number}") for number in range(MAX_RUNS)]
    assert capacity(service) == MAX_RUNS
    with pytest.raises(requests.HTTPError, match="429") as caught:
        added("one-more")
    assert f"{MAX_RUNS} are the limit" in str(caught.value)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    # Nothing was left behind, and the others still work; so do those of another tenant.
    assert capacity(service) == MAX_RUNS
    assert logps(models[0])
    with connected(service, OTHER_KEY):
        added("theirs")
    client.close()
    wait_for(lambda: capacity(service) == 0)
    with connected(service):
        added("one-more")


def test_95_without_heartbeats_adapters_expire(service: LocalService) -> None:
    with connected(service) as client:
        model = trained(MultiLoraTransformersModel(MODEL), steps=1)
        kept = model.save("kept", save_optimizer=True)
        assert capacity(service) == 1
    wait_for(lambda: capacity(service) == 0)
    for call in (lambda: step(model), lambda: model.save("x"), lambda: model.forward_only(BATCH)):
        with pytest.raises(requests.HTTPError, match="409") as caught:
            call()
        assert "create a new one" in str(caught.value)
    with pytest.raises(requests.HTTPError, match="404"):
        http_post(
            client._get_url("/session_heartbeat"), json_data={"session_id": client._session_id}
        )
    # What was saved is there for the next session.
    with connected(service):
        added("again").load(kept.twinkle_path)


def test_95_a_call_that_was_taken_is_done_although_its_session_ends(
    service: LocalService,
) -> None:
    """Nothing that was acknowledged is lost; only what comes after the end is refused."""
    with connected(service):
        model = trained(MultiLoraTransformersModel(MODEL), steps=1)
        found: list[Any] = []
        many = [feature(*range(3, 12)) for _ in range(9)]
        call = Thread(target=lambda: found.append(model.forward_backward(inputs=many).result))
        call.start()
    call.join()
    assert found[0]["loss"] > 0
    wait_for(lambda: capacity(service) == 0)


def test_97_rates_are_refused_and_recover(service: LocalService, client: TwinkleClient) -> None:
    model = added("fast")
    refused: list[requests.HTTPError] = []

    def hammer() -> None:
        for _ in range(RATE):
            try:
                model.zero_grad()
                model.forward_only(inputs=[{"input_ids": [3, 4], "labels": [4, -100]}])
            except requests.HTTPError as error:
                refused.append(error)
                return

    threads = [Thread(target=hammer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not refused:
        pytest.skip("This machine is too busy to reach the rate.")
    assert "Rate limit exceeded" in str(refused[0])
    assert refused[0].response.status_code == 429
    time.sleep(max(int(refused[0].response.headers["retry-after"]), WINDOW_S))
    assert logps(model)


def test_97_input_tokens_in_a_while(service: LocalService, client: TwinkleClient) -> None:
    model = added("wide")
    rows = [feature(*range(3, 13)) for _ in range(9)]
    error = wait_for_refusal(lambda: model.forward_only(inputs=rows))
    assert "input tokens" in str(error)
    assert error.response.status_code == 429
    time.sleep(WINDOW_S)
    model.forward_only(inputs=rows)


def test_97_input_tokens_of_one_call(client: TwinkleClient) -> None:
    model = added("long")
    with pytest.raises(requests.HTTPError, match="400") as caught:
        model.forward_only(inputs=[feature(*([5] * (MAX_TOKENS + 1)))])
    assert f"exceed the maximum of one request here, {MAX_TOKENS}" in str(caught.value)
    assert logps(model)


def test_96_no_adapter_lives_for_ever(service: LocalService, old: requests.Session) -> None:
    """The adapter of another tenant, which was made first and whose session is kept alive."""
    url = f"{service.url}/api/v1/model/{MODEL}/twinkle/forward_only"
    body = {"inputs": BATCH, "adapter_name": "old"}
    wait_for(lambda: old.post(url, json=body).status_code == 409)
    assert "longest life" in old.post(url, json=body).json()["detail"]
    wait_for(lambda: capacity(service, OTHER_KEY) == 0)
    assert "longest life" in old.post(url, json=body).json()["detail"]
    # The session goes on, with new adapters.
    assert add_old(service, old, "young").status_code == 200


@pytest.fixture(scope="module")
def old(service: LocalService) -> Generator[requests.Session]:
    """An adapter of the other tenant, by hand: the client knows one session in a process."""
    url = f"{service.url}/api/v1/twinkle"
    over = Event()

    def beat(body: dict[str, Any]) -> None:
        while not over.wait(0.3):
            requests.post(f"{url}/session_heartbeat", json=body, headers=dict(caller.headers))

    with requests.Session() as caller:
        caller.headers["Authorization"] = f"Bearer {OTHER_KEY}"
        session = caller.post(f"{url}/create_session", json={}).json()
        caller.headers["X-Twinkle-Session-Id"] = session["session_id"]
        assert add_old(service, caller, "old").status_code == 200
        beating = Thread(target=beat, args=(session,))
        beating.start()
        yield caller
        over.set()
        beating.join()


def add_old(service: LocalService, caller: requests.Session, name: str) -> requests.Response:
    return caller.post(
        f"{service.url}/api/v1/model/{MODEL}/twinkle/add_adapter_to_model",
        json={"adapter_name": name, "config": serialize_object(lora())},
    )


@dataclass(frozen=True)
class Restarted:
    """A service that was stopped and started again, and what was there before."""

    service: LocalService
    session: str
    path: str
    logps: Any
    counted: int
    answer: Any


@pytest.fixture(scope="module")
def restarted(
    start_service: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Generator[Restarted]:
    settings: dict[str, Any] = {
        "data_dir": tmp_path_factory.mktemp("restarted"),
        "limits": {"max_runs": 2, "session_timeout_s": 3.0, "queue_timeout_s": 0.5},
        "journal": {"prune_interval_s": 0.2},
    }
    with start_service(**settings) as first, connected(first) as client:
        model = trained(MultiLoraTransformersModel(MODEL))
        kept = model.save("kept", save_optimizer=True, consumed_train_samples=4)
        expected, session = logps(model), client._session_id
    with start_service(**settings) as second:
        # Now, since nobody keeps the session alive while other tests run.
        counted = capacity(second)
        answer = requests.post(
            f"{second.url}/api/v1/model/{MODEL}/twinkle/forward_only",
            json={"inputs": BATCH, "adapter_name": "main"},
            headers={"Authorization": f"Bearer {KEY}", "X-Twinkle-Session-Id": session},
        ).json()
        yield Restarted(second, session, kept.twinkle_path, expected, counted, answer)


def test_100_after_a_restart_nothing_is_counted_that_is_not_there(restarted: Restarted) -> None:
    service = restarted.service
    # The session is alive, so is its adapter: as it stood, and counted.
    assert restarted.counted == 1
    assert np.allclose(restarted.answer["result"]["logps"], restarted.logps, atol=1e-5)
    # Nobody keeps it alive any more, so it goes, and its place is free.
    wait_for(lambda: capacity(service) == 0)
    with connected(service):
        added("one")
        added("two")
        assert capacity(service) == 2
    wait_for(lambda: capacity(service) == 0)


def test_65_runs_survive_a_restart(restarted: Restarted) -> None:
    run = f"{restarted.session}-main"
    with connected(restarted.service) as client:
        assert run in [one.training_run_id for one in client.list_training_runs()]
        assert [one.checkpoint_id for one in client.list_checkpoints(run)] == ["weights/kept"]
        model = added("main")
        model.set_optimizer("AdamW", lr=1e-2)
        progress = model.resume_from_checkpoint(restarted.path)
        assert progress["consumed_train_samples"] == 4
        assert np.allclose(logps(model), restarted.logps, atol=1e-5)


def test_98_what_no_host_takes_fails_in_time(restarted: Restarted) -> None:
    service = restarted.service
    with connected(service):
        fails_in_time(service)


def fails_in_time(service: LocalService) -> None:
    model = trained(MultiLoraTransformersModel(MODEL), steps=1)
    expected = logps(model)
    for worker in psutil.Process(service.pid).children(recursive=True):
        threads = worker.num_threads() if worker.is_running() else 0
        if threads and worker.memory_info().rss > 250 * 2**20:  # who has the base model
            worker.kill()
    error = wait_for_refusal(lambda: logps(model))
    assert error.response.status_code == 503
    assert "it was not done" in str(error)
    assert "retry-after" in error.response.headers
    health = requests.get(f"{service.url}/api/v1/twinkle/healthz")
    assert health.status_code == 200  # the service itself is well

    statuses: set[int] = set()

    def back() -> bool:
        try:
            return np.allclose(logps(model), expected, atol=1e-5)
        except requests.HTTPError as error:
            statuses.add(error.response.status_code)
            return False

    wait_for(back)
    assert statuses <= {429, 503}
