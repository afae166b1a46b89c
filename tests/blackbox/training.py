"""Runs and steps that tests of training begin with."""

import tinker
from tinker import types

from tests.blackbox.conftest import MODEL
from tests.blackbox.data import batch, train_one_step

STEP = types.AdamParams(learning_rate=1e-2)

# AdamW with this step is gradient descent: it moves by g / (|g| + eps) * eps, which is g.
DESCENT = types.AdamParams(learning_rate=1e8, beta1=0.0, beta2=0.0, eps=1e8)


def new_run(client: tinker.ServiceClient, seed: int = 1) -> tinker.TrainingClient:
    return client.create_lora_training_client(MODEL, rank=4, seed=seed).result()


def spent(run: tinker.TrainingClient) -> float:
    """The norm of the gradient that the run had accumulated."""
    metrics = run.optim_step(STEP).result().metrics
    assert metrics is not None
    return metrics["grad_norm:mean"]


def trained_checkpoint(client: tinker.ServiceClient) -> str:
    """An adapter that says something in every module: no B is zero any more."""
    run = new_run(client)
    for seed in range(3):
        train_one_step(run, batch(seed=seed), lr=2e-2)
    return run.save_state("trained").result().path
