"""The trainer: work of many runs in, results out, one micro-batch at a time."""

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, assert_never

import torch

from twinkle_dask.errors import InvalidRequest, NotFound, ServiceFault, TwinkleDaskError
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.init import init_adapter
from twinkle_dask.trainer.batch import length_groups
from twinkle_dask.trainer.passes import run_pass
from twinkle_dask.trainer.progress import Progress
from twinkle_dask.trainer.queues import Pick, RunQueues
from twinkle_dask.trainer.run import Run
from twinkle_dask.trainer.work import (
    Completion,
    CreateRun,
    ExportState,
    LoadState,
    Outcome,
    Work,
)
from twinkle_dask.types import ForwardBackward, LoraSpec, OptimStep, RunId, RunState

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """How the trainer cuts its work.

    Attributes:
        tokens_per_micro_batch: Most tokens in one micro-batch; bounds activations, and how long
            anybody waits for a turn. A longer row goes alone.
        padding_tokens: What one more pass over the model costs, in tokens: rows of a micro-batch
            are spread over several passes when that saves more padding.
        head_chunk_bytes: Most bytes of logits at a time, in the base model's dtype.
        head_block_bytes: Most bytes of float32 logits at a time. None takes what fits into the
            cores' caches, 1.5 MB for each thread; on a GPU ``head_chunk_bytes``.
    """

    tokens_per_micro_batch: int = 2048
    padding_tokens: int = 128
    head_chunk_bytes: int = 48 * 2**20
    head_block_bytes: int | None = None


