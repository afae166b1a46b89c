"""Saving, resuming, sampling from what was saved, and the records of it, through the SDK."""

from collections.abc import Callable
from typing import Any

import pytest
import tinker
from tinker import types

from tests.blackbox.conftest import ALIAS, KEY, MODEL, OTHER_KEY
from tests.blackbox.data import batch, train_one_step
from tests.blackbox.saved import identical, weights_of
from tests.blackbox.states import a_run, drawn, known, load
from tests.blackbox.wire import Wire
from twinkle_dask import LocalService

# A failure that will not pass must come at once: the SDK would repeat other ones for minutes.
pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def run(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return a_run(client)


@pytest.fixture
def rest(service: LocalService) -> tinker.RestClient:
    return tinker.RestClient(base_url=service.url, api_key=KEY)


# ---- saving


# ---- resuming


def test_unspent_gradients_are_no_part_of_a_state(
    client: tinker.ServiceClient, run: tinker.TrainingClient
) -> None:
    run.forward_backward(batch(), "cross_entropy").result()
    path = run.save_state("ck").result().path
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.optim_step(types.AdamParams()).result().metrics == {"grad_norm:mean": 0.0}
    metrics = run.optim_step(types.AdamParams()).result().metrics
    assert metrics is not None
    assert metrics["grad_norm:mean"] > 0


def test_another_name_of_the_same_model_will_do(
    client: tinker.ServiceClient, run: tinker.TrainingClient, service: LocalService
) -> None:
    path = run.save_state("ck").result().path
    resumed = client.create_training_client_from_state(path, base_model=ALIAS).result()
    assert resumed.get_info().model_data.model_name == ALIAS
    assert identical(weights_of(service, resumed, "x"), weights_of(service, run, "x"))


def test_loading_another_shape_is_refused(
    client: tinker.ServiceClient, run: tinker.TrainingClient
) -> None:
    path = run.save_state("ck").result().path
    other = client.create_lora_training_client(MODEL, rank=5).result()
    with pytest.raises(tinker.BadRequestError, match="rank 4"):
        load(other, path)
    assert train_one_step(other, batch()) > 0


def test_sampler_weights_have_no_optimizer_to_resume(
    client: tinker.ServiceClient, run: tinker.TrainingClient, service: LocalService
) -> None:
    path = run.save_weights_for_sampler("s").result().path
    with pytest.raises(tinker.BadRequestError, match="without its optimizer"):
        client.create_training_client_from_state_with_optimizer(path).result()
    resumed = client.create_training_client_from_state(path).result()
    assert identical(weights_of(service, resumed, "x"), weights_of(service, run, "x"))


# ---- samplers


def test_sampler_weights_outlive_their_session(
    client: tinker.ServiceClient, service: LocalService
) -> None:
    with tinker.ServiceClient(base_url=service.url, api_key=KEY) as first:
        run = first.create_lora_training_client(MODEL, rank=4).result()
        train_one_step(run, batch(), lr=3e-2)
        path = run.save_weights_for_sampler("s").result().path
        sampler = first.create_sampling_client(model_path=path).result()
        expected = drawn(sampler)
    assert drawn(client.create_sampling_client(model_path=path).result()) == expected


def test_weights_that_are_gone_cannot_be_sampled_from(
    client: tinker.ServiceClient, run: tinker.TrainingClient, rest: tinker.RestClient
) -> None:
    deleted = run.save_weights_for_sampler("s").result().path
    rest.delete_checkpoint_from_tinker_path(deleted).result()
    with pytest.raises(tinker.NotFoundError):
        client.create_sampling_client(model_path=deleted).result()
    # Replaced after the sampler's creation.
    path = run.save_state("ck").result().path
    sampler = client.create_sampling_client(model_path=path).result()
    run.save_state("ck", overwrite=True).result()
    with pytest.raises(tinker.NotFoundError, match=r"weights of .* were deleted"):
        drawn(sampler)
    drawn(client.create_sampling_client(model_path=path).result())


def test_a_state_deleted_before_the_turn_of_its_load(
    client: tinker.ServiceClient, run: tinker.TrainingClient, rest: tinker.RestClient, wire: Wire
) -> None:
    path = run.save_state("ck").result().path
    fresh = client.create_lora_training_client(MODEL, rank=4, train_unembed=False).result()
    body = {"model_id": fresh.model_id, "seq_id": 2, "path": path, "optimizer": True}
    load = wire.promise("load_weights", body)  # waits for number 1
    rest.delete_checkpoint_from_tinker_path(path).result()
    wire.result(wire.optim_step(fresh.model_id, 1))
    failed = wire.result(load)
    assert failed["category"] == "user"
    assert "deleted" in failed["error"]
    assert wire.metrics(wire.forward_backward(fresh.model_id, 3, batch()))["loss:sum"] > 0


# ---- records


def test_a_run_is_found_by_its_id_and_by_its_checkpoints(
    run: tinker.TrainingClient, rest: tinker.RestClient
) -> None:
    states = [run.save_state(name).result().path for name in ("a", "b")]
    weights = run.save_weights_for_sampler("s").result().path
    info = rest.get_training_run(run.model_id).result()
    assert info.user_metadata == {"renderer_name": "plain"}
    assert info.last_checkpoint is not None
    assert info.last_checkpoint.tinker_path == states[1]
    assert info.last_sampler_checkpoint is not None
    assert info.last_sampler_checkpoint.tinker_path == weights
    for path in (*states, weights):
        found = rest.get_training_run_by_tinker_path(path).result()
        assert found.training_run_id == run.model_id


# ---- tenants


def test_another_tenants_things_do_not_exist(
    run: tinker.TrainingClient,
    rest: tinker.RestClient,
    other_client: tinker.ServiceClient,
    service: LocalService,
) -> None:
    state = run.save_state("ck").result().path
    weights = run.save_weights_for_sampler("s").result().path
    own = other_client.create_lora_training_client(MODEL, rank=4, train_unembed=False).result()
    theirs = tinker.RestClient(base_url=service.url, api_key=OTHER_KEY)
    attempts: list[Callable[[], object]] = [
        lambda: theirs.get_training_run(run.model_id).result(),
        lambda: theirs.list_checkpoints(run.model_id).result(),
        lambda: load(own, state),
    ]
    for path in (state, weights):
        attempts += [
            lambda path=path: other_client.create_training_client_from_state(path).result(),
            lambda path=path: other_client.create_sampling_client(model_path=path).result(),
            lambda path=path: theirs.get_weights_info_by_tinker_path(path).result(),
            lambda path=path: theirs.get_training_run_by_tinker_path(path).result(),
            lambda path=path: theirs.delete_checkpoint_from_tinker_path(path).result(),
            lambda path=path: theirs.set_checkpoint_ttl_from_tinker_path(path, None).result(),
        ]
    for attempt in attempts:
        with pytest.raises(tinker.NotFoundError) as refused:
            attempt()
        assert "There is no" in str(refused.value)
    listed = theirs.list_user_checkpoints(limit=1000).result().checkpoints
    assert not {one.tinker_path for one in listed} & {state, weights}
    runs = theirs.list_training_runs(limit=1000).result().training_runs
    assert run.model_id not in {one.training_run_id for one in runs}
    # Nothing happened to any of it.
    assert known(rest, run.model_id).keys() == {"weights/ck", "sampler_weights/s"}
    assert train_one_step(own, batch()) > 0


def test_another_tenants_run_takes_no_work(
    run: tinker.TrainingClient, service: LocalService
) -> None:
    bodies: dict[str, dict[str, Any]] = {
        "get_info": {},
        "optim_step": {"seq_id": 3, "adam_params": {}},
        "save_weights": {"seq_id": 3, "path": "stolen"},
        "save_weights_for_sampler": {"seq_id": 3, "path": "stolen"},
        "load_weights": {"seq_id": 3, "path": f"tinker://{run.model_id}/weights/ck"},
    }
    with Wire(service.url, OTHER_KEY) as other:
        for path, body in bodies.items():
            answer = other.post(path, {"model_id": run.model_id, **body})
            assert answer.status_code == 404, path
        session = run.model_id.split(":")[0]
        answer = other.post(
            "create_sampling_session",
            {"session_id": session, "sampling_session_seq_id": 99, "base_model": MODEL},
        )
        assert answer.status_code == 404
    # Its number 3 is free.
    assert train_one_step(run, batch()) > 0


def test_another_tenants_sampler_and_results_do_not_exist(
    client: tinker.ServiceClient, run: tinker.TrainingClient, service: LocalService
) -> None:
    run.save_weights_and_get_sampling_client().result()
    sampler = f"{client.holder.get_session_id()}:sample:0"
    sample = {
        "sampling_session_id": sampler,
        "seq_id": 0,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [20, 21]}]},
        "sampling_params": {"max_tokens": 1},
    }
    with Wire(service.url, KEY) as own, Wire(service.url, OTHER_KEY) as other:
        ticket = own.promise("asample", sample)
        own.wait(ticket)
        assert other.get(f"samplers/{sampler}").status_code == 404
        assert other.post("asample", {**sample, "seq_id": 1}).status_code == 404
        assert other.post("retrieve_future", {"request_id": ticket}).status_code == 404


