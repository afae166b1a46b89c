"""Nothing acknowledged is lost, whatever is killed; and nothing is done twice."""

import os
import signal
from pathlib import Path

import psutil
import pytest
import tinker
from tinker import types

from tests.blackbox.conftest import KEY, MODEL
from tests.blackbox.data import batch, logprobs
from tests.blackbox.servers import free_port, serve
from twinkle_dask import local_service

# A start with model loading, twice, on two busy cores.
pytestmark = pytest.mark.timeout(180)

STEPS = 6


def losses_of(run: tinker.TrainingClient, steps: int) -> list[float]:
    """Pipelined steps; every one's loss depends on all before it."""
    pending: list[tinker.APIFuture[types.ForwardBackwardOutput]] = []
    for i in range(steps):
        pending.append(run.forward_backward(batch(seed=i), "cross_entropy"))
        run.optim_step(types.AdamParams(learning_rate=1e-2))
    return [future.result().metrics["loss:sum"] for future in pending]


def workers_of(pid: int) -> list[psutil.Process]:
    """The processes that carry hosts: those that hold most memory."""
    children = psutil.Process(pid).children(recursive=True)
    return sorted(children, key=lambda child: child.memory_info().rss)[-1:]


def test_a_killed_worker_costs_time_but_no_work(model_folder: Path, tmp_path: Path) -> None:
    with (
        local_service(
            {MODEL: str(model_folder)},
            dtype="float32",
            data_dir=tmp_path,
            journal={"snapshot_operations": 3},
        ) as service,
        tinker.ServiceClient(base_url=service.url, api_key=service.api_key) as client,
    ):
        undisturbed = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
        expected = losses_of(undisturbed, STEPS)
        run = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
        first = losses_of(run, STEPS // 2)
        probe = batch(seed=99)
        before = run.forward(probe, "cross_entropy")
        sampler = run.save_weights_and_get_sampling_client().result()
        prompt = types.ModelInput.from_ints([20, 21, 22])
        params = types.SamplingParams(max_tokens=200, temperature=1.0, seed=5, stop=[])
        sample = sampler.sample(prompt, num_samples=2, sampling_params=params)
        for worker in workers_of(service.pid):
            worker.kill()
        rest = [
            run.forward_backward(batch(seed=i), "cross_entropy") for i in range(STEPS // 2, STEPS)
        ]
        assert logprobs(before.result())[0].shape == (11,)
        assert first == pytest.approx(expected[: STEPS // 2], rel=1e-6)
        # Gradients of the rest accumulate in both runs alike; only the first loss is comparable.
        assert rest[0].result().metrics["loss:sum"] == pytest.approx(expected[STEPS // 2], rel=1e-5)
        tokens = [sequence.tokens for sequence in sample.result().sequences]
        again = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
        assert [sequence.tokens for sequence in again.sequences] == tokens


def test_a_killed_server_goes_on_where_it_was(model_folder: Path, tmp_path: Path) -> None:
    port = free_port()
    options = ["--model", f"{MODEL}={model_folder}", "--port", str(port), "--dtype", "float32"]
    options += ["--data-dir", str(tmp_path), "--api-key", KEY]
    with serve(*options, log=tmp_path / "log") as first:
        client = tinker.ServiceClient(base_url=f"http://127.0.0.1:{port}", api_key=KEY)
        undisturbed = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
        expected = losses_of(undisturbed, 4)
        run = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
        assert losses_of(run, 2) == pytest.approx(expected[:2], rel=1e-6)
        # Acknowledged, gradient accumulated, not yet spent.
        third = run.forward_backward(batch(seed=2), "cross_entropy")
        third.result()
        os.kill(first.pid, signal.SIGKILL)
        first.process.wait(10)
    with serve(*options, log=tmp_path / "log"):
        run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        fourth = run.forward_backward(batch(seed=3), "cross_entropy").result()
        assert fourth.metrics["loss:sum"] == pytest.approx(expected[3], rel=1e-5)
        client.close("success")


def test_a_frozen_worker_is_replaced(model_folder: Path) -> None:
    """Its connections stay open and nothing comes back; only the probe can tell."""
    with (
        local_service({MODEL: str(model_folder)}, dtype="float32") as service,
        tinker.ServiceClient(base_url=service.url, api_key=service.api_key) as client,
    ):
        twin = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
        losses_of(twin, 2)
        expected = twin.forward_backward(batch(seed=2), "cross_entropy").result()
        run = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
        losses_of(run, 2)
        saving = run.save_state("while-frozen")
        for worker in workers_of(service.pid):
            worker.suspend()
        rest = run.forward_backward(batch(seed=2), "cross_entropy")
        assert saving.result().path.endswith("/weights/while-frozen")
        assert rest.result().metrics["loss:sum"] == pytest.approx(
            expected.metrics["loss:sum"], rel=1e-5
        )
