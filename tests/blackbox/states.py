"""Runs whose adapters say something, what samplers say, and what is known of checkpoints."""

import sqlite3
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import tinker
from tinker import types

from tests.blackbox.conftest import MODEL
from tests.blackbox.data import batch, train_one_step
from twinkle_dask import LocalService

PROMPT = types.ModelInput.from_ints([20, 21, 22, 23])
GREEDY = types.SamplingParams(max_tokens=12, temperature=0, stop=[])
HOUR = 3600
DECADE = 10 * 365 * 86400


def a_run(client: tinker.ServiceClient) -> tinker.TrainingClient:
    """Trained a little, so that its adapter says something."""
    run = client.create_lora_training_client(
        MODEL, rank=4, seed=1, train_unembed=False, user_metadata={"renderer_name": "plain"}
    ).result()
    train_one_step(run, batch(), lr=3e-2)
    return run


def train_on(run: tinker.TrainingClient) -> None:
    """Away from where it is, and from what it says."""
    for seed in range(3):
        train_one_step(run, batch(seed=seed), lr=5e-2)


@dataclass(frozen=True)
class Drawn:
    """What a sampler says to the prompt; equal within rounding, far less than adapters differ."""

    tokens: Sequence[int]
    logprobs: Sequence[float]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Drawn)
            and self.tokens == other.tokens
            and np.allclose(self.logprobs, other.logprobs, atol=1e-4)
        )


def drawn(sampler: tinker.SamplingClient) -> Drawn:
    (sequence,) = sampler.sample(PROMPT, 1, GREEDY).result().sequences
    assert sequence.logprobs is not None
    return Drawn(list(sequence.tokens), list(sequence.logprobs))


def load(run: tinker.TrainingClient, path: str, *, with_optimizer: bool = False) -> str | None:
    """The old way of loading, into a run that exists; the SDK warns that it will go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if with_optimizer:
            return run.load_state_with_optimizer(path).result().path  # pyright: ignore[reportDeprecated]
        return run.load_state(path).result().path  # pyright: ignore[reportDeprecated]


def known(rest: tinker.RestClient, run: str) -> dict[str, types.Checkpoint]:
    """A run's checkpoints by their id."""
    listed = rest.list_checkpoints(run).result().checkpoints
    return {checkpoint.checkpoint_id: checkpoint for checkpoint in listed}


def expire(service: LocalService, path: str) -> None:
    """Let a checkpoint's time have come; the shortest lifetime to be had is an hour."""
    address = types.ParsedCheckpointTinkerPath.from_tinker_path(path)
    kind, name = address.checkpoint_id.split("/")
    change = "UPDATE checkpoints SET expires_at = ? WHERE run_id = ? AND kind = ? AND name = ?"
    at = "2001-01-01 00:00:00.000000"
    file = service.data_dir / "twinkle_dask.sqlite3"
    with closing(sqlite3.connect(file, timeout=20)) as database, database:
        changed = database.execute(change, (at, address.training_run_id, kind, name))
        assert changed.rowcount == 1
