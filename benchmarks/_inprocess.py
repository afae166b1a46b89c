"""The engines without HTTP, journal and Dask: what the service's numbers are held against."""

from collections.abc import Mapping, Sequence
from itertools import count

import numpy as np

from benchmarks._common import RANK, Options
from twinkle_dask.errors import TwinkleDaskError
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.loading import load_base
from twinkle_dask.trainer.engine import Trainer, TrainerConfig
from twinkle_dask.trainer.work import CreateRun, Outcome, Work, WorkBody
from twinkle_dask.types import (
    AdamParams,
    Datum,
    ForwardBackward,
    LoraSpec,
    LossName,
    LossSpec,
    OptimStep,
    RunId,
    TenantId,
)

Rows = Sequence[Sequence[int]]
_LEARNING_RATE = 1e-4


class Engine:
    """A trainer in this thread, whose runs belong to a tenant each."""

    def __init__(self, base: BaseModel, config: TrainerConfig | None = None) -> None:
        self.base = base
        self.trainer = Trainer(base, config or TrainerConfig())
        self._ids = count()

    @classmethod
    def load(cls, asked: Options, config: TrainerConfig | None = None) -> "Engine":
        """Over a copy of the base weights of its own."""
        return cls(load_base(asked.source, asked.dtype, max_rank=256), config)

    def create(self, ranks: Sequence[int]) -> list[RunId]:
        """New runs of the SDK's defaults: attention, feed-forward and head are adapted."""
        runs = [RunId(f"run-{next(self._ids)}") for _ in ranks]
        for run, rank in zip(runs, ranks, strict=True):
            self.submit(run, CreateRun(spec=LoraSpec(rank=rank, seed=1)))
        self.drain()
        return runs

    def submit(self, run: RunId, body: WorkBody) -> str:
        """Queue work; returns its id."""
        work_id = f"{run}:{next(self._ids)}"
        tenant = TenantId(f"tenant of {run}")
        self.trainer.submit(Work(id=work_id, run=run, tenant=tenant, body=body))
        return work_id

    def drain(self) -> dict[str, Outcome]:
        """Work until nothing is left to do; outcomes by work id.

        Raises:
            TwinkleDaskError: A work failed.
        """
        outcomes: dict[str, Outcome] = {}
        while self.trainer.busy:
            for done in self.trainer.step():
                if isinstance(done.outcome, TwinkleDaskError):
                    raise done.outcome
                outcomes[done.id] = done.outcome
        return outcomes

    def forward_backward(
        self, batches: Mapping[RunId, ForwardBackward], learning_rate: float | None
    ) -> None:
        """Every run's batch, and its optimizer step too if there is a learning rate."""
        for run, batch in batches.items():
            self.submit(run, batch)
            if learning_rate is not None:
                self.submit(run, adam_step(learning_rate))
        self.drain()


class Training:
    """New runs on an engine, each with a batch that it is trained on over and over.

    Attributes:
        tokens: Of one step of all runs.
    """

    def __init__(self, engine: Engine, ranks: Sequence[int], batches: Sequence[Rows]) -> None:
        self.tokens = sum(map(num_tokens, batches))
        self._engine = engine
        self._batches = {
            run: cross_entropy(rows)
            for run, rows in zip(engine.create(ranks), batches, strict=True)
        }

    def step(self) -> None:
        """A forward_backward and an optimizer step of every run, all of them queued at once."""
        self._engine.forward_backward(self._batches, _LEARNING_RATE)

    def forward_backward(self) -> None:
        """The first half alone."""
        self._engine.forward_backward(self._batches, learning_rate=None)

    def optim(self) -> None:
        """The second half alone."""
        for run in self._batches:
            self._engine.submit(run, adam_step(_LEARNING_RATE))
        self._engine.drain()


class InProcess:
    """One run on a trainer in this thread."""

    def __init__(self, asked: Options) -> None:
        self._engine = Engine.load(asked)
        (self._run,) = self._engine.create([RANK])

    def pair(self, rows: Rows, learning_rate: float) -> None:
        """A forward_backward on rows of tokens, and an optimizer step."""
        self._engine.forward_backward({self._run: cross_entropy(rows)}, learning_rate)

    def forward(self, rows: Rows) -> None:
        """A forward alone."""
        batch = cross_entropy(rows, backward=False)
        self._engine.forward_backward({self._run: batch}, learning_rate=None)


def cross_entropy(rows: Rows, *, backward: bool = True) -> ForwardBackward:
    """Next-token cross entropy, summed over rows of tokens."""
    loss = LossSpec(name=LossName.CROSS_ENTROPY)
    return ForwardBackward(data=tuple(map(_datum, rows)), loss=loss, backward=backward)


def num_tokens(rows: Rows) -> int:
    """Input tokens: the last of each row is only predicted."""
    return sum(len(row) - 1 for row in rows)


def adam_step(learning_rate: float) -> OptimStep:
    """The optimizer step that goes with it."""
    return OptimStep(adam=AdamParams(learning_rate=learning_rate))


def _datum(tokens: Sequence[int]) -> Datum:
    length = len(tokens) - 1
    return Datum(
        tokens=np.asarray(tokens[:-1], np.int32),
        target_tokens=np.asarray(tokens[1:], np.int64),
        loss_inputs={"weights": np.ones(length, np.float32)},
    )