class Trainer:
    """Trains any number of runs over one base model. Used by one thread; has none of its own.

    Work is queued by ``submit`` and done by ``step``. Each run's work happens in the order of its
    submission; different runs share micro-batches (see ``queues``). A work that fails leaves its
    run as it was and everybody else alone.
    """

    def __init__(self, base: BaseModel, config: TrainerConfig) -> None:
        self._base = base
        self._config = config
        self._block_bytes = config.head_block_bytes or (
            config.head_chunk_bytes
            if base.device.type == "cuda"
            else 1536 * 1024 * torch.get_num_threads()
        )
        self._queues = RunQueues()
        self._runs: dict[RunId, Run] = {}
        self._progress: dict[str, Progress] = {}
        self._pass_is_due = False
        self.tokens_done = 0

    @property
    def busy(self) -> bool:
        """Whether ``step`` would do something now."""
        return self._queues.has_rows or any(work.ready for work in self._queues.barriers())

    def runs(self) -> tuple[RunId, ...]:
        """The runs that exist."""
        return tuple(self._runs)

    def submit(self, work: Work) -> None:
        """Queue work behind everything else of its run; its completion comes out of ``step``.

        Raises:
            ValueError: Work of this id is queued already.
        """
        self._queues.add(work)

    def cancel_run(self, run: RunId) -> tuple[str, ...]:
        """Forget a run's queued work; it gets no completion. The run itself stays.

        Returns:
            The ids of the forgotten work.
        """
        works = self._queues.cancel(run)
        for work in works:
            self._progress.pop(work.id, None)
        return tuple(work.id for work in works)

    def drop_run(self, run: RunId) -> tuple[str, ...]:
        """Free a run and forget its work as ``cancel_run`` does; an unknown run is no error."""
        self._runs.pop(run, None)
        return self.cancel_run(run)

    def step(self) -> list[Completion]:
        """Do one micro-batch, or the next work of each run where that is something else.

        The two alternate while there are both, so neither can hold up the other.

        Returns:
            What ended; empty also when there was nothing to do.
        """
        barriers = [work for work in self._queues.barriers() if work.ready]
        if barriers and not (self._pass_is_due and self._queues.has_rows):
            self._pass_is_due = True
            return [
                self._end(work.id, _attempt(work, partial(self._do, work))) for work in barriers
            ]
        self._pass_is_due = False
        return self._micro_batch()

    def _end(self, work_id: str, outcome: Outcome) -> Completion:
        self._progress.pop(work_id, None)
        self._queues.finish(work_id)
        return Completion(id=work_id, outcome=outcome)

    # Barriers.

    def _do(self, work: Work) -> Outcome:
        match work.body:
            case CreateRun():
                return self._create(work.run, work.body.spec)
            case LoadState():
                return self._load(work.run, work.body)
            case OptimStep():
                return self._existing(work.run).step(work.body.adam)
            case ExportState():
                run = self._existing(work.run)
                return run.export(gradients=work.body.gradients, optimizer=work.body.optimizer)
            case ForwardBackward():
                raise InvalidRequest("The batch is empty.")
            case _:
                assert_never(work.body)

    def _existing(self, name: RunId) -> Run:
        if name not in self._runs:
            raise NotFound(f"There is no run {name!r}.")
        return self._runs[name]

    def _create(self, name: RunId, spec: LoraSpec) -> None:
        if name in self._runs:
            raise InvalidRequest(f"There is a run {name!r} already.")
        if not 1 <= spec.rank <= self._base.facts.max_rank:
            limit = self._base.facts.max_rank
            raise InvalidRequest(f"The LoRA rank must be from 1 to {limit}, not {spec.rank}.")
        adapter = init_adapter(self._base.targets(spec), spec)
        self._runs[name] = Run(self._base, RunState(adapter=adapter), with_optimizer=False)

    def _load(self, name: RunId, body: LoadState) -> None:
        state = body.state.result()
        if name in self._runs:
            here, saved = self._runs[name].adapter.spec, state.adapter.spec
            if replace(here, seed=0) != replace(saved, seed=0):
                raise InvalidRequest(f"The saved adapter is {saved}, but the run's is {here}.")
        self._runs[name] = Run(self._base, state, with_optimizer=body.with_optimizer)

    # Passes.

    def _micro_batch(self) -> list[Completion]:
        ended: list[Completion] = []
        rows: list[tuple[Progress, int]] = []
        for pick in self._queues.next_batch(self._config.tokens_per_micro_batch):
            progress = _attempt(pick.work, partial(self._progress_of, pick))
            if isinstance(progress, TwinkleDaskError):
                ended.append(self._end(pick.work.id, progress))
            else:
                rows += [(progress, row) for row in pick.rows]
        rows.sort(key=_length, reverse=True)
        for group in length_groups([_length(row) for row in rows], self._config.padding_tokens):
            members: dict[Progress, list[int]] = {}
            for progress, row in rows[group]:
                # It may have ended, or started anew, by what happened in the group before.
                if self._progress.get(progress.work.id) is progress:
                    members.setdefault(progress, []).append(row)
            if members:
                ended += self._pass(members)
        return ended

    def _progress_of(self, pick: Pick) -> Progress:
        work = pick.work
        if work.id not in self._progress:
            self._progress[work.id] = Progress(work, pick.body, self._existing(work.run))
        return self._progress[work.id]

    def _pass(self, members: Mapping[Progress, Sequence[int]]) -> list[Completion]:
        try:
            results = run_pass(
                self._base,
                [progress.part(rows) for progress, rows in members.items()],
                chunk_bytes=self._config.head_chunk_bytes,
                block_bytes=self._block_bytes,
            )
        except Exception as error:
            if len(members) > 1:
                # Whose fault it is shows when each runs alone. The gradients so far may hold parts
                # of this pass, so all of them start anew.
                logger.warning("A mixed pass failed, its works run alone now", exc_info=error)
                for progress in members:
                    del self._progress[progress.work.id]
                    self._queues.restart_alone(progress.work.id)
                return []
            work = next(iter(members)).work
            return [self._end(work.id, _failure(error, work))]
        ended: list[Completion] = []
        for (progress, rows), of_rows in zip(members.items(), results, strict=True):
            self.tokens_done += sum(len(progress.body.data[row].tokens) for row in rows)
            try:
                for row, (logprobs, loss) in zip(rows, of_rows, strict=True):
                    progress.add(row, logprobs, loss)
                if progress.done:
                    ended.append(self._end(progress.work.id, progress.finish()))
            except TwinkleDaskError as error:
                ended.append(self._end(progress.work.id, error))
        return ended


def _length(row: tuple[Progress, int]) -> int:
    progress, index = row
    return len(progress.body.data[index].tokens)


def _attempt(work: Work, do: Callable[[], T]) -> T | TwinkleDaskError:
    """What ``do`` gives, or why it failed."""
    try:
        return do()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this work's failure alone
        return _failure(error, work)


def _failure(error: Exception, work: Work) -> TwinkleDaskError:
    """The error as its tenant may see it; what nobody meant to raise is logged."""
    if isinstance(error, TwinkleDaskError):
        return error
    incident = uuid.uuid4().hex[:12]
    logger.error("Incident %s: work %s failed", incident, work.id, exc_info=error)
    if not _out_of_memory(error):
        return ServiceFault("The trainer failed on this operation.", incident)
    return ServiceFault(
        "The operation needs more memory than this host has; shorter data need less.", incident
    )


def _out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(
        error
    )
