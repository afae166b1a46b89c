"""The same service on a Dask cluster that somebody else runs."""

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.blackbox.conftest import MODEL
from tests.blackbox.data import batch, logprobs, train_one_step
from tests.blackbox.servers import a_cluster, family, free_port, serve
from tests.blackbox.servers import run as run_command

pytestmark = pytest.mark.timeout(180)

KEY = "tml-on-a-cluster"


@pytest.fixture
def scheduler(tmp_path: Path) -> Generator[str]:
    """A scheduler and two workers, as an operator starts them."""
    with a_cluster(tmp_path) as address:
        yield address


def test_the_whole_way_and_a_gateway_that_comes_back(
    scheduler: str, model_folder: Path, tmp_path: Path
) -> None:
    """A trainer and a sampler on two workers; they outlive a killed gateway."""
    port = free_port()
    options = ["--model", f"{MODEL}={model_folder}", "--dtype", "float32", "--api-key", KEY]
    options += ["--data-dir", str(tmp_path / "data"), "--scheduler", scheduler]
    options += ["--port", str(port)]
    data = batch(num=3)
    log = tmp_path / "log"
    with serve(*options, log=log) as server:
        assert len(family(server.pid)) == 1
        client = tinker.ServiceClient(base_url=server.url, api_key=KEY)
        run = client.create_lora_training_client(MODEL, rank=8, seed=1).result()
        losses = [train_one_step(run, data) for _ in range(3)]
        assert losses[2] < losses[0]
        # Weights go from the trainer's host to the sampler's.
        sampler = run.save_weights_and_get_sampling_client().result()
        tokens = data[0].model_input.to_ints()
        scored = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
        forward = run.forward(data, "cross_entropy").result()
        assert scored[1:] == pytest.approx(logprobs(forward)[0][:-1].tolist(), abs=1e-4)
        saved = run.save_state("ck").result().path
        os.kill(server.pid, signal.SIGKILL)
        server.process.wait(10)
    with serve(*options, log=log) as server:
        again = run.forward(data, "cross_entropy").result()
        assert logprobs(again)[0] == pytest.approx(logprobs(forward)[0], abs=1e-5)
        resumed = client.create_training_client_from_state_with_optimizer(saved).result()
        assert train_one_step(resumed, data) == pytest.approx(train_one_step(run, data), rel=1e-5)
        client.close("success")
    # The hosts were loaded once each, and taken over by the second gateway.
    loads = "".join((tmp_path / f"worker-{name}.log").read_text() for name in ("one", "two"))
    assert loads.count('"event": "Loaded') == 2


def test_a_scheduler_that_is_not_there_is_told(tmp_path: Path, model_folder: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    options = ["--model", f"{MODEL}={model_folder}", "--data-dir", str(tmp_path / "data")]
    ended = run_command("serve", "--port", "0", *options, "--scheduler", address, timeout_s=90)
    assert ended.returncode == 2
    assert address in ended.stderr
