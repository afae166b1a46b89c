"""Samples beside other work: they disturb nobody, and nobody disturbs them."""

from collections.abc import Generator
from typing import Any

import pytest
import tinker

from tests.blackbox.conftest import KEY, MODEL
from tests.blackbox.data import batch, datum, random_tokens, train_one_step
from tests.blackbox.sampling import sample, tokens_of
from twinkle_dask import LocalService


@pytest.fixture(scope="module")
def shared(service: LocalService) -> Generator[tinker.ServiceClient]:
    """One session for the module; a test that ends its session takes ``client``."""
    with tinker.ServiceClient(base_url=service.url, api_key=KEY) as connected:
        yield connected


@pytest.fixture(scope="module")
def base(shared: tinker.ServiceClient) -> tinker.SamplingClient:
    """A sampler of the untouched model."""
    return shared.create_sampling_client(base_model=MODEL).result()


# ---- many at a time


def test_adapters_together_give_what_each_gives_alone(shared: tinker.ServiceClient) -> None:
    samplers = [shared.create_sampling_client(base_model=MODEL).result()]
    for seed in range(3):
        run = shared.create_lora_training_client(MODEL, rank=4 * (seed + 1), seed=seed).result()
        for _ in range(3):
            train_one_step(run, batch(seed=seed), lr=3e-2)
        samplers.append(run.save_weights_and_get_sampling_client().result())
    params: dict[str, Any] = {"max_tokens": 16, "stop": [], "seed": 2}
    alone = [tokens_of(sample(client, **params)) for client in samplers]
    assert len({str(tokens) for tokens in alone}) == len(samplers)
    together = [sample(client, **params) for client in samplers * 4]
    assert [tokens_of(future) for future in together] == alone * 4


def test_a_long_sample_lets_its_run_train_on(shared: tinker.ServiceClient) -> None:
    run = shared.create_lora_training_client(MODEL, rank=8).result()
    train_one_step(run, batch())
    sampler = run.save_weights_and_get_sampling_client().result()
    params: dict[str, Any] = {"seed": 4, "stop": []}
    before = tokens_of(sample(sampler, max_tokens=20, **params))
    long = sample(sampler, max_tokens=1000, **params)
    train_one_step(run, batch())
    assert not long.future().done()
    # The sampler holds the weights as they were.
    assert tokens_of(long)[0][:20] == before[0]
    newer = run.save_weights_and_get_sampling_client().result()
    assert tokens_of(sample(newer, max_tokens=20, **params)) != before
    assert tokens_of(sample(sampler, max_tokens=20, **params)) == before


def test_long_training_lets_samples_through(
    shared: tinker.ServiceClient, base: tinker.SamplingClient
) -> None:
    run = shared.create_lora_training_client(MODEL, rank=8).result()
    work = [datum(random_tokens(513, seed=i)) for i in range(4)]
    training = [run.forward_backward(work, "cross_entropy") for _ in range(12)]
    training[0].result()
    sample(base, max_tokens=4).result()
    with pytest.raises(TimeoutError):
        training[-1].result(timeout=0)
    training[-1].result()
