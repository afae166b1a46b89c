"""The patched Tinker SDK of Twinkle's client (acceptance checks 101 to 110)."""

import os
from collections.abc import Callable, Generator
from typing import Any

import pytest
import requests
from adapters import trained
from twinkle_client import init_tinker_client, init_twinkle_client
from twinkle_client.manager import TwinkleClient
from twinkle_client.model import MultiLoraTransformersModel

from tests.twinkle.conftest import KEY, MODEL, OTHER_KEY, PLAIN_KEY
from twinkle_dask.local import LocalService

init_tinker_client()

import tinker  # noqa: E402
from tinker import types  # noqa: E402

ADAM = types.AdamParams(learning_rate=1e-3)


@pytest.fixture(scope="module")
def services(service: LocalService) -> Generator[Callable[[str], tinker.ServiceClient]]:
    """Service clients by key, as scripts make them."""
    made: list[Any] = []

    def connect(key: str = KEY) -> tinker.ServiceClient:
        client = tinker.ServiceClient(base_url=service.url, api_key=key)
        made.append(client)
        return client

    yield connect
    for client in made:
        client.holder.close()


@pytest.fixture(scope="module")
def tinker_service(services: Callable[..., Any]) -> tinker.ServiceClient:
    return services()


@pytest.fixture(scope="module")
def training(tinker_service: tinker.ServiceClient) -> Any:
    """A run with two steps behind it."""
    client = tinker_service.create_lora_training_client(base_model=MODEL, rank=4)
    for _ in range(2):
        client.forward_backward([datum()], "cross_entropy").result()
        client.optim_step(ADAM).result()
    return client


@pytest.fixture(scope="module")
def saved(training: Any) -> str:
    return training.save_state("kept").result().path


def datum(tokens: tuple[int, ...] = (3, 4, 5, 6, 7)) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens[:-1])),
        loss_fn_inputs={
            "target_tokens": types.TensorData(
                data=list(tokens[1:]), dtype="int64", shape=[len(tokens) - 1]
            ),
            "weights": types.TensorData(
                data=[1.0] * (len(tokens) - 1), dtype="float32", shape=[len(tokens) - 1]
            ),
        },
    )


def test_101_training(tinker_service: tinker.ServiceClient) -> None:
    client = tinker_service.create_lora_training_client(base_model=MODEL, rank=8)
    losses: list[float] = []
    for _ in range(4):
        done = client.forward_backward([datum()], "cross_entropy")
        client.optim_step(ADAM)
        result = done.result()
        losses.append(-sum(result.loss_fn_outputs[0]["logprobs"].data))
    assert losses[-1] < losses[0]


def test_102_a_step_without_a_gradient(tinker_service: tinker.ServiceClient) -> None:
    client = tinker_service.create_lora_training_client(base_model=MODEL, rank=4)
    # No error, as Tinker has it: there was nothing to spend, and nothing moved.
    assert client.optim_step(ADAM).result().metrics == {"grad_norm:mean": 0.0}
    client.forward_backward([datum()], "cross_entropy").result()
    client.optim_step(ADAM).result()


def test_103_state_with_and_without_the_optimizer(training: Any, saved: str) -> None:
    before = training.forward([datum()], "cross_entropy").result()
    training.forward_backward([datum()], "cross_entropy").result()
    training.optim_step(ADAM).result()
    training.load_state_with_optimizer(saved).result()
    after = training.forward([datum()], "cross_entropy").result()
    first, second = (result.loss_fn_outputs[0]["logprobs"].data for result in (before, after))
    assert first == pytest.approx(second, abs=1e-5)
    # Either scheme names the same.
    training.load_state(saved.replace("tinker://", "twinkle://")).result()


def test_104_weights_become_a_sampler(training: Any) -> None:
    sampler = training.save_weights_and_get_sampling_client()
    result = sampler.sample(
        types.ModelInput.from_ints([3, 4, 5]),
        num_samples=2,
        sampling_params=types.SamplingParams(max_tokens=3, temperature=0.0),
    ).result()
    assert [len(one.tokens) for one in result.sequences] == [3, 3]
    assert result.sequences[0].tokens == result.sequences[1].tokens  # greedy is greedy


def test_105_a_sampler_of_a_twinkle_address(
    tinker_service: tinker.ServiceClient, training: Any
) -> None:
    path = training.save_weights_for_sampler("for-sampling").result().path
    address = "twinkle://" + path.partition("://")[2]
    sampler = tinker_service.create_sampling_client(model_path=address)
    result = sampler.sample(
        types.ModelInput.from_ints([3, 4, 5]),
        num_samples=1,
        sampling_params=types.SamplingParams(max_tokens=4, seed=1),
    ).result()
    assert len(result.sequences[0].tokens) == 4


def test_105_a_sampler_of_nothing(tinker_service: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.NotFoundError):
        tinker_service.create_sampling_client(model_path="twinkle://run/sampler_weights/none")


