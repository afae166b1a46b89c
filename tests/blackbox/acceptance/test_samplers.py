"""Samplers that follow a run, many samples at a time, copies of a client, cancelling."""

import pickle
import time
from collections.abc import Generator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import psutil
import pytest
import tinker

from tests.blackbox.conftest import KEY, MODEL, OTHER_KEY
from tests.blackbox.data import batch, random_tokens, train_one_step
from tests.blackbox.sampling import PROMPT, sample, tokens_of
from tests.blackbox.states import a_run, drawn, train_on
from tests.blackbox.wire import Wire
from tests.sampler.plain import PlainModel
from twinkle_dask import LocalService, local_service

MANY = 500
FEW = 5


@pytest.fixture(scope="module")
def narrow(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[LocalService]:
    """Few samples at a time, many results in one poll, and clean-ups all the time."""
    with local_service(
        {MODEL: str(model_folder)},
        api_keys=[KEY],
        dtype="float32",
        multiplex_polls=True,
        limits={"max_samples_in_flight": FEW},
        journal={"prune_interval_s": 0.2},
        data_dir=tmp_path_factory.mktemp("narrow"),
    ) as service:
        yield service


@pytest.fixture
def base(client: tinker.ServiceClient) -> tinker.SamplingClient:
    """A sampler of the untouched model."""
    return client.create_sampling_client(base_model=MODEL).result()


def saved_for_samplers(service: LocalService) -> list[Path]:
    return list((service.data_dir / "blobs" / "checkpoints").glob("*/sampler-*"))


# ---- shared weights


def test_53_inflight_samplers_follow_the_latest_save(client: tinker.ServiceClient) -> None:
    run = a_run(client)
    first = run.save_weights_and_get_sampling_client(kind="inflight").result()
    frozen = run.save_weights_and_get_sampling_client().result()
    before = drawn(first)
    assert drawn(frozen) == before
    train_on(run)
    # Training alone changes nothing; the next save does, for all that were saved so.
    assert drawn(first) == before
    second = run.save_weights_and_get_sampling_client(kind="inflight").result()
    now = drawn(second)
    assert now != before
    assert drawn(first) == now
    assert drawn(frozen) == before


def test_53_an_inflight_sampler_follows_its_own_run_alone(client: tinker.ServiceClient) -> None:
    mine, other = a_run(client), a_run(client)
    samplers = [
        run.save_weights_and_get_sampling_client(kind="inflight").result() for run in (mine, other)
    ]
    before = drawn(samplers[1])
    train_on(mine)
    mine.save_weights_and_get_sampling_client(kind="inflight").result()
    assert drawn(samplers[0]) != before
    assert drawn(samplers[1]) == before


def test_53_weights_that_were_followed_are_removed(narrow: LocalService) -> None:
    """Those that are being sampled with stay until that is done."""
    with (
        tinker.ServiceClient(base_url=narrow.url, api_key=KEY) as client,
        Wire(narrow.url, KEY) as wire,
    ):
        run = a_run(client)
        sampler = run.save_weights_and_get_sampling_client(kind="inflight").result()
        (first,) = saved_for_samplers(narrow)
        params: dict[str, Any] = {"max_tokens": 500, "seed": 1, "stop": []}
        expected = tokens_of(sample(sampler, **params))
        long = sample(sampler, **params)
        train_on(run)
        for _ in range(3):
            run.save_weights_and_get_sampling_client(kind="inflight").result()
        assert tokens_of(long) == expected
        while len(saved_for_samplers(narrow)) > 1:
            wire.get("healthz")
        assert first not in saved_for_samplers(narrow)


def test_53_inflight_weights_have_no_name(wire: Wire, client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(MODEL, rank=4).result()
    body = {"model_id": run.model_id, "seq_id": 1, "kind": "inflight", "path": "name"}
    answer = wire.post("save_weights_for_sampler", body)
    assert answer.status_code == 400
    assert "inflight weights have none" in answer.json()["detail"]


@pytest.mark.parametrize("kind", ["snapshot", "inflight"])
def test_54_a_repeated_save_is_the_first_one(
    client: tinker.ServiceClient, wire: Wire, kind: str
) -> None:
    """After a lost answer the SDK keeps the number but takes the next sampler number."""
    run = client.create_lora_training_client(MODEL, rank=4).result()
    session = client.holder.get_session_id()
    body = {"model_id": run.model_id, "seq_id": 1, "kind": kind}
    first = wire.promise("save_weights_for_sampler", {**body, "sampling_session_seq_id": 7})
    again = wire.promise("save_weights_for_sampler", {**body, "sampling_session_seq_id": 8})
    assert again == first
    assert wire.result(again)["sampling_session_id"] == f"{session}:sample:7"
    assert wire.get(f"samplers/{session}:sample:7").status_code == 200
    assert wire.get(f"samplers/{session}:sample:8").status_code == 404
    once_more = wire.promise("save_weights_for_sampler", {**body, "sampling_session_seq_id": 9})
    assert once_more == first


# ---- many at a time


def test_76_hundreds_of_samples_at_a_time(base: tinker.SamplingClient, model_folder: Path) -> None:
    plain = PlainModel(model_folder)
    prompts = [random_tokens(3 + i % 5, seed=i) for i in range(MANY)]
    futures = [sample(base, p, max_tokens=3, temperature=0, stop=[]) for p in prompts]
    tokens = [tokens_of(future)[0] for future in futures]
    assert [len(one) for one in tokens] == [3] * MANY
    for i in range(0, MANY, 100):
        assert tokens[i] == plain.greedy(prompts[i], 3)


@pytest.mark.timeout(120)
def test_77_a_client_that_is_told_to_wait_gets_everything(narrow: LocalService) -> None:
    """More than the quota: 429 until there is room. The SDK waits a second after each."""
    with tinker.ServiceClient(base_url=narrow.url, api_key=KEY) as client:
        sampler = client.create_sampling_client(base_model=MODEL).result()
        prompts = [random_tokens(5, seed=i) for i in range(4 * FEW)]
        futures = [sample(sampler, p, max_tokens=200, stop=[]) for p in prompts]
        assert all(len(tokens_of(future)[0]) == 200 for future in futures)
    log = (narrow.data_dir / "server.log").read_text()
    assert '"status": 429' in log
    assert "samples in flight" in log


def test_77_a_full_quota_says_when_to_come_back(narrow: LocalService) -> None:
    with Wire(narrow.url, KEY) as wire:
        sampler = a_sampler(wire)
        tickets = [wire.promise("asample", long_sample(sampler, seq)) for seq in range(FEW)]
        refused = wire.post("asample", long_sample(sampler, FEW))
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert str(FEW) in refused.json()["detail"]
        # What is cancelled makes room, at once.
        for ticket in tickets:
            assert wire.post("cancel_future", {"request_id": ticket}).status_code == 200
        last = wire.promise("asample", long_sample(sampler, FEW))
        wire.post("cancel_future", {"request_id": last})


def a_sampler(wire: Wire) -> str:
    session = wire.post("create_session", {}).json()["session_id"]
    create = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    return wire.post("create_sampling_session", create).json()["sampling_session_id"]


def long_sample(sampler: str, seq: int) -> dict[str, Any]:
    return {
        "sampling_session_id": sampler,
        "seq_id": seq,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
        "sampling_params": {"max_tokens": 1900, "stop": []},
        "num_samples": 64,
    }


# ---- copies of a client


@pytest.mark.parametrize("multiplexed", [False, True])
def test_78_copies_of_a_client_do_not_collide(
    service: LocalService, narrow: LocalService, multiplexed: bool
) -> None:
    at = narrow if multiplexed else service
    with tinker.ServiceClient(base_url=at.url, api_key=KEY) as client:
        run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        train_one_step(run, batch(), lr=3e-2)
        first = run.save_weights_and_get_sampling_client().result()
        handle = first.get_sampler_handle()
        copies = [
            first,
            pickle.loads(pickle.dumps(first)),
            pickle.loads(pickle.dumps(first)),
            tinker.SamplingClient.from_sampler_handle(handle, api_key=KEY),
        ]
        prompts = [random_tokens(5, seed=i) for i in range(3)]
        expected = [tokens_of(sample(first, p, max_tokens=6, temperature=0)) for p in prompts]
        responses = [
            sample(copy, prompt, max_tokens=6, temperature=0).result()
            for copy in copies
            for prompt in prompts
        ]
        tokens = [[one.tokens for one in response.sequences] for response in responses]
        assert tokens == expected * len(copies)
        ids = {one.sequence_id for response in responses for one in response.sequences}
        assert len(ids) == len(responses)


def test_78_a_copy_gets_a_number_of_its_own(wire: Wire) -> None:
    sampler = a_sampler(wire)
    body = {"sampling_session_id": sampler, "type": "join_sampling_session"}
    numbers = [wire.post("join_sampling_session", body).json()["client_counter"] for _ in range(5)]
    assert numbers == [1, 2, 3, 4, 5]
    unknown = wire.post("join_sampling_session", {"sampling_session_id": "none"})
    assert unknown.status_code == 404


def test_78_numbers_of_samples_go_far(wire: Wire) -> None:
    """Without a number from the server a copy draws one, and its samples begin near 1e18."""
    sampler = a_sampler(wire)
    seqs = [0, 10**9, 10**18 + 1, 2**63 - 1]
    tickets: set[str] = set()
    for seq in seqs:
        short = long_sample(sampler, seq) | {"num_samples": 1, "sampling_params": {"max_tokens": 1}}
        ticket = wire.promise("asample", short)
        assert wire.promise("asample", short) == ticket
        tickets.add(ticket)
    assert len(tickets) == len(seqs)


# ---- cancelling


class Hosts:
    """The processes that may carry the sampler's host, and how busy they are."""

    def __init__(self, service: LocalService) -> None:
        # On a separate cluster (``--on-cluster``) the workers are started by the tests.
        children = psutil.Process(service.pid).children(recursive=True)
        others = psutil.Process().children(recursive=True)
        self._processes = children or [each for each in others if each.pid != service.pid]
        self.percent(0.01)  # each counts from its first call on

    def percent(self, over_s: float) -> float:
        """Of a core, for all of them together."""
        time.sleep(over_s)
        return sum(process.cpu_percent() for process in self._processes)


@pytest.mark.parametrize("multiplexed", [False, True])
def test_79_a_cancelled_sample_is_not_drawn(
    service: LocalService, narrow: LocalService, multiplexed: bool
) -> None:
    """Drawn to its end it would keep a core busy for longer than this test may take."""
    at = narrow if multiplexed else service
    with tinker.ServiceClient(base_url=at.url, api_key=KEY) as client, Wire(at.url, KEY) as wire:
        base = client.create_sampling_client(base_model=MODEL).result()
        hosts = Hosts(at)
        abandoned = [sample(base, num_samples=500, max_tokens=1900, stop=[]) for _ in range(4)]
        while hosts.percent(0.1) < 50:
            assert not any(future.future().done() for future in abandoned)
        ticket = wire.promise("asample", long_sample(a_sampler(wire), 0) | {"num_samples": 500})
        for future in abandoned:
            assert future.future().cancel()
            with pytest.raises(CancelledError):
                future.result()
        for _ in range(2):  # once more, and nothing is left to do
            assert wire.post("cancel_future", {"request_id": ticket}).status_code == 200
        outcome = wire.result(ticket)
        assert outcome["category"] == "user"
        assert "cancelled" in outcome["error"]
        while hosts.percent(0.2) > 50:  # idle once all of it was dropped
            assert len(tokens_of(sample(base, max_tokens=3, stop=[]))[0]) == 3


def test_79_a_step_of_a_run_is_not_cancelled(wire: Wire, client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(MODEL, rank=4).result()
    ticket = wire.optim_step(run.model_id, 2)  # waits for the first, which is not there
    answer = wire.post("cancel_future", {"request_id": ticket})
    assert answer.status_code == 400
    assert "Only samples can be cancelled" in answer.json()["detail"]
    wire.optim_step(run.model_id, 1)
    assert "metrics" in wire.result(ticket)
    assert wire.post("cancel_future", {"request_id": ticket}).status_code == 200


def test_79_what_is_not_there_is_not_found(wire: Wire, service: LocalService) -> None:
    ticket = wire.promise("asample", long_sample(a_sampler(wire), 0) | {"num_samples": 1})
    with Wire(service.url, OTHER_KEY) as other:
        for known in (ticket, "none"):
            assert other.post("cancel_future", {"request_id": known}).status_code == 404
    assert wire.post("cancel_future", {"request_id": ticket}).status_code == 200
