"""Whose rows come next: order within a run, fairness between tenants. Pure; no torch, no clock.

A run's work happens in the order it was added. The ``ForwardBackward`` works at the front of a run
are *open* together, since sums do not mind their order; any other work is a barrier, which waits
until it is alone at the front and holds back what follows.

Between tenants the measure is tokens: the next row is the oldest one of the tenant that was served
least. A tenant that comes back from idleness starts level with the least served one, so neither
idleness nor past use of an empty machine counts for or against anybody. Two tenants that always
have work therefore never differ by more than one row.
"""

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from twinkle_dask.trainer.work import Work
from twinkle_dask.types import ForwardBackward, RunId, TenantId


@dataclass(frozen=True, slots=True)
class Pick:
    """Rows of one open ``ForwardBackward`` in one micro-batch.

    Attributes:
        rows: Indices into ``body.data``, longest row first.
    """

    work: Work
    body: ForwardBackward
    rows: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Open:
    """An open ForwardBackward: ``rows[given:]`` are still to be handed out."""

    age: int
    work: Work
    body: ForwardBackward
    rows: list[int]
    given: int = 0
    alone: bool = False

    def __lt__(self, other: "_Open") -> bool:
        return self.age < other.age

    @property
    def next_tokens(self) -> int:
        return len(self.body.data[self.rows[self.given]].tokens)


@dataclass(slots=True)
class _Run:
    """``open`` works in age order, then what waits behind them; the first waiting is a barrier."""

    open: dict[str, _Open] = field(default_factory=dict[str, _Open])
    waiting: deque[tuple[int, Work]] = field(default_factory=deque[tuple[int, Work]])


@dataclass(slots=True)
class _Tenant:
    """``ready[backward]``: open works with rows left, oldest first."""

    served: int
    ready: dict[bool, list[_Open]] = field(default_factory=lambda: {False: [], True: []})

    @property
    def active(self) -> bool:
        return bool(self.ready[True] or self.ready[False])

    @property
    def oldest(self) -> _Open:
        return min(works[0] for works in self.ready.values() if works)


class RunQueues:
    """All work that was added and has not ended."""

    def __init__(self) -> None:
        self._ages = count()
        self._runs: dict[RunId, _Run] = {}
        self._run_of: dict[str, RunId] = {}
        self._tenants: dict[TenantId, _Tenant] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self._run_of)

    def add(self, work: Work) -> None:
        """Put work at the end of its run.

        Raises:
            ValueError: Work of this id is queued already.
        """
        if work.id in self._run_of:
            raise ValueError(f"work {work.id!r} is queued already")
        self._run_of[work.id] = work.run
        run = self._runs.setdefault(work.run, _Run())
        run.waiting.append((next(self._ages), work))
        self._advance(run)

    def barriers(self) -> Iterator[Work]:
        """Works other than ForwardBackward whose turn has come, oldest run first."""
        for run in self._runs.values():
            if not run.open and run.waiting:
                yield run.waiting[0][1]

    @property
    def has_rows(self) -> bool:
        """Whether ``next_batch`` would give any."""
        return any(tenant.active for tenant in self._tenants.values())

    def next_batch(self, token_budget: int) -> list[Pick]:
        """Hand out the rows of the next micro-batch, fairest first.

        All of them want a backward pass or none does. They exceed the budget only when a single
        row does. A row is handed out once, unless ``restart_alone`` takes it back.

        Returns:
            One pick for each work, in order of their first row; empty if no rows are left.
        """
        active = {name: tenant for name, tenant in self._tenants.items() if tenant.active}
        if not active:
            return []
        first = min(active.values(), key=lambda t: (t.served, t.oldest.age))
        backward, alone = first.oldest.body.backward, first.oldest.alone
        # A work that must run alone has the micro-batch for itself; its tenant pays as always.
        sharing = [first] if alone else [t for t in active.values() if t.ready[backward]]
        heap = [(t.served, t.ready[backward][0].age, t) for t in sharing]
        heapq.heapify(heap)
        taken: dict[str, tuple[_Open, list[int]]] = {}
        tokens = 0
        while heap:
            served, _, tenant = heap[0]
            ready = tenant.ready[backward]
            entry = ready[0]
            if taken and (tokens + entry.next_tokens > token_budget or entry.alone is not alone):
                break
            if alone and taken and entry.work.id not in taken:
                break
            tokens += entry.next_tokens
            self._clock = max(self._clock, served)
            tenant.served += entry.next_tokens
            taken.setdefault(entry.work.id, (entry, []))[1].append(entry.rows[entry.given])
            entry.given += 1
            if entry.given == len(entry.rows):
                ready.pop(0)
            if ready:
                heapq.heapreplace(heap, (tenant.served, ready[0].age, tenant))
            else:
                heapq.heappop(heap)
        self._forget_idle_tenants()
        return [Pick(e.work, e.body, tuple(rows)) for e, rows in taken.values()]

    def restart_alone(self, work_id: str) -> None:
        """Take back all rows of an open work; from now on it shares no micro-batch."""
        entry = self._runs[self._run_of[work_id]].open[work_id]
        self._unready(entry)
        entry.given, entry.alone = 0, True
        self._ready(entry)

    def finish(self, work_id: str) -> None:
        """End a work whose turn has come, with rows left or not; what it held back may follow.

        Raises:
            ValueError: Its turn has not come.
        """
        name = self._run_of[work_id]
        run = self._runs[name]
        if entry := run.open.pop(work_id, None):
            self._unready(entry)
        elif not run.open and run.waiting[0][1].id == work_id:
            run.waiting.popleft()
        else:
            raise ValueError(f"the turn of work {work_id!r} has not come")
        del self._run_of[work_id]
        self._advance(run)
        if not run.open and not run.waiting:
            del self._runs[name]

    def cancel(self, name: RunId) -> list[Work]:
        """Take out everything of a run, in its order."""
        run = self._runs.pop(name, _Run())
        for entry in run.open.values():
            self._unready(entry)
        works = [entry.work for entry in run.open.values()] + [work for _, work in run.waiting]
        for work in works:
            del self._run_of[work.id]
        return works

    def _advance(self, run: _Run) -> None:
        while run.waiting:
            age, work = run.waiting[0]
            # An empty batch has no row to wait for: it waits as a barrier and is refused there.
            if not isinstance(work.body, ForwardBackward) or not work.body.data:
                return
            run.waiting.popleft()
            lengths = [len(datum.tokens) for datum in work.body.data]
            rows = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
            run.open[work.id] = entry = _Open(age, work, work.body, rows)
            self._ready(entry)

    def _ready(self, entry: _Open) -> None:
        tenant = self._tenants.setdefault(entry.work.tenant, _Tenant(served=self._clock))
        if not tenant.active:
            others = [t.served for t in self._tenants.values() if t.active]
            tenant.served = max(tenant.served, min(others, default=self._clock))
        insort(tenant.ready[entry.body.backward], entry)

    def _unready(self, entry: _Open) -> None:
        if entry.given < len(entry.rows):
            self._tenants[entry.work.tenant].ready[entry.body.backward].remove(entry)

    def _forget_idle_tenants(self) -> None:
        done = [n for n, t in self._tenants.items() if not t.active and t.served <= self._clock]
        for name in done:
            del self._tenants[name]
