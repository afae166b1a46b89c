"""Whose rows come next: order within a run, fairness between tenants. Pure; no torch, no clock.

A run's work happens in the order it was added. The works that are made of rows (``RowsBody``) at
the front of a run are *open* together, since sums do not mind their order; any other work is a
barrier, which waits until it is alone at the front and holds back what follows.

Between tenants the measure is tokens: the next row is the oldest one of the tenant that was served
least. A tenant that comes back from idleness starts level with the least served one, so neither
idleness nor past use of an empty machine counts for or against anybody. Two tenants that always
have work therefore never differ by more than one row.

A run can be *held* (its tensors are not at hand, see ``residency``): its works keep their places,
what has begun goes on, and nothing else of it begins.
"""

import heapq
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

from twinkle_dask.trainer.work import RowsBody, Work
from twinkle_dask.types import CustomLoss, Embed, ForwardBackward, RunId, TenantId

# A custom loss takes its time for each datum, however short that is.
_LEAST_OF_CUSTOM = 64


@dataclass(frozen=True, slots=True)
class Pick:
    """Rows of one open work in one micro-batch.

    Attributes:
        rows: Indices of the body's rows, longest row first.
        last: Whether no rows of the work are left after these.
        round: How often the work has been started anew.
    """

    work: Work
    body: RowsBody
    rows: tuple[int, ...]
    last: bool
    round: int = 0


@dataclass(slots=True, eq=False)
class _Open:
    """An open work made of rows: ``rows[given:]`` are still to be handed out."""

    age: int
    work: Work
    body: RowsBody
    rows: list[int]
    given: int = 0
    alone: bool = False
    held: bool = False
    round: int = 0

    def __lt__(self, other: "_Open") -> bool:
        return self.age < other.age

    @property
    def next_tokens(self) -> int:
        return _tokens_charged(self.body, self.rows[self.given])


def _tokens_charged(body: RowsBody, row: int) -> int:
    """What a row counts for, in budgets and between tenants."""
    tokens = body.length_of(row)
    custom = isinstance(body, ForwardBackward) and isinstance(body.loss, CustomLoss)
    return max(tokens, _LEAST_OF_CUSTOM) if custom else tokens


@dataclass(slots=True)
class _Run:
    """``open`` works in age order, then what waits behind them; the first waiting is a barrier."""

    open: dict[str, _Open] = field(default_factory=dict[str, _Open])
    waiting: deque[tuple[int, Work]] = field(default_factory=deque[tuple[int, Work]])


@dataclass(slots=True)
class _Tenant:
    """``ready``: open works with rows left, oldest first."""

    served: int
    ready: list[_Open] = field(default_factory=list[_Open])


