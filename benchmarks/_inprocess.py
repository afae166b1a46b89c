"""The engines without HTTP, journal and Dask: what the service's numbers are held against."""

from collections.abc import Sequence

import numpy as np

from benchmarks._common import RANK, Options
from twinkle_dask.errors import TwinkleDaskError
from twinkle_dask.model.loading import load_base
from twinkle_dask.trainer.engine import Trainer, TrainerConfig
from twinkle_dask.trainer.work import CreateRun, Work, WorkBody
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


class InProcess:
    """One run on a trainer in this thread."""

    def __init__(self, asked: Options) -> None:
        base = load_base(asked.source, asked.dtype, max_rank=256)
        self._trainer = Trainer(base, TrainerConfig())
        self._do(CreateRun(spec=LoraSpec(rank=RANK, seed=1)))

    def pair(self, rows: Sequence[Sequence[int]], learning_rate: float) -> None:
        """A forward_backward on rows of tokens, and an optimizer step."""
        self._do(_batch(rows, backward=True))
        self._do(OptimStep(adam=AdamParams(learning_rate=learning_rate)))

    def forward(self, rows: Sequence[Sequence[int]]) -> None:
        """A forward alone."""
        self._do(_batch(rows, backward=False))

    def _do(self, body: WorkBody) -> None:
        self._trainer.submit(Work(id="", run=RunId("run"), tenant=TenantId("tenant"), body=body))
        while True:
            for done in self._trainer.step():
                if isinstance(done.outcome, TwinkleDaskError):
                    raise done.outcome
                return


def _batch(rows: Sequence[Sequence[int]], *, backward: bool) -> ForwardBackward:
    loss = LossSpec(name=LossName.CROSS_ENTROPY)
    return ForwardBackward(data=tuple(map(_datum, rows)), loss=loss, backward=backward)


def _datum(tokens: Sequence[int]) -> Datum:
    length = len(tokens) - 1
    return Datum(
        tokens=np.asarray(tokens[:-1], np.int32),
        target_tokens=np.asarray(tokens[1:], np.int64),
        loss_inputs={"weights": np.ones(length, np.float32)},
    )
