"""A base model that the trainer knows and the sampler does not: one with linear attention."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinker

from tests.blackbox.data import datum, random_tokens, train_one_step
from tests.blackbox.servers import run
from tests.models import tiny_family
from twinkle_dask import local_service

MODEL = "tiny/qwen3.5"
DATA = [datum(random_tokens(length, seed=length, vocab_size=512)) for length in (20, 7)]

pytestmark = pytest.mark.timeout(120)  # starts with model loading on busy cores


@pytest.fixture(scope="module")
def linear_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_family(tmp_path_factory.mktemp("qwen3_5") / "model", "qwen3_5")


def test_it_is_trained_and_every_way_to_sample_it_is_refused(
    linear_model: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with (
        local_service({MODEL: str(linear_model)}, dtype="float32", log_file=log) as service,
        tinker.ServiceClient(base_url=service.url, api_key=service.api_key) as client,
    ):
        rest = tinker.RestClient(base_url=service.url, api_key=service.api_key)
        (model,) = rest.get_server_capabilities().result().supported_models
        assert (model.model_name, model.trainable, model.sampleable) == (MODEL, True, False)

        training = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        first, second = (train_one_step(training, DATA) for _ in range(2))
        assert second < first
        path = training.save_state("two").result().path
        again = client.create_training_client_from_state_with_optimizer(path).result()
        assert train_one_step(again, DATA) == train_one_step(training, DATA)

        # Weights for a sampler elsewhere may be saved.
        weights = training.save_weights_for_sampler("weights").result().path
        asks: tuple[Callable[[], Any], ...] = (
            lambda: client.create_sampling_client(base_model=MODEL).result(),
            lambda: client.create_sampling_client(model_path=weights).result(),
            lambda: training.save_weights_and_get_sampling_client().result(),
        )
        for ask in asks:
            with pytest.raises(tinker.BadRequestError, match=rf"{MODEL}.*not sampled yet") as no:
                ask()
            assert "it keeps more than keys and values between tokens" in str(no.value)
        train_one_step(training, DATA)
    assert "trained and not sampled" in log.read_text()


def test_a_host_that_would_only_sample_it_does_not_start(
    linear_model: Path, tmp_path: Path
) -> None:
    model = {"source": str(linear_model), "trainers": 1, "samplers": 1}
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps({"models": {MODEL: model}, "data_dir": str(tmp_path / "data"), "port": 0})
    )
    ended = run("serve", "--config", str(config))
    assert ended.returncode != 0
    assert "cannot be sampled with the torch engine" in ended.stderr.splitlines()[-1]