class RunQueues:
    """All work that was added and has not ended."""

    def __init__(self) -> None:
        self._ages = count()
        self._runs: dict[RunId, _Run] = {}
        self._run_of: dict[str, RunId] = {}
        self._held: set[RunId] = set()
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
        """Works not made of rows whose turn has come, oldest run first."""
        for name, run in self._runs.items():
            if not run.open and run.waiting and name not in self._held:
                yield run.waiting[0][1]

    def run_of(self, work_id: str) -> RunId:
        """The run that a queued work belongs to."""
        return self._run_of[work_id]

    def front(self, name: RunId) -> Work | None:
        """A run's oldest work that has not ended; None if it has no work."""
        run = self._runs.get(name)
        if run is None:
            return None
        return next(iter(run.open.values())).work if run.open else run.waiting[0][1]

    def begun(self, name: RunId) -> bool:
        """Whether rows of a run's work were handed out, and the work has not ended."""
        run = self._runs.get(name)
        return run is not None and any(entry.given for entry in run.open.values())

    def hold(self, name: RunId) -> None:
        """Let nothing of a run begin until ``release``; also work that is added later."""
        self._held.add(name)
        run = self._runs.get(name)
        for entry in run.open.values() if run is not None else ():
            if not entry.given and not entry.held:
                self._unready(entry)
                entry.held = True

    def release(self, name: RunId) -> None:
        """Undo ``hold``."""
        self._held.discard(name)
        run = self._runs.get(name)
        for entry in run.open.values() if run is not None else ():
            if entry.held:
                entry.held = False
                self._ready(entry)

    @property
    def has_rows(self) -> bool:
        """Whether ``next_batch`` would give any."""
        return any(tenant.ready for tenant in self._tenants.values())

    def next_batch(
        self,
        token_budget: int,
        *,
        alone: bool = False,
        bytes_of: Callable[[Work], int] = lambda _: 0,
        most_bytes: int = 0,
    ) -> list[Pick]:
        """Hand out the rows of the next micro-batch, fairest first.

        They exceed the budget only when a single row does. A row is handed out once, unless
        ``restart_alone`` takes it back.

        Args:
            token_budget: Most tokens of all rows together.
            alone: Rows of one work only; what they are then depends on that work and the budget.
            bytes_of: Memory that a work takes while it is computed, besides that of its tokens.
            most_bytes: Bound of that over all works that learn; a single one may exceed it.

        Returns:
            One pick for each work, in order of their first row; empty if no rows are left.
        """
        active = [tenant for tenant in self._tenants.values() if tenant.ready]
        if not active:
            return []
        first = min(active, key=lambda t: (t.served, t.ready[0].age))
        # A work that must run alone has the micro-batch for itself; its tenant pays as always.
        alone = alone or first.ready[0].alone
        heap = [(t.served, t.ready[0].age, t) for t in ([first] if alone else active)]
        heapq.heapify(heap)
        taken: dict[str, tuple[_Open, list[int]]] = {}
        tokens = num_bytes = 0
        while heap:
            served, _, tenant = heap[0]
            entry = tenant.ready[0]
            if taken and (
                tokens + entry.next_tokens > token_budget
                or (entry.work.id not in taken and (alone or entry.alone))
            ):
                break
            if entry.work.id not in taken and entry.body.backward:
                num_bytes += bytes_of(entry.work)
                if taken and num_bytes > most_bytes:
                    break
            tokens += entry.next_tokens
            self._clock = max(self._clock, served)
            tenant.served += entry.next_tokens
            taken.setdefault(entry.work.id, (entry, []))[1].append(entry.rows[entry.given])
            entry.given += 1
            if entry.given == len(entry.rows):
                tenant.ready.pop(0)
            if tenant.ready:
                heapq.heapreplace(heap, (tenant.served, tenant.ready[0].age, tenant))
            else:
                heapq.heappop(heap)
        self._forget_idle_tenants()
        return [
            Pick(entry.work, entry.body, tuple(rows), entry.given == len(entry.rows), entry.round)
            for entry, rows in taken.values()
        ]

    def handed_out(self, work_id: str, round_: int) -> bool:
        """Whether rows that were picked in this round of a work are still to be computed."""
        run = self._runs.get(self._run_of.get(work_id, RunId("")))
        entry = None if run is None else run.open.get(work_id)
        return entry is not None and entry.round == round_

    def restart_alone(self, work_id: str) -> None:
        """Take back all rows of an open work; from now on it shares no micro-batch."""
        entry = self._runs[self._run_of[work_id]].open[work_id]
        self._unready(entry)
        entry.given, entry.alone = 0, True
        entry.round += 1
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
            if not isinstance(work.body, ForwardBackward | Embed) or not work.body.num_rows:
                return
            run.waiting.popleft()
            rows = sorted(range(work.body.num_rows), key=work.body.length_of, reverse=True)
            run.open[work.id] = entry = _Open(age, work, work.body, rows)
            self._ready(entry)

    def _ready(self, entry: _Open) -> None:
        if entry.work.run in self._held:
            entry.held = True
            return
        tenant = self._tenants.setdefault(entry.work.tenant, _Tenant(served=self._clock))
        if not tenant.ready:
            others = [t.served for t in self._tenants.values() if t.ready]
            tenant.served = max(tenant.served, min(others, default=self._clock))
        insort(tenant.ready, entry)

    def _unready(self, entry: _Open) -> None:
        if entry.given < len(entry.rows) and not entry.held:
            self._tenants[entry.work.tenant].ready.remove(entry)

    def _forget_idle_tenants(self) -> None:
        done = [n for n, t in self._tenants.items() if not t.ready and t.served <= self._clock]
        for name in done:
            del self._tenants[name]
