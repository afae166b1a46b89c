"""The C library's memory, set for passes that need the same hundreds of megabytes again and again.

By default large blocks are mapped for each use and given back after it, so that every page is
faulted in anew: 47,000 faults in a step of SmolLM2-135M (bfloat16, 512 positions, one core), a
tenth of its time, and several times that where a nanny of Dask has set the trim threshold to 64 KB
(3.9 s a step of 1024 positions instead of 2.8 s). Here freed memory stays with the process. What it
holds is then its largest pass, not its last one.
"""

import ctypes
import logging
import sys

log = logging.getLogger(__name__)

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MAPPED_FROM = (2**30, 32 * 2**20)  # old versions take no more than the second
_TRIMMED_FROM = 2**31 - 1


def keep_freed_memory() -> None:
    """Let this process keep what it frees; does nothing where there is no glibc."""
    if sys.platform != "linux":  # Windows has no library to open by no name
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        log.info("This C library's allocator cannot be set; passes may be slower")
        return
    # Threads that start from here on share one heap: others are small, and shrink at once.
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_TRIM_THRESHOLD, _TRIMMED_FROM)
    for threshold in _MAPPED_FROM:
        if mallopt(_M_MMAP_THRESHOLD, threshold):
            return


def return_holes() -> None:
    """Give pages back that are free inside of the heap.

    What lives long (a run's objects, a few hundred bytes) comes to lie between blocks that passes
    need again, so that these no longer fit: 1,000 runs of the tiny model took 1.3 times their own
    size. Takes milliseconds, and the next pass faults some pages in.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
