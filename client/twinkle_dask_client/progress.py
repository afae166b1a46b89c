"""What a person sees while a call takes long: a line with the time that has passed, on stderr."""

import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

T = TypeVar("T")


class Display:
    """Shows progress, or nothing.

    Args:
        shown: None shows it if stderr is a terminal.
    """

    def __init__(self, shown: bool | None = None) -> None:
        self._console = Console(stderr=True)
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._busy = False

    @contextmanager
    def waiting(self, doing: str) -> Generator[None]:
        """While one call goes on; calls beside it, of other threads, are silent."""
        if not self._shown or not doing or self._busy:
            yield
            return
        self._busy = True
        try:
            with Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            ) as progress:
                progress.add_task(doing)
                yield
        finally:
            self._busy = False

    def counted(self, items: Iterable[T], doing: str, total: int | None) -> Iterable[T]:
        """The items, while a bar counts them."""
        if not self._shown or self._busy:
            yield from items
            return
        self._busy = True
        try:
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._console,
            ) as progress:
                yield from progress.track(items, total=total, description=doing)
        finally:
            self._busy = False

    @contextmanager
    def downloading(self, name: str, total: int | None) -> Generator["Bytes"]:
        """While a file arrives."""
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._shown,
        ) as progress:
            task = progress.add_task(name, total=total)
            yield Bytes(progress, task)


class Bytes:
    """Counts what has arrived."""

    def __init__(self, progress: Progress, task: object) -> None:
        self._progress = progress
        self._task = task

    def add(self, count: int) -> None:
        """So many bytes more."""
        self._progress.update(self._task, advance=count)  # pyright: ignore[reportArgumentType]
