"""Submitting work and taking what comes out, in a line or two."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import TypeVar

import numpy as np

from twinkle_dask.errors import TwinkleDaskError
from twinkle_dask.losses import LOSSES, loss_spec
from twinkle_dask.trainer.engine import Trainer
from twinkle_dask.trainer.work import CreateRun, ExportState, Outcome, Work, WorkBody
from twinkle_dask.types import (
    AdamParams,
    Datum,
    Float32Array,
    ForwardBackward,
    ForwardBackwardResult,
    LoraSpec,
    OptimStep,
    RunId,
    RunState,
    StepResult,
    TenantId,
)

O = TypeVar("O")  # noqa: E741 - an outcome's type

VOCAB = 512
ADAM = AdamParams(learning_rate=1e-2, eps=1e-8)


class Driver:
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.outcomes: dict[str, Outcome] = {}
        self._ids = count()

    def submit(self, run: str, body: WorkBody, tenant: str = "tenant") -> str:
        work_id = f"{run}:{next(self._ids)}"
        self.trainer.submit(Work(id=work_id, run=RunId(run), tenant=TenantId(tenant), body=body))
        return work_id

    def drain(self) -> dict[str, Outcome]:
        """Step until nothing is left to do; everything that ever came out."""
        while self.trainer.busy:
            for completion in self.trainer.step():
                assert completion.id not in self.outcomes
                self.outcomes[completion.id] = completion.outcome
        return self.outcomes

    def do(self, run: str, body: WorkBody) -> Outcome:
        work_id = self.submit(run, body)
        return self.drain()[work_id]

    def create(self, run: str, spec: LoraSpec) -> None:
        assert self.do(run, CreateRun(spec=spec)) is None

    def forward_backward(self, run: str, body: ForwardBackward) -> ForwardBackwardResult:
        return expect(self.do(run, body), ForwardBackwardResult)

    def step(self, run: str, adam: AdamParams = ADAM) -> Mapping[str, float]:
        return expect(self.do(run, OptimStep(adam=adam)), StepResult).metrics

    def state(self, run: str) -> RunState:
        return expect(self.do(run, ExportState(gradients=True, optimizer=True)), RunState)


def expect(outcome: Outcome, kind: type[O]) -> O:
    if isinstance(outcome, TwinkleDaskError):
        raise outcome
    assert isinstance(outcome, kind)
    return outcome


def batch(
    rng: np.random.Generator,
    lengths: Sequence[int] = (5, 17, 9),
    loss: str = "cross_entropy",
    targets: int | None = None,
    *,
    backward: bool = True,
) -> ForwardBackward:
    """Random data; weights are negative, zero and fractional, and half the prompt has none."""
    data: list[Datum] = []
    for length in lengths:
        shape = (length,) if targets is None else (length, targets)
        weights = rng.normal(size=shape).astype(np.float32)
        weights[: length // 2] = 0.0
        inputs: dict[str, Float32Array] = {"weights": weights}
        if "advantages" in LOSSES[loss_spec(loss, {}).name].required:
            # Around log(1 / VOCAB), so that ratios fall on both sides of every bound.
            inputs["logprobs"] = rng.normal(-np.log(VOCAB), 0.4, shape).astype(np.float32)
            inputs["advantages"] = rng.normal(size=shape).astype(np.float32)
        data.append(
            Datum(
                tokens=rng.integers(0, VOCAB, length).astype(np.int32),
                target_tokens=rng.integers(0, VOCAB, shape),
                loss_inputs=inputs,
            )
        )
    return ForwardBackward(data=tuple(data), loss=loss_spec(loss, {}), backward=backward)
