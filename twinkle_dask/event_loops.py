"""Which event loop the processes of the service run: uvloop where it is, asyncio's own elsewhere.

uvloop takes a third of the time for a read or a write of a socket. It has no build for Windows.
"""

import asyncio
import importlib
import importlib.util
from collections.abc import Callable
from typing import Final

#: Dask's name for it, for the worker processes.
NAME: Final = "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """For ``asyncio.Runner``; None is asyncio's own."""
    if NAME != "uvloop":
        return None
    new_loop: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module(
        "uvloop"
    ).new_event_loop
    return new_loop