def test_a_closed_session_takes_no_work(wire: Wire, service: LocalService) -> None:
    with tinker.ServiceClient(base_url=service.url, api_key=KEY) as client:
        run = client.create_lora_training_client(MODEL, rank=4).result()
        run.save_weights_and_get_sampling_client().result()
        session = client.holder.get_session_id()
    step = wire.post("optim_step", {"model_id": run.model_id, "seq_id": 2, "adam_params": {}})
    create = wire.post(
        "create_model",
        {"session_id": session, "model_seq_id": 1, "base_model": MODEL, "lora_config": {"rank": 4}},
    )
    for answer in (step, create):
        assert answer.status_code == 400
        assert session in answer.json()["detail"]
    beat = wire.post("session_heartbeat", {"session_id": session})
    assert beat.status_code == 410


def test_an_unloaded_run_takes_no_work(
    client: tinker.ServiceClient, run: tinker.TrainingClient, wire: Wire
) -> None:
    """Older clients say so when they are done."""
    path = run.save_state("ck").result().path
    step = wire.optim_step(run.model_id, 4)
    unload = wire.promise("unload_model", {"model_id": run.model_id})
    assert "metrics" in wire.result(step)  # what came before is done
    assert wire.result(unload) == {"model_id": run.model_id, "type": "unload_model"}
    assert wire.promise("unload_model", {"model_id": run.model_id}) == unload
    late = wire.post("optim_step", {"model_id": run.model_id, "seq_id": 6, "adam_params": {}})
    assert late.status_code == 400
    assert "unloaded" in late.json()["detail"]
    resumed = client.create_training_client_from_state(path).result()
    assert train_one_step(resumed, batch()) > 0
