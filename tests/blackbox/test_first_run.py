"""The whole way once: train, sample, save, resume."""

import tinker
from tinker import types

from tests.blackbox.conftest import MODEL
from tests.blackbox.data import batch, train_one_step


def test_a_run_from_creation_to_resumption(client: tinker.ServiceClient) -> None:
    run = client.create_lora_training_client(MODEL, rank=8, seed=1).result()
    data = batch(num=3)
    losses = [train_one_step(run, data) for _ in range(5)]
    assert losses[-1] < losses[0] * 0.9

    saved = run.save_state("ck").result()
    assert saved.path == f"tinker://{run.model_id}/weights/ck"
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(data[0].model_input.to_ints()[:4])
    params = types.SamplingParams(max_tokens=5, temperature=0)
    first = sampler.sample(prompt, num_samples=1, sampling_params=params).result()
    again = sampler.sample(prompt, num_samples=1, sampling_params=params).result()
    assert first.sequences[0].tokens == again.sequences[0].tokens

    resumed = client.create_training_client_from_state_with_optimizer(saved.path).result()
    assert train_one_step(resumed, data) == train_one_step(run, data)
