"""Submitting work and taking what comes out, in a line or two."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from typing import TypeAlias, TypeVar

import numpy as np

from twinkle_dask.errors import TwinkleDaskError
from twinkle_dask.losses import LOSSES, loss_spec
from twinkle_dask.trainer.engine import Trainer
from twinkle_dask.trainer.work import CreateRun, ExportState, LoadState, Outcome, Work, WorkBody
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

Draw: TypeAlias = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
# Log-probabilities lie around log(1 / VOCAB), so that ratios fall on both sides of every bound.
_INPUTS: Mapping[str, Draw] = {
    "weights": lambda rng, shape: rng.normal(size=shape),
    # The last token is always in, since a ratio of no tokens is refused.
    "sequence_ratio_mask": lambda rng, shape: np.append(rng.integers(0, 2, shape[0] - 1), 1),
    "logprobs": lambda rng, shape: rng.normal(-np.log(VOCAB), 0.4, shape),
    "advantages": lambda rng, shape: rng.normal(size=shape),
    "clip_low_threshold": lambda rng, shape: rng.uniform(0.5, 0.9, shape),
    "clip_high_threshold": lambda rng, shape: rng.uniform(1.1, 1.5, shape),
}


class Driver:
    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.outcomes: dict[str, Outcome] = {}
        self._ids = count()
        self._saves: dict[str, Future[RunState]] = {}

    def submit(self, run: str, body: WorkBody, tenant: str = "tenant") -> str:
        work_id = f"{run}:{next(self._ids)}"
        self.trainer.submit(Work(id=work_id, run=RunId(run), tenant=TenantId(tenant), body=body))
        return work_id

    def save(self, run: str, tenant: str = "tenant") -> tuple[str, "Future[RunState]"]:
        """Export everything; the future has the state once the export came out."""
        work_id = self.submit(run, ExportState(gradients=True, optimizer=True), tenant)
        self._saves[work_id] = Future()
        return work_id, self._saves[work_id]

    def load(self, run: str, state: RunState, *, with_optimizer: bool = True) -> None:
        saved: Future[RunState] = Future()
        saved.set_result(state)
        assert self.do(run, LoadState(state=saved, with_optimizer=with_optimizer)) is None

    def take(self) -> list[str]:
        """One step; the ids of what ended, in order."""
        ended = self.trainer.step()
        for completion in ended:
            assert completion.id not in self.outcomes
            self.outcomes[completion.id] = completion.outcome
            if saved := self._saves.pop(completion.id, None):
                saved.set_result(expect(completion.outcome, RunState))
        return [completion.id for completion in ended]

    def drain(self) -> dict[str, Outcome]:
        """Step until nothing is left to do; everything that ever came out."""
        while self.trainer.busy:
            self.take()
        return self.outcomes

    def gradients(self, run: str) -> Mapping[str, Float32Array]:
        gradients = self.state(run).gradients
        assert gradients is not None
        return gradients

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
    """Random data; weights are negative, zero and fractional, and half the prompt has none.

    Every input that the loss can take is there, except that data at odd places leave out what is
    optional besides the weights.
    """
    data: list[Datum] = []
    terms = LOSSES[loss_spec(loss, {}).name]
    for place, length in enumerate(lengths):
        shape = (length,) if targets is None else (length, targets)
        inputs: dict[str, Float32Array] = {}
        optional = terms.optional if place % 2 == 0 else terms.optional & {"weights"}
        for name in sorted(terms.required | optional):
            inputs[name] = _INPUTS[name](rng, shape).astype(np.float32)
        if "weights" in inputs:
            inputs["weights"][: length // 2] = 0.0
        data.append(
            Datum(
                tokens=rng.integers(0, VOCAB, length).astype(np.int32),
                target_tokens=rng.integers(0, VOCAB, shape),
                loss_inputs=inputs,
            )
        )
    return ForwardBackward(data=tuple(data), loss=loss_spec(loss, {}), backward=backward)
