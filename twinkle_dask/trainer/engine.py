"""The trainer: work of many runs in, results out, one micro-batch at a time."""

import logging
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, assert_never

import torch

from twinkle_dask.errors import HostLost, InvalidRequest, ServiceFault, TwinkleDaskError
from twinkle_dask.model.allocator import return_holes
from twinkle_dask.model.base import BaseModel
from twinkle_dask.trainer.budget import choose_budget
from twinkle_dask.trainer.lanes import NUMBERS_FOR_LANES, Lanes
from twinkle_dask.trainer.micro_batches import MicroBatches, PlannedPass
from twinkle_dask.trainer.paging import PagingConfig
from twinkle_dask.trainer.passes import PassConfig, run_pass
from twinkle_dask.trainer.progress import Progress, progress_of
from twinkle_dask.trainer.queues import Pick, RunQueues
from twinkle_dask.trainer.residency import Residency
from twinkle_dask.trainer.schedules import Schedules
from twinkle_dask.trainer.work import (
    Completion,
    CreateRun,
    ExportState,
    LoadState,
    Outcome,
    Work,
)
from twinkle_dask.types import (
    Embed,
    ForwardBackward,
    GradientStep,
    GradientStepResult,
    LoraSpec,
    OptimStep,
    RunId,
    StepResult,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

_CREATED_FOR_TRIM = 50

# Float32 logits of one lane at a time; they stay in a core's cache beside what they are made from.
_BLOCK_BYTES = 768 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """How the trainer cuts its work.

    Attributes:
        tokens_per_micro_batch: Most tokens in one micro-batch; bounds activations, and how long
            anybody waits for a turn. A longer row goes alone. None chooses by device and memory.
        deterministic: A pass holds rows of one work only, so that what a run computes depends on
            nobody else, bit for bit; given one kind of machine, number of lanes and budget.
        threads: Cores to compute on, on a processor; None takes what this thread's torch has.
        lanes: Threads that compute slices of a pass, on a processor; None takes one for each of
            ``threads``, up to 4.
        lane_tokens: Least tokens of a slice; None chooses by the model's size.
        pass_tokens: What one more pass over the model costs, in tokens: rows of a micro-batch are
            spread over several passes when that saves more padding, or lets small works end early.
        checkpoint_tokens: Passes of more tokens keep only the inputs of layers, and compute each
            layer a second time in backward. None takes what memory has room for.
        head_chunk_bytes: Most bytes of logits at a time, in the base model's dtype.
        head_block_bytes: Most bytes of float32 logits at a time. None takes what fits into the
            cores' caches, 0.75 MB for each lane; on a GPU ``head_chunk_bytes``.
    """

    tokens_per_micro_batch: int | None = None
    deterministic: bool = False
    threads: int | None = None
    lanes: int | None = None
    lane_tokens: int | None = None
    pass_tokens: int = 128
    checkpoint_tokens: int | None = None
    head_chunk_bytes: int = 48 * 2**20
    head_block_bytes: int | None = None


class Trainer:
    """Trains any number of runs over one base model. Used by one thread.

    Work is queued by ``submit`` and done by ``step``. Each run's work happens in the order of its
    submission; different runs share micro-batches (see ``queues``). A work that fails leaves its
    run as it was and everybody else alone.

    Args:
        base: Shared by all runs.
        config: How work is cut.
        paging: Where runs go that there is no room for (see ``residency``); None keeps all.
    """

    def __init__(
        self, base: BaseModel, config: TrainerConfig, paging: PagingConfig | None = None
    ) -> None:
        self._base = base
        self._config = config
        on_cpu = base.device.type == "cpu"
        threads = (config.threads or torch.get_num_threads()) if on_cpu else 1
        # A slice's operations should outweigh the Python around them, which lanes do not share.
        least = config.lane_tokens or max(64, 600_000_000 // base.facts.num_parameters)
        self._lanes = Lanes(threads, config.lanes if on_cpu else 1, least_tokens=least)
        budget = choose_budget(base, config.tokens_per_micro_batch, fixed=config.deterministic)
        self._micro_batches = MicroBatches(
            tokens=budget.tokens,
            pass_tokens=config.pass_tokens,
            packed=base.mixes_only_by_attention,
            alone=config.deterministic,
            gradient_bytes=budget.gradient_bytes,
        )
        block_bytes = _BLOCK_BYTES if on_cpu else config.head_chunk_bytes
        self._passes = PassConfig(
            chunk_bytes=config.head_chunk_bytes,
            block_bytes=config.head_block_bytes or block_bytes,
            checkpoint_tokens=config.checkpoint_tokens or budget.checkpoint_tokens,
        )
        self._queues = RunQueues()
        self._residency = Residency(base, self._queues, paging, lanes=self._lanes.count)
        self._schedules = Schedules()
        self._progress: dict[str, Progress] = {}
        self._planned: deque[PlannedPass] = deque()
        self._pass_is_due = False
        self._created = 0
        self.tokens_done = 0

    @property
    def busy(self) -> bool:
        """Whether ``step`` would do something now."""
        return (
            self._has_rows
            or self._residency.due
            or any(work.ready for work in self._queues.barriers())
        )

    @property
    def _has_rows(self) -> bool:
        return bool(self._planned) or self._queues.has_rows

    def runs(self) -> tuple[RunId, ...]:
        """The runs that exist."""
        return self._residency.names()

    def paused(self) -> tuple[tuple[RunId, ...], str]:
        """Runs whose work waits for room on the device, and why. Any thread."""
        return self._residency.waiting(), self._residency.reason

    def on_moved(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called, on any thread, when ``busy`` may have become true by itself."""
        self._residency.on_moved = wake

    def close(self) -> None:
        """End all threads, and remove what lies in files. The trainer is of no use then."""
        self._residency.close()
        self._lanes.close()

    def submit(self, work: Work) -> None:
        """Queue work behind everything else of its run; its completion comes out of ``step``.

        Raises:
            ValueError: Work of this id is queued already. What is wrong with the work itself comes
                out of ``step``.
        """
        self._queues.add(work)
        self._residency.work_added(work)

    def drop_run(self, run: RunId) -> tuple[str, ...]:
        """Free a run and forget its queued work; an unknown run is no error.

        Returns:
            The ids of the forgotten work, which gets no completion.
        """
        works = self._cancel(run)
        self._residency.drop(run)
        return works

    def _cancel(self, run: RunId) -> tuple[str, ...]:
        works = self._queues.cancel(run)
        for work in works:
            self._progress.pop(work.id, None)
        return tuple(work.id for work in works)

    def forget_all(self) -> None:
        """Do ``drop_run`` for every run there is, and every one that there is work for."""
        for run in self._residency.known():
            self.drop_run(run)

    def step(self) -> list[Completion]:
        """Do one pass, or the next work of each run where that is something else.

        The two alternate while there are both, so neither can hold up the other.

        Returns:
            What ended; empty also when there was nothing to do.
        """
        ended = self._advance_runs() if self._residency.due else []
        barriers = [work for work in self._queues.barriers() if work.ready]
        if barriers and not (self._pass_is_due and self._has_rows):
            self._pass_is_due = True
            return ended + self._do_all(barriers)
        self._pass_is_due = False
        return ended + self._next_pass()

    def _advance_runs(self) -> list[Completion]:
        """Let runs come and go; the work of those that are lost by it ends."""
        return [
            Completion(id=work_id, outcome=HostLost(f"The state of run {run!r} was lost here."))
            for run in self._residency.advance()
            for work_id in self._cancel(run)
        ]

    def _end(self, work_id: str, outcome: Outcome) -> Completion:
        run = self._queues.run_of(work_id)
        self._progress.pop(work_id, None)
        self._queues.finish(work_id)
        stepped = isinstance(outcome, StepResult | GradientStepResult)
        self._residency.work_ended(run, stepped=stepped)
        return Completion(id=work_id, outcome=outcome)

    # Barriers.

    def _do_all(self, works: Sequence[Work]) -> list[Completion]:
        """Optimizer steps of several runs side by side, all else one after another."""
        steps: list[tuple[Work, Callable[[], Outcome]]] = []
        outcomes: dict[str, Outcome] = {}
        numbers = 0
        for work in works:
            if isinstance(work.body, OptimStep):
                run = _attempt(work, partial(self._residency.get, work.run))
                if not isinstance(run, TwinkleDaskError):
                    numbers += run.num_weights
                    steps.append((work, partial(run.step, work.body.adam)))
                    continue
            outcomes[work.id] = _attempt(work, partial(self._do, work))
        # Sums are cut by threads: a deterministic step has the same ones whoever steps beside it.
        if numbers >= NUMBERS_FOR_LANES and not self._config.deterministic:
            done = self._lanes.run([(_attempt, *step) for step in steps])
        else:
            done = [_attempt(*step) for step in steps]
        outcomes |= {work.id: outcome for (work, _), outcome in zip(steps, done, strict=True)}
        return [self._end(work.id, outcomes[work.id]) for work in works]

    def _do(self, work: Work) -> Outcome:
        match work.body:
            case CreateRun():
                return self._create(work.run, work.body.spec)
            case LoadState():
                state, with_optimizer = work.body.state.result(), work.body.with_optimizer
                return self._residency.load(work.run, state, with_optimizer=with_optimizer)
            case OptimStep():
                return self._residency.get(work.run).step(work.body.adam)
            case GradientStep():
                run = self._residency.get(work.run)
                return run.gradient_step(work.body, self._schedules)
            case ExportState():
                run = self._residency.get(work.run)
                return run.export(gradients=work.body.gradients, optimizer=work.body.optimizer)
            case ForwardBackward() | Embed():
                raise InvalidRequest("The batch is empty.")
            case _:
                assert_never(work.body)

    def _create(self, name: RunId, spec: LoraSpec) -> None:
        if not 1 <= spec.rank <= self._base.facts.max_rank:
            limit = self._base.facts.max_rank
            raise InvalidRequest(f"The LoRA rank must be from 1 to {limit}, not {spec.rank}.")
        self._residency.create(name, spec)
        self._created += 1
        if self._created % _CREATED_FOR_TRIM == 0:
            return_holes()

    # Passes.

    def _next_pass(self) -> list[Completion]:
        ended: list[Completion] = []
        if not self._planned:
            self._planned.extend(self._micro_batches.next(self._queues, self._gradient_bytes))
        while self._planned:
            planned = self._planned.popleft()
            members: dict[Progress, Sequence[int]] = {}
            for pick in planned.picks:
                # It may have ended, or been taken back, by what happened in a pass before.
                if not self._queues.handed_out(pick.work.id, pick.round):
                    continue
                progress = _attempt(pick.work, partial(self._progress_of, pick))
                if isinstance(progress, TwinkleDaskError):
                    ended.append(self._end(pick.work.id, progress))
                else:
                    members[progress] = pick.rows
            if members:
                return ended + self._pass(members)
        return ended

    def _gradient_bytes(self, work: Work) -> int:
        """What a work's own gradients take while it is computed: its sum, and one for each lane."""
        try:
            numbers = self._residency.get(work.run).num_weights
        except TwinkleDaskError:
            return 0  # it fails when its turn comes
        return numbers * (4 + self._base.dtype.itemsize * self._lanes.count)

    def _progress_of(self, pick: Pick) -> Progress:
        work = pick.work
        if work.id not in self._progress:
            run = self._residency.get(work.run)
            self._progress[work.id] = progress_of(work, pick.body, run)
        return self._progress[work.id]

    def _pass(self, members: Mapping[Progress, Sequence[int]]) -> list[Completion]:
        try:
            results = run_pass(
                self._base,
                [progress.part(rows) for progress, rows in members.items()],
                self._lanes,
                self._passes,
            )
        except Exception as error:
            if len(members) > 1:
                # Whose fault it is shows when each runs alone, from its beginning: by then some
                # of its rows may be planned for another pass already.
                logger.warning("A mixed pass failed, its works run alone now", exc_info=error)
                for progress in members:
                    del self._progress[progress.work.id]
                    self._queues.restart_alone(progress.work.id)
                return []
            work = next(iter(members)).work
            return [self._end(work.id, _failure(error, work))]
        ended: list[Completion] = []
        for (progress, rows), of_rows in zip(members.items(), results, strict=True):
            self.tokens_done += sum(progress.body.length_of(row) for row in rows)
            try:
                for row, result in zip(rows, of_rows, strict=True):
                    progress.add(row, result)
                if progress.done:
                    ended.append(self._end(progress.work.id, progress.finish()))
            except TwinkleDaskError as error:
                ended.append(self._end(progress.work.id, error))
        return ended


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
