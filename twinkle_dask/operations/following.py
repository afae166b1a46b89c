"""Following a sample while it is drawn: each token once, however often it is drawn again."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator

from twinkle_dask.types import SamplePart, ScoredTokens


class Following:
    """The tokens of one sample on their way to whoever follows it.

    A host that is lost takes what it had drawn with it; the next one draws the same again, from
    the same seed. What was told already is then left out.
    """

    def __init__(self) -> None:
        self._told: Counter[int] = Counter()
        self._drawn: Counter[int] = Counter()
        self._parts: asyncio.Queue[SamplePart | None] = asyncio.Queue()

    def start_over(self) -> None:
        """Another host begins to draw, from the first token."""
        self._drawn.clear()

    def add(self, part: SamplePart) -> None:
        """A host has drawn more."""
        place = self._drawn[part.index]
        self._drawn[part.index] += len(part.tokens)
        new = self._drawn[part.index] - max(self._told[part.index], place)
        if new > 0:
            self._told[part.index] += new
            self._parts.put_nowait(_last(part, new))

    def end(self) -> None:
        """The sample's ticket has its outcome, or the service is stopping."""
        self._parts.put_nowait(None)

    async def parts(self) -> AsyncGenerator[SamplePart]:
        """What is drawn, until the end; for one follower."""
        while (part := await self._parts.get()) is not None:
            yield part


def _last(part: SamplePart, number: int) -> SamplePart:
    top = part.topk_logprobs
    return SamplePart(
        index=part.index,
        tokens=part.tokens[-number:],
        logprobs=part.logprobs[-number:],
        texts=part.texts[-number:],
        topk_logprobs=None
        if top is None
        else ScoredTokens(tokens=top.tokens[-number:], logprobs=top.logprobs[-number:]),
    )
