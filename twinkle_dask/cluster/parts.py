"""What watched samples have drawn and nobody was told yet: from the engine's thread to the loop's.

Shapes: M tokens, K likeliest.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from twinkle_dask.cluster.commands import Part
from twinkle_dask.types import Float32Array, Int32Array, SamplePart, ScoredTokens

_Top = tuple[Int32Array, Float32Array]


class Reader(Protocol):
    """Tells what a token adds to a text; a ``sampler.text_stream.TextStream`` is one."""

    def add(self, token: int) -> str:
        """The text that is whole with this token and was not before."""
        ...


@dataclass(slots=True)
class _Drawn:
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    top: list[_Top] = field(default_factory=list[_Top])


class Parts:
    """Gathers tokens while a message is being written, so that a message carries many.

    Args:
        wake: Called on the thread that draws, once there is something to ``take``.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._drawn: dict[tuple[str, int], _Drawn] = {}
        self._readers: dict[str, tuple[Callable[[], Reader], dict[int, Reader]]] = {}

    def watch(
        self, command_id: str, reader: Callable[[], Reader] | None
    ) -> Callable[[int, int, float, _Top | None], None]:
        """Something to be told of a command's tokens; a ``sampler.interface.Watch``.

        Args:
            command_id: Of a sample.
            reader: Makes what turns one sequence's tokens into text; None where nothing can.
        """
        if reader is not None:
            self._readers[command_id] = reader, {}
        return partial(self._add, command_id)

    def take(self) -> list[Part]:
        """All that was drawn since the last call, by command and sample."""
        with self._lock:
            drawn, self._drawn = self._drawn, {}
        return [
            Part(id=command_id, drawn=self._part(command_id, index, tokens))
            for (command_id, index), tokens in drawn.items()
        ]

    def end(self, command_id: str) -> None:
        """Nothing of this command will be taken any more."""
        self._readers.pop(command_id, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._drawn = {}
        self._readers.clear()

    def _add(
        self, command_id: str, index: int, token: int, logprob: float, top: _Top | None
    ) -> None:
        with self._lock:
            first = not self._drawn
            drawn = self._drawn.setdefault((command_id, index), _Drawn())
            drawn.tokens.append(token)
            drawn.logprobs.append(logprob)
            if top is not None:
                drawn.top.append(top)
        if first:
            self._wake()

    def _part(self, command_id: str, index: int, drawn: _Drawn) -> SamplePart:
        top, texts = None, [""] * len(drawn.tokens)
        if drawn.top:
            top = ScoredTokens(
                tokens=np.stack([tokens for tokens, _ in drawn.top]),
                logprobs=np.stack([logprobs for _, logprobs in drawn.top]),
            )
        if (found := self._readers.get(command_id)) is not None:
            make, readers = found
            reader = readers.get(index)
            if reader is None:
                reader = readers[index] = make()
            texts = [reader.add(token) for token in drawn.tokens]
        return SamplePart(
            index=index,
            tokens=np.array(drawn.tokens, dtype=np.int32),
            logprobs=np.array(drawn.logprobs, dtype=np.float32),
            texts=tuple(texts),
            topk_logprobs=top,
        )
