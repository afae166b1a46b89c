"""Whose turn it is and who gets memory: what waits, what is being prefilled, what runs.

A request waits in its tenant's queue as a *job*, its prefill. Once that is done its sequences take
rows in a lane and run. When memory or rows are short, jobs wait; a running sequence loses its row
only where it must: lengths outgrow memory (the youngest goes), or another tenant holds far less
than its share. It then waits as a job again and goes on where it was.
"""

from collections.abc import Iterable, Iterator

from twinkle_dask.sampler.fairness import FairQueue, Holding, to_take_back
from twinkle_dask.sampler.lanes import KvMemory, Lane
from twinkle_dask.sampler.sequences import Job, JobAccount, Request, Sequence
from twinkle_dask.types import TenantId


class Scheduler:
    """All jobs and sequences of an engine."""

    def __init__(self, kv: KvMemory, *, max_sequences: int, prefill_tokens: int) -> None:
        """``prefill_tokens`` bounds one prefill pass, padding included."""
        self._kv = kv
        self._max_sequences = max_sequences
        self._prefill_tokens = min(prefill_tokens, kv.max_length)
        self._waiting: FairQueue[Job] = FairQueue()
        self._partial: list[Job] = []  # waiting, with some of their tokens in a cache
        self._ready: list[Job] = []  # prefilled, with sequences that have no row yet

    @property
    def running(self) -> list[Sequence]:
        """All sequences that have a row."""
        return [sequence for lane in self._kv.lanes for sequence in lane.rows]

    def account(self, tenant: TenantId) -> JobAccount:
        """The tenant's account, to be charged by whoever spends tokens."""
        return self._waiting.account(tenant)

    def add(self, job: Job) -> None:
        """Queue a job behind its tenant's others."""
        job.request.account.waiting.append(job)

    def drop(self, request: Request) -> None:
        """Forget everything of a request and free what it holds."""
        for lane in self._kv.lanes:
            for sequence in [s for s in lane.rows if s.request is request]:
                lane.remove(sequence)
        for job in [job for job in self._ready if job.request is request]:
            self._ready.remove(job)
            self._release(job)
        waiting = request.account.waiting
        for job in [job for job in waiting if job.request is request]:
            waiting.remove(job)
            self._release(job)

    def leave(self, sequence: Sequence) -> None:
        """Take a running sequence out of its lane."""
        next(lane for lane in self._kv.lanes if sequence in lane.rows).remove(sequence)

    # ---- prefill

    def next_prefill(self) -> list[Job]:
        """Take the jobs of the next prefill pass out of the queue; none if nothing may start now.

        Either one long or half-done prompt, of which a chunk is done, or short ones together. Call
        ``begin`` with them, and ``prefilled``, ``retry_alone`` or ``abandon`` when they are done.
        """
        picked = self._pick()
        # Rows of one adapter become neighbours.
        picked.sort(key=lambda job: job.request.work.adapter or "")
        return picked

    def begin(self, jobs: list[Job]) -> int:
        """Give jobs a cache if they have none yet; returns the length of their pass."""
        longest = max(len(job.tokens) - job.done for job in jobs)
        if jobs[0].cache is None:
            cache = self._kv.start_prefill(rows=len(jobs), length=longest)
            for row, job in enumerate(jobs):
                job.cache, job.row = cache, row
        return min(longest, self._prefill_tokens)

    def prefilled(self, jobs: Iterable[Job]) -> None:
        """Go on with jobs after their pass; ``job.sequences`` are those that need a row."""
        for job in jobs:
            if job.done < len(job.tokens):
                # Behind the tenant's other jobs, so that short ones need not wait for all of it.
                self._partial.append(job)
                job.request.account.waiting.append(job)
            elif job.sequences:
                self._ready.append(job)
            else:
                self._release(job)

    def retry_alone(self, jobs: list[Job]) -> None:
        """Queue jobs again whose pass failed, each to be run by itself."""
        for job in reversed(jobs):
            self._release(job)
            job.alone = True
            job.request.account.waiting.appendleft(job)

    def abandon(self, job: Job) -> None:
        """Give up a job whose pass failed. The rest of its request is the caller's to drop."""
        self._release(job)

    def _pick(self) -> list[Job]:
        picked: list[Job] = []
        longest = 0
        for _, job in self._waiting.offers():
            tokens = len(job.tokens) - job.done
            solitary = job.cache is not None or job.alone or tokens > self._prefill_tokens
            longest = max(longest, tokens)
            padded = (len(picked) + 1) * longest
            if picked and (solitary or padded > self._prefill_tokens):
                break
            if job.cache is None and not self._may_start(job, picked, padded, longest):
                continue
            self._take(job, picked)
            if solitary:
                break
        if not picked and self._partial:
            # Nothing new may start; what holds memory should get on.
            self._take(min(self._partial, key=lambda job: job.request.account.served), picked)
        return picked

    def _take(self, job: Job, picked: list[Job]) -> None:
        account = job.request.account
        account.waiting.remove(job)
        account.served += min(len(job.tokens) - job.done, self._prefill_tokens)
        if job.cache is not None:
            self._partial.remove(job)
        picked.append(job)

    def _may_start(self, job: Job, picked: list[Job], padded: int, longest: int) -> bool:
        """Whether there is, or fairness will make, a row and memory for at least one sequence."""
        tenant = job.request.work.tenant
        promised = [sequence for other in self._ready for sequence in other.sequences]
        promised += [j.sequences[0] for j in (*self._partial, *picked) if j.needs_row]
        claims = self.running + promised
        if job.needs_row and len(claims) >= self._max_sequences:
            mine = sum(sequence.request.work.tenant == tenant for sequence in claims)
            if to_take_back(self._rows(), tenant, mine, 1) is None:
                return False
        lane = self._kv.lane_for(len(job.tokens))
        need = len(job.tokens) + 1
        while not self._kv.fits(
            prefill=padded,
            lane=lane,
            rows=len(lane.rows) + len(picked) + job.needs_row,
            length=max(lane.longest, longest) + 1,
        ):
            mine = sum(s.num_cached for s in claims if s.request.work.tenant == tenant)
            victim = to_take_back(self._tokens(), tenant, mine, need)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    # ---- rows

    def place(self) -> None:
        """Give rows to sequences whose prefill is done, as far as rows and memory go."""
        self._ready.sort(key=lambda job: (job.request.account.served, job.request.age))
        for job in list(self._ready):
            if job in self._ready:  # else it had to give way to one before it
                self._place(job)

    def _place(self, job: Job) -> None:
        length = len(job.tokens)
        lane = self._kv.lane_for(length)
        while job.sequences:
            rows = min(len(job.sequences), self._max_sequences - len(self.running))
            while rows and not self._kv.make_room(
                lane, rows=len(lane.rows) + rows, length=max(lane.longest, length) + 1
            ):
                rows //= 2
            if rows and job.cache is not None:
                lane.insert(job.sequences[:rows], job.cache, job.row)
                del job.sequences[:rows]
            elif not self._make_way(job):
                return
        self._ready.remove(job)
        self._release(job)

    def _make_way(self, job: Job) -> bool:
        """Free something for a job that has no room; False if it should wait."""
        if not self.running:
            # Nothing will become free by itself: the prefills in memory block each other.
            return self._drop_prefill(keep=job)
        tenant = job.request.work.tenant
        if len(self.running) >= self._max_sequences:
            holdings, need = list(self._rows()), 1
        else:
            holdings, need = list(self._tokens()), len(job.tokens) + 1
        mine = sum(holding.weight for holding in holdings if holding.tenant == tenant)
        victim = to_take_back(holdings, tenant, mine, need)
        if victim is not None:
            self._preempt(victim)
        return victim is not None

    def prepare(self, lane: Lane) -> None:
        """Make sure that every sequence of a lane can get one more token."""
        for sequence in [s for s in lane.rows if s.num_cached >= lane.ceiling]:
            self._move_up(sequence, lane)
        while lane.rows and not self._kv.make_room(
            lane, rows=len(lane.rows), length=lane.longest + 1
        ):
            if not self._drop_prefill():
                self._preempt(max(self.running, key=lambda sequence: sequence.age))

    def start_over(self) -> None:
        """Give up everything in memory; all of it waits and goes on where it was.

        For when memory that should be there is not, which may happen in the middle of anything.
        """
        for job in list(self._partial):
            self._release(job)
        lost = {sequence for lane in self._kv.lanes for sequence in lane.reset()}
        for job in self._ready:
            lost.update(job.sequences)
            self._release(job)
        self._ready = []
        for sequence in sorted(lost, key=lambda s: s.age, reverse=True):
            self._wait_again(sequence)

    def _move_up(self, sequence: Sequence, lane: Lane) -> None:
        length = sequence.num_cached
        longer = self._kv.lane_for(length)
        rows, longest = len(longer.rows) + 1, max(longer.longest, length) + 1
        if self._kv.make_room(longer, rows=rows, length=longest):
            longer.insert([sequence], lane.cache, lane.rows.index(sequence))
            lane.remove(sequence)
        else:
            self._preempt(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self.leave(sequence)
        self._wait_again(sequence)

    def _wait_again(self, sequence: Sequence) -> None:
        request = sequence.request
        job = Job(request, request.prompt + sequence.tokens, [sequence])
        request.account.waiting.appendleft(job)

    def _drop_prefill(self, keep: Job | None = None) -> bool:
        """Give up the youngest prefill in memory, to be done again; False if there is none."""
        held = [job for job in (*self._ready, *self._partial) if job is not keep]
        if not held:
            return False
        job = max(held, key=lambda job: job.request.age)
        self._release(job)
        if job in self._ready:
            self._ready.remove(job)
            for sequence in reversed(job.sequences):
                self._wait_again(sequence)
        return True

    def _release(self, job: Job) -> None:
        if job in self._partial:
            self._partial.remove(job)
        if job.cache is not None:
            self._kv.end_prefill(job.cache)
            job.cache, job.row, job.done = None, 0, 0

    def _rows(self) -> Iterator[Holding[Sequence]]:
        """Running sequences, each weighing one row."""
        for age, sequence in enumerate(sorted(self.running, key=lambda s: s.age)):
            yield Holding(sequence, sequence.request.work.tenant, 1, age)

    def _tokens(self) -> Iterator[Holding[Sequence]]:
        """Running sequences, each weighing the tokens it keeps."""
        for age, sequence in enumerate(sorted(self.running, key=lambda s: s.age)):
            yield Holding(sequence, sequence.request.work.tenant, sequence.num_cached, age)