def test_106_a_poll_that_is_not_ready_says_so(
    service: LocalService, tinker_service: tinker.ServiceClient
) -> None:
    """An unknown request is an error at once; what waits answers 408 with its reason."""
    training: Any = tinker_service.create_lora_training_client(base_model=MODEL, rank=4)
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{service.url}/api/v1/retrieve_future"
    unknown = requests.post(url, json={"request_id": "req_none"}, headers=headers)
    assert unknown.status_code == 404
    submit = requests.post(
        f"{service.url}/api/v1/optim_step",
        # Far ahead in the run's order, so it waits for those before it.
        json={
            "model_id": training.model_id,
            "seq_id": training._request_id_counter + 3,
            "adam_params": {"learning_rate": 0.0},
        },
        headers=headers,
    ).json()
    answer = requests.post(url, json={"request_id": submit["request_id"]}, headers=headers)
    assert answer.status_code in {200, 408}
    if answer.status_code == 408:
        assert answer.json()["type"] == "try_again"


def test_107_lists_and_deletion(
    tinker_service: tinker.ServiceClient, training: Any, services: Callable[..., Any]
) -> None:
    path = training.save_state("to-go").result().path
    rest = tinker_service.create_rest_client()
    runs = rest.list_training_runs().result()
    assert training.model_id in [run.training_run_id for run in runs.training_runs]
    run = training.model_id
    names = [one.checkpoint_id for one in rest.list_checkpoints(run).result().checkpoints]
    assert "weights/to-go" in names
    rest.delete_checkpoint_from_tinker_path("twinkle://" + path.partition("://")[2]).result()
    names = [one.checkpoint_id for one in rest.list_checkpoints(run).result().checkpoints]
    assert "weights/to-go" not in names
    others = services(OTHER_KEY).create_rest_client()
    with pytest.raises(tinker.NotFoundError):
        others.list_checkpoints(run).result()


def test_108_each_client_sees_what_the_other_made(
    service: LocalService, tinker_service: tinker.ServiceClient, training: Any, saved: str
) -> None:
    twinkle = init_twinkle_client(base_url=service.url, api_key=KEY)
    try:
        found = twinkle.list_checkpoints(training.model_id)
        assert "weights/kept" in [one.checkpoint_id for one in found]
        (address,) = [one.twinkle_path for one in found if one.checkpoint_id == "weights/kept"]
        assert address == "twinkle://" + saved.partition("://")[2]
        assert twinkle.get_weights_info(saved).training_run_id == training.model_id
        model = trained(MultiLoraTransformersModel(MODEL), "theirs")
        kept = model.save("mine", save_optimizer=True)
        run, _, name = kept.twinkle_path.removeprefix("twinkle://").split("/")
        rest = tinker_service.create_rest_client()
        ids = [one.checkpoint_id for one in rest.list_checkpoints(run).result().checkpoints]
        assert ids == [f"weights/{name}"]
        info = rest.get_weights_info_by_tinker_path(kept.twinkle_path).result()
        assert (info.base_model, info.lora_rank) == (MODEL, 4)
        sampler = model.save("mine", is_sampler=True)
        tinker_service.create_sampling_client(model_path=sampler.twinkle_path).sample(
            types.ModelInput.from_ints([3, 4]),
            num_samples=1,
            sampling_params=types.SamplingParams(max_tokens=2),
        ).result()
    finally:
        twinkle.close()


def test_108_one_adapters_checkpoints_in_both_clients_at_once(
    client: TwinkleClient, tinker_service: tinker.ServiceClient
) -> None:
    """A Tinker run goes on from what a Twinkle adapter saved, and samples the same."""
    # The scale of Tinker's adapters: this SDK cannot ask for another one.
    model = trained(MultiLoraTransformersModel(MODEL), "shared", steps=3, alpha=32)
    theirs = model.forward_only(inputs=[{"input_ids": [3, 4, 5, 6], "labels": [4, 5, 6, -100]}])
    kept = model.save("both", save_optimizer=True)
    run = tinker_service.create_training_client_from_state(kept.twinkle_path)
    ours = run.forward([datum((3, 4, 5, 6))], "cross_entropy").result()
    assert ours.loss_fn_outputs[0]["logprobs"].data == pytest.approx(
        theirs.result["logps"][0][:3], abs=1e-4
    )


def test_109_an_unsupported_model(tinker_service: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.BadRequestError, match=MODEL):
        tinker_service.create_lora_training_client(base_model="acme/unknown", rank=4)


def test_110_full_training_is_refused_in_words(tinker_service: Any) -> None:
    with pytest.raises(tinker.BadRequestError, match="LoRA"):
        tinker_service.create_full_training_client(base_model=MODEL)


def test_a_key_needs_no_prefix(services: Callable[..., Any]) -> None:
    assert "TINKER_API_KEY" not in os.environ
    client = services(PLAIN_KEY)
    assert client.get_server_capabilities().supported_models[0].model_name == MODEL
