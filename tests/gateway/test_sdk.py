"""The unmodified SDK against the face, over a socket, with nothing behind it.

The service's own promises are tested with a real service elsewhere; this is about the wire.
"""

import asyncio
import gc
import threading
from collections.abc import Generator

import pytest
import tinker
import torch
from tinker import types

from tests.gateway.in_memory import KEY, MODEL, InMemoryService
from twinkle_dask_gateway.app import create_app
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.server import bind, serve_http

# The SDK leaves connections of its own open; they are collected below, before the next test.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")

PROMPT = types.ModelInput.from_ints([1, 2, 3])
GREEDY = types.SamplingParams(max_tokens=2, temperature=0.0)


@pytest.fixture(params=[False, True], ids=["plain", "zstd"])
def base_url(request: pytest.FixtureRequest) -> Generator[str]:
    """A server in a thread of its own, because the SDK blocks this one."""
    config = GatewayConfig(
        port=0, url_prefix="/prefix", compress_forward_backward=bool(request.param)
    )
    listening = threading.Event()
    port = 0
    ending: list[asyncio.Event] = []
    loops: list[asyncio.AbstractEventLoop] = []

    def started(at: int) -> None:
        nonlocal port
        port = at
        listening.set()

    async def serve() -> None:
        ending.append(asyncio.Event())
        loops.append(asyncio.get_running_loop())
        app = create_app(InMemoryService().service, config)
        await serve_http(app, config, bind(config), started=started, stop=ending[0])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert listening.wait(10)
        yield f"http://127.0.0.1:{port}/prefix/"
    finally:
        loops[0].call_soon_threadsafe(ending[0].set)
        thread.join(5)
        gc.collect()
        assert not thread.is_alive()


@pytest.fixture
def service(base_url: str) -> Generator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=base_url, api_key=KEY) as service:
        yield service


def datum() -> types.Datum:
    return types.Datum(
        model_input=PROMPT,
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=[2, 3, 4], dtype="int64", shape=[3]),
            "weights": types.TensorData(data=[0.0, 1.0, 1.0], dtype="float32", shape=[3]),
        },
    )


def test_a_whole_session(base_url: str, service: tinker.ServiceClient) -> None:
    records = tinker.RestClient(base_url=base_url, api_key=KEY)
    capabilities = records.get_server_capabilities().result()
    assert [model.model_name for model in capabilities.supported_models] == [MODEL]
    training = service.create_lora_training_client(base_model=MODEL, rank=8, seed=1).result()
    assert training.get_info().model_data.model_name == MODEL

    forward_backward = training.forward_backward([datum()] * 2500, "cross_entropy")
    step = training.optim_step(types.AdamParams(learning_rate=1e-3))
    output = forward_backward.result()
    assert len(output.loss_fn_outputs) == 2500
    assert output.loss_fn_outputs[-1]["logprobs"].tolist() == [-0.5] * 3
    assert output.metrics["loss:sum"] == 2500 * 1.5
    assert step.result().metrics == {"grad_norm:mean": 1.5}
    assert training.forward([datum()], "cross_entropy").result().metrics["loss:sum"] == 1.5

    saved = training.save_state("ck1").result()
    named = training.save_weights_for_sampler("s1").result()
    resumed = service.create_training_client_from_state_with_optimizer(saved.path).result()
    assert resumed.get_info().lora_rank == 8

    for sampler in (
        service.create_sampling_client(model_path=named.path),
        service.create_sampling_client(base_model=MODEL),
        training.save_weights_and_get_sampling_client(),
    ):
        drawn = sampler.result().sample(PROMPT, num_samples=2, sampling_params=GREEDY).result()
        assert [s.tokens for s in drawn.sequences] == [[7, 8], [7, 8]]
    scores = service.create_sampling_client(base_model=MODEL).result().compute_logprobs(PROMPT)
    assert scores.result() == [None, -1.0, -1.0]


def test_custom_losses_run_on_the_client(service: tinker.ServiceClient) -> None:
    training = service.create_lora_training_client(base_model=MODEL).result()

    def loss(
        data: list[types.Datum], logprobs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        return -torch.cat(logprobs).sum(), {"mine:sum": 1.0}

    output = training.forward_backward_custom([datum()], loss).result()
    assert output.metrics["mine:sum"] == 1.0
    assert output.metrics["loss:sum"] == 1.5


def test_mistakes_are_told_at_once(base_url: str, service: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.BadRequestError, match="nope"):
        service.create_lora_training_client(base_model="nope").result()
    with pytest.raises(tinker.NotFoundError):
        service.create_sampling_client(model_path="tinker://s:train:0/weights/none").result()
    with pytest.raises(tinker.AuthenticationError):
        tinker.RestClient(base_url=base_url, api_key="tml-wrong").list_sessions().result()


def test_records(base_url: str, service: tinker.ServiceClient) -> None:
    training = service.create_lora_training_client(
        base_model=MODEL, user_metadata={"renderer_name": "r"}
    ).result()
    path = training.save_state("ck1").result().path
    records = tinker.RestClient(base_url=base_url, api_key=KEY)
    run = records.get_training_run_by_tinker_path(path).result()
    assert run.user_metadata == {"renderer_name": "r"}
    assert records.get_weights_info_by_tinker_path(path).result().base_model == MODEL
    assert records.list_training_runs().result().cursor.total_count == 1
    records.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    records.delete_checkpoint_from_tinker_path(path).result()
    assert records.list_user_checkpoints().result().checkpoints == []
