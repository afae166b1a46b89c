"""What has become of a sampler's requests, for clients that poll for many of them at once.

One log for each *clone*: a client of a sampler, whose samples have ``seq`` from a billion times
its number. A log is made at the client's first poll, from the journal, and what is drawn then is
added to it; so a log may be forgotten at any time, and a restart forgets all of them. Places in a
log count microseconds since 1970 at least, so those that a client remembers from a log before this
one lie before it, and then it is told of everything that it has not fetched.
"""

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from twinkle_dask.store.records import OperationRecord, OperationState
from twinkle_dask.store.store import Store
from twinkle_dask.types import SamplerId, TicketId

#: The ``seq`` of the samples of clone ``c`` are from ``c * SEQS_PER_CLONE``.
SEQS_PER_CLONE: Final = 10**9
#: Events in one answer, and in one log before it is given up.
_MAX_PER_ANSWER = 1_000
_MAX_PER_LOG = 20_000
_MAX_LOGS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A request that is done with ``num_bytes`` of result, or has failed (None)."""

    ticket: TicketId
    num_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Some events in their order, and the place after them."""

    items: tuple[Completion, ...]
    cursor: int


class Clone(NamedTuple):
    """One client of a sampler, by the number it asked for; the first one is 0."""

    sampler: SamplerId
    number: int


@dataclass(slots=True)
class _Log:
    """Events that the client has not acknowledged, each with its place."""

    base: int
    last: int
    events: deque[tuple[int, Completion]] = field(default_factory=deque[tuple[int, Completion]])
    known: set[TicketId] = field(default_factory=set[TicketId])
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    loaded: "asyncio.Task[None] | None" = None
    polled_s: float = field(default_factory=time.monotonic)

    def add(self, event: Completion) -> None:
        if event.ticket in self.known:
            return
        self.known.add(event.ticket)
        self.last += 1
        self.events.append((self.last, event))
        self.changed.set()

    def acknowledge(self, cursor: int) -> None:
        """Drop what the client has seen. A place outside of this log is of another one."""
        if not self.base < cursor <= self.last:
            return
        while self.events and self.events[0][0] <= cursor:
            _, event = self.events.popleft()
            self.known.discard(event.ticket)

    def next(self) -> Completions:
        some = tuple(itertools.islice(self.events, _MAX_PER_ANSWER))
        cursor = some[-1][0] if some else self.last
        return Completions(items=tuple(event for _, event in some), cursor=cursor)


class Events:
    """The logs of all clones that are being polled for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._logs: dict[Clone, _Log] = {}

    def add(self, sampler: SamplerId, seq: int | None, event: Completion) -> None:
        """A request has ended, durably."""
        clone = Clone(sampler, (seq or 0) // SEQS_PER_CLONE)
        log = self._logs.get(clone)
        if log is None:
            return
        log.add(event)
        if len(log.events) > _MAX_PER_LOG:
            self._forget(clone)

    async def wait(self, clone: Clone, *, after: int, timeout_s: float) -> Completions:
        """What came after a place, as soon as there is something; nothing once the time is over.

        Args:
            clone: Whose; that it belongs to who asks has been checked.
            after: The place up to which the client has seen everything; 0 at the beginning.
                Events behind it are told again and again.
            timeout_s: 0 asks for what is there.
        """
        log = self._logs.get(clone)
        if log is None:
            if len(self._logs) >= _MAX_LOGS:
                self._forget(min(self._logs, key=lambda clone: self._logs[clone].polled_s))
            # Beyond what the client knows, also where the clock went backwards.
            base = max(time.time_ns() // 1000, after)
            log = self._logs[clone] = _Log(base=base, last=base)
            log.loaded = asyncio.create_task(self._load(clone, log))
        log.polled_s = time.monotonic()
        if log.loaded is not None:
            await asyncio.shield(log.loaded)
        log.acknowledge(after)
        if not log.events and timeout_s > 0:
            log.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(log.changed.wait(), timeout_s)
        log.polled_s = time.monotonic()
        return log.next()

    def forget_idle(self, idle_s: float) -> None:
        """Take the logs out of memory that nobody polled for so long."""
        before_s = time.monotonic() - idle_s
        for clone in [c for c, log in self._logs.items() if log.polled_s < before_s]:
            self._forget(clone)

    def _forget(self, clone: Clone) -> None:
        log = self._logs.pop(clone)
        log.changed.set()  # whoever waits polls again, and finds a new log

    async def _load(self, clone: Clone, log: _Log) -> None:
        try:
            first = clone.number * SEQS_PER_CLONE
            records = await self._store.journal.unread(
                clone.sampler, first_seq=first, end_seq=first + SEQS_PER_CLONE
            )
        except BaseException:
            self._logs.pop(clone, None)
            raise
        for event in _events_of(records):
            log.add(event)
        log.loaded = None


def _events_of(records: Sequence[OperationRecord]) -> list[Completion]:
    return [
        Completion(
            ticket=record.ticket_id,
            num_bytes=record.result_bytes if record.state is OperationState.DONE else None,
        )
        for record in records
    ]
