"""The one thread that computes on a host: a trainer and a sampler over the same base weights.

Both have a ``step`` that does a bounded piece of work, and the thread gives turns by time spent,
so that a long sample does not hold up training or the other way round. Reading and writing
folders happens on a small pool beside it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import structlog
import torch

from twinkle_dask.errors import ServiceFault, TwinkleDaskError, new_incident
from twinkle_dask.sampler.interface import Sampler, SampleWork
from twinkle_dask.trainer.engine import Trainer
from twinkle_dask.trainer.work import Work
from twinkle_dask.types import AdapterState

Action: TypeAlias = Callable[[], None]

log = structlog.stdlib.get_logger(__name__)


#: Told a command's id and its outcome, on the engine thread.
OnDone: TypeAlias = Callable[[str, object], None]


class EngineThread:
    """Runs a trainer, a sampler, or both.

    Args:
        trainer: None on a host that only samples.
        sampler: None on a host that only trains.
        read_adapter: Fetches the weights in a folder; called on the pool.
        on_done: Receives each command's id and outcome: a result value, or a TwinkleDaskError.
        threads: Of this one's arithmetic, on a processor.
    """

    def __init__(
        self,
        trainer: Trainer | None,
        sampler: Sampler | None,
        read_adapter: Callable[[str], AdapterState],
        on_done: OnDone,
        threads: int,
    ) -> None:
        self.trainer = trainer
        self.sampler = sampler
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="host-read")
        # One, so that of two checkpoints with one name the later one is also finished later.
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="host-write")
        self.fault: BaseException | None = None
        self._read_adapter = read_adapter
        self._on_done = on_done
        self._threads = threads
        self._inbox: deque[Action] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._fetching: dict[str, list[SampleWork]] = {}
        self._trained_s = self._sampled_s = 0.0
        if trainer is not None:
            trainer.on_moved(self.wake)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def train(self, work: Work) -> None:
        """Hand work to the trainer, in this order. Any thread."""
        self.post(lambda: self._train(work))

    def sample(self, work: SampleWork) -> None:
        """Hand work to the sampler, which first gets the adapter if it lacks it. Any thread."""
        self.post(lambda: self._sample(work))

    def cancel_sample(self, command_id: str) -> None:
        """Stop a sample. Any thread."""
        self.post(lambda: self.forget_sample(command_id))

    def offer_adapter(self, folder: str, state: AdapterState) -> None:
        """Give the sampler weights that it would else read from ``folder``. Any thread."""

        def add() -> None:
            if self.sampler is not None and not self.sampler.has_adapter(folder):
                self.sampler.add_adapter(folder, state)

        self.post(add)

    def post(self, action: Action) -> None:
        """Run something on the engine thread between two steps. Any thread."""
        with self._changed:
            self._inbox.append(action)
            self._changed.notify()

    def wake(self, _: object = None) -> None:
        """Look again for work that has become ready. Any thread."""
        self.post(lambda: None)

    def stop(self) -> None:
        """End the thread after the step that is going on, and the trainer with it."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        if self.trainer is not None:
            self.trainer.close()
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.writer.shutdown(wait=False, cancel_futures=True)

    def _train(self, work: Work) -> None:
        if self.trainer is None:
            self._on_done(work.id, ServiceFault("This host does not train."))
            return
        try:
            self.trainer.submit(work)
        except (ValueError, TwinkleDaskError) as error:
            self._on_done(work.id, error)

    def _sample(self, work: SampleWork) -> None:
        if self.sampler is None:
            self._on_done(work.id, ServiceFault("This host does not sample."))
        elif work.adapter is None or self.sampler.has_adapter(work.adapter):
            self._submit(self.sampler, work)
        elif work.adapter in self._fetching:
            self._fetching[work.adapter].append(work)
        else:
            folder = work.adapter
            self._fetching[folder] = [work]
            reading = self.pool.submit(self._read_adapter, folder)
            reading.add_done_callback(lambda done: self.post(lambda: self._fetched(folder, done)))

    def forget_sample(self, command_id: str) -> None:
        """Stop a sample; to be called on the engine thread."""
        for waiting in self._fetching.values():
            waiting[:] = [work for work in waiting if work.id != command_id]
        if self.sampler is not None:
            self.sampler.cancel(command_id)

    def _fetched(self, folder: str, done: "Future[AdapterState]") -> None:
        waiting = self._fetching.pop(folder)
        error = done.exception()
        if self.sampler is None or error is not None:
            for work in waiting:
                self._on_done(work.id, error)
            return
        self.sampler.add_adapter(folder, done.result())
        for work in waiting:
            self._submit(self.sampler, work)

    def _submit(self, sampler: Sampler, work: SampleWork) -> None:
        try:
            sampler.submit(work)
        except ValueError as error:
            self._on_done(work.id, error)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._take_messages():
                self._step()
        except BaseException as error:
            # Nothing a tenant sends may get here; the host is unusable and says so to its link.
            log.exception("engine_died")
            self.fault = error

    def _take_messages(self) -> bool:
        """Handle what was posted; waits while there is nothing to do. False means stop."""
        while True:
            with self._changed:
                while not (self._inbox or self._stopping or self._busy()):
                    self._changed.wait()
                if self._stopping:
                    return False
                actions = list(self._inbox)
                self._inbox.clear()
            for action in actions:
                action()
            if self._busy():
                return True

    def _busy(self) -> bool:
        return bool(
            (self.trainer is not None and self.trainer.busy)
            or (self.sampler is not None and self.sampler.busy)
        )

    def _step(self) -> None:
        training = self.trainer if self.trainer is not None and self.trainer.busy else None
        sampling = self.sampler if self.sampler is not None and self.sampler.busy else None
        if training is None or sampling is None:
            # Whoever is alone saves up no turns for later.
            self._trained_s = self._sampled_s = 0.0
        start_s = time.perf_counter()
        if training is not None and (sampling is None or self._trained_s <= self._sampled_s):
            for done in training.step():
                self._on_done(done.id, done.outcome)
            self._trained_s += time.perf_counter() - start_s
        elif sampling is not None:
            for done in sampling.step():
                self._on_done(done.id, done.outcome)
            self._sampled_s += time.perf_counter() - start_s


def as_error(outcome: object) -> TwinkleDaskError | None:
    """The failure in an outcome; anything unexpected becomes a ServiceFault, logged here."""
    if isinstance(outcome, TwinkleDaskError):
        return outcome
    if isinstance(outcome, BaseException):
        incident = new_incident()
        log.error("unexpected_failure", incident=incident, exc_info=outcome)
        return ServiceFault("An internal error occurred.", incident)
    return None
