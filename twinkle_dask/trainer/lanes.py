"""Threads that compute slices of one pass at the same time, on processors.

Many operations of a step are too small for two threads to share, and some products are not shared
at all (torch's bfloat16 product with 576 columns takes one core whatever it is given). A slice for
each core uses them all (SmolLM2-135M, bfloat16, 8 rows of 128 on two cores: 1.20 s a step, and 1.26
with two threads inside of each operation). A row is never cut, so passes of one row use the threads
inside of each operation.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

# A slice this much larger than its share leaves the others waiting for it.
_UNEVEN = 1.25
# Python's own lock lets no more than a few lanes make progress.
MOST_LANES = 4

# Numbers of flat buffers, over all runs, from which on it pays to give each run's to a lane.
NUMBERS_FOR_LANES = 2_000_000


class Lanes:
    """A fixed number of compute threads. Used by one thread.

    Attributes:
        count: Most slices at a time.
        least_tokens: Of a slice; passes of less than twice as many are not cut.
    """

    def __init__(self, threads: int, count: int | None = None, *, least_tokens: int = 1) -> None:
        """Start no thread before it is needed.

        Args:
            threads: Cores to use, over all lanes.
            count: Lanes; by default one for each core, up to 4.
            least_tokens: See the class.
        """
        self.least_tokens = least_tokens
        self.count = min(threads, MOST_LANES) if count is None else count
        self._threads = threads
        self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="lane")
        self._set = threading.local()

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Slices for rows of these lengths, as ``slices`` gives them."""
        return slices(lengths, max(1, min(self.count, sum(lengths) // self.least_tokens)))

    def run(self, calls: Sequence[tuple[Callable[..., Any], *tuple[Any, ...]]]) -> list[Any]:
        """Call each ``(function, *arguments)``; a single one in this thread, with all cores.

        Raises:
            Exception: What the first failing call raised, after all have ended.
        """
        if len(calls) == 1:
            function, *arguments = calls[0]
            return [function(*arguments)]
        share = max(1, self._threads // min(self.count, len(calls)))
        futures = [self._pool.submit(self._call, share, *call) for call in calls]
        wait(futures)
        try:
            return [future.result() for future in futures]
        finally:
            # An exception holds this frame: what the slices hold would wait for the collector, just
            # when their works are tried again for want of memory.
            del futures

    def close(self) -> None:
        """End the threads; nothing may be running."""
        self._pool.shutdown(wait=True)

    def _call(self, threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
        if getattr(self._set, "threads", None) != threads:
            torch.set_num_threads(threads)  # of this thread's operations
            self._set.threads = threads
        return function(*arguments)


def slices(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Cut rows into at most ``count`` slices of about equal length together.

    Neighbours stay together where that is even enough, since they may wear one adapter.

    Returns:
        Indices of rows, in order within each slice; one slice if several would not help.
    """
    count = min(count, len(lengths))
    everything = list(range(len(lengths)))
    if count < 2:
        return [everything]
    share = sum(lengths) / count
    for cut in (_consecutive(lengths, count), _balanced(lengths, count)):
        if max(sum(lengths[i] for i in rows) for rows in cut) <= _UNEVEN * share:
            return cut
    fewer = slices(lengths, count - 1)
    longest = max(sum(lengths[i] for i in rows) for rows in fewer)
    even = _balanced(lengths, count)
    return even if max(sum(lengths[i] for i in rows) for rows in even) < 0.8 * longest else fewer


def _consecutive(lengths: Sequence[int], count: int) -> list[list[int]]:
    cut: list[list[int]] = [[] for _ in range(count)]
    total, before = sum(lengths), 0
    for i, length in enumerate(lengths):
        middle = before + length / 2
        cut[min(count - 1, int(middle * count / total))].append(i)
        before += length
    return [rows for rows in cut if rows]


def _balanced(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Longest first, each to the slice that has least."""
    cut: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        least = sums.index(min(sums))
        cut[least].append(i)
        sums[least] += lengths[i]
    return [sorted(rows) for rows in cut if rows]
