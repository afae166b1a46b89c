"""The service's numbers against plain PyTorch, transformers and PEFT, all in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tinker
import torch
from tinker import types

from tests.blackbox import plain
from tests.blackbox.conftest import MODEL
from tests.blackbox.data import batch, datum, logprobs, random_tokens, train_one_step
from tests.blackbox.saved import arrays, folder_of, identical
from twinkle_dask import LocalService

peft_model: Any = peft.PeftModel


@pytest.fixture
def trained(client: tinker.ServiceClient) -> str:
    """A checkpoint whose adapter says something in every module: no B is zero any more."""
    run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
    for seed in range(3):
        train_one_step(run, batch(seed=seed), lr=2e-2)
    return run.save_state("trained").result().path


def test_saved_and_resumed_equals_never_stopped(
    client: tinker.ServiceClient, service: LocalService
) -> None:
    """Weights and moments, bit for bit."""
    straight = client.create_lora_training_client(MODEL, rank=4, seed=3).result()
    for seed in range(2):
        train_one_step(straight, batch(seed=seed))
    path = straight.save_state("middle").result().path
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    ends: list[Path] = []
    for run in (straight, resumed):
        for seed in range(2, 5):
            train_one_step(run, batch(seed=seed))
        ends.append(folder_of(service, run.save_state("end").result().path))
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        first, second = (arrays(end / file) for end in ends)
        assert identical(first, second), file


def test_sampler_and_trainer_agree(client: tinker.ServiceClient, trained: str) -> None:
    run = client.create_training_client_from_state(trained).result()
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = random_tokens(15, seed=5)
    params = types.SamplingParams(max_tokens=30, temperature=1.0, seed=1, stop=[])
    drawn = sampler.sample(types.ModelInput.from_ints(prompt), 3, params).result()
    for sequence in drawn.sequences:
        assert sequence.logprobs is not None
        assert len(sequence.tokens) == len(sequence.logprobs) == 30
        whole = prompt + list(sequence.tokens)
        (lp,) = logprobs(run.forward([datum(whole)], "cross_entropy").result())
        np.testing.assert_allclose(sequence.logprobs, lp[len(prompt) - 1 :], atol=1e-4)
        scored = sampler.compute_logprobs(types.ModelInput.from_ints(whole)).result()
        assert scored[0] is None
        np.testing.assert_allclose(np.asarray(scored[1:], np.float32), lp, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
def test_a_checkpoint_is_a_peft_adapter(
    client: tinker.ServiceClient,
    service: LocalService,
    model_folder: Path,
    trained: str,
    kind: str,
) -> None:
    run = client.create_training_client_from_state(trained).result()
    save = run.save_state if kind == "weights" else run.save_weights_for_sampler
    folder = folder_of(service, save("peft").result().path)
    base = plain.load(model_folder)
    adapted = peft_model.from_pretrained(base, str(folder)).eval()
    modules = {name for name, _ in adapted.named_modules() if name.endswith(".lora_A.default")}
    assert len(modules) == 4 * 7 + 1  # layers x projections, and the head
    data = batch(num=3, length=40, seed=4)
    ours = logprobs(run.forward(data, "cross_entropy").result())
    for one, lp in zip(data, ours, strict=True):
        with torch.no_grad():
            logits = adapted(torch.tensor(one.model_input.to_ints())[None]).logits[0]
        theirs = torch.log_softmax(logits, -1).gather(
            1, plain.tensor(one, "target_tokens")[:, None]
        )
        np.testing.assert_allclose(lp, theirs[:, 0].numpy(), rtol=1e-5, atol=1e-5)
