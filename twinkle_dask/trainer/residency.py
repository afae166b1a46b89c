"""Which runs' buffers are on the device, and who waits for a place there.

A run that has work is *active*: its buffers are on the device and count as large as they can get.
Without work it *rests*: it stays as it is, counts what it holds, and leaves when somebody needs the
place, the one first that was used longest ago. Where it left to is ``paging``'s business.

    absent ──admitted──► entering ──made──► active ◄──admitted── resting ──evicted──► leaving
                             ▲                 └──────no work──────►┘                    │
                             └───────────────admitted── out ◄───────────written──────────┘

Runs that have work and are not active are held in the queues and wait here for admission: first
the tenant that has fewest bytes active, then who waited longest. When all places are taken by
active runs, those that have had their turn (an optimizer step, after which there is no gradient to
move, or some works without one) begin nothing more, and make place once what they began has ended.
So nobody waits for ever, and no run is refused for want of a place; only one that would not fit
alone is.
"""

import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any

from twinkle_dask.errors import HostLost, InvalidRequest, NotFound
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.init import init_adapter
from twinkle_dask.trainer.layout import Layouts
from twinkle_dask.trainer.paging import Paged, Pager, PagingConfig
from twinkle_dask.trainer.places import Place, Slot, WaitingLine
from twinkle_dask.trainer.queues import RunQueues
from twinkle_dask.trainer.run import Buffers, Run
from twinkle_dask.trainer.work import CreateRun, LoadState, Work
from twinkle_dask.types import LoraSpec, RunId, RunState, TenantId

logger = logging.getLogger(__name__)

_TURN_WORKS = 8
_RETRY_S = 5.0


class Residency:
    """All runs of a trainer. Used by the engine's thread, apart from ``waiting``.

    Args:
        base: For which runs are.
        queues: Told which runs to hold.
        config: None bounds nothing.
        lanes: Most slices of one pass, each of which has a gradient of its own.
    """

    def __init__(
        self, base: BaseModel, queues: RunQueues, config: PagingConfig | None, *, lanes: int = 1
    ) -> None:
        self._base = base
        self._queues = queues
        self._lanes = lanes
        self._layouts = Layouts(base)
        self._limit = None if config is None else config.device_bytes
        self._pager = None if config is None else Pager(config, base.device)
        self._slots: dict[RunId, Slot] = {}
        self._idle: OrderedDict[RunId, None] = OrderedDict()  # resting; used longest ago first
        self._active: OrderedDict[RunId, None] = OrderedDict()
        self._yielding: set[RunId] = set()
        self._waiting = WaitingLine()
        self._to_read: dict[RunId, LoadState] = {}
        self._lost: set[RunId] = set()
        self._at_work: set[RunId] = set()  # has work, whether it exists or not
        self._moved: deque[tuple[RunId, Slot, Future[Any]]] = deque()
        self._counted = 0
        self._leaving_bytes = 0
        self._active_bytes: Counter[TenantId] = Counter()
        self._due = False
        self._no_room: str | None = None
        self._retry: threading.Timer | None = None
        self.on_moved: Callable[[], None] = lambda: None

    def names(self) -> tuple[RunId, ...]:
        """The runs that exist, wherever they are."""
        return tuple(name for name, slot in self._slots.items() if slot.exists)

    def known(self) -> tuple[RunId, ...]:
        """The runs that exist, were lost, or have work; all that ``drop`` may free something of."""
        return tuple({**dict.fromkeys(self._slots), **dict.fromkeys(self._at_work | self._lost)})

    def get(self, name: RunId) -> Run:
        """A run that is active.

        Raises:
            NotFound: There is no such run.
            HostLost: It could not be read back.
        """
        if name in self._lost:
            raise HostLost(f"The state of run {name!r} was lost on this host.")
        slot = self._slots.get(name)
        if slot is None or not slot.exists:
            raise NotFound(f"There is no run {name!r}.")
        assert slot.run is not None
        return slot.run

    def create(self, name: RunId, spec: LoraSpec) -> None:
        """Make a run with a fresh adapter; it exists from here on.

        Raises:
            InvalidRequest: It exists already, or is too large for any trainer with this limit.
        """
        slot = self._slots.get(name)
        if slot is not None and slot.exists:
            raise InvalidRequest(f"There is a run {name!r} already.")
        self._check_size(spec)
        made = None
        if slot is not None:
            made, slot.made = slot.made, None
        self._put(name, self._fresh(spec) if made is None else made.result())

    def load(self, name: RunId, state: RunState, *, with_optimizer: bool) -> None:
        """Put a saved state in a run's place; it exists from here on.

        Raises:
            InvalidRequest: The state fits neither the base model nor the run that it replaces, or
                it is too large.
        """
        slot, saved = self._slots.get(name), state.adapter.spec
        if slot is not None and slot.exists:
            # Dropout is how a run learns, not what its weights mean.
            saved = replace(saved, dropout=slot.spec.dropout)
            if replace(slot.spec, seed=0) != replace(saved, seed=0):
                raise InvalidRequest(f"The saved adapter is {saved}, but the run's is {slot.spec}.")
            state = replace(state, adapter=replace(state.adapter, spec=saved))
        self._check_size(saved)
        layout = self._layouts.of(state.adapter.spec)
        self._put(name, Run.of_state(self._base, layout, state, with_optimizer=with_optimizer))

    def drop(self, name: RunId) -> None:
        """Free everything of a run, whose work was cancelled before."""
        self._lost.discard(name)
        self._at_work.discard(name)
        self._forget(name)

    def work_added(self, work: Work) -> None:
        """A run has more work than before."""
        self._at_work.add(work.run)
        self._look(work.run)

    def work_ended(self, name: RunId, *, stepped: bool) -> None:
        """A work of a run has ended, or all of it was cancelled."""
        if (slot := self._slots.get(name)) is not None:
            if stepped:
                self._grow(name, slot)
            slot.ended += 1
            slot.turn_is_over |= stepped or slot.ended >= _TURN_WORKS
            self._due = self._due or (slot.turn_is_over and len(self._waiting) > 0)
        self._look(name)

    @property
    def due(self) -> bool:
        """Whether ``advance`` would do something now."""
        return bool(
            self._due
            or self._moved
            or self._yielding
            or any(body.state.done() for body in self._to_read.values())
        )

    def advance(self) -> list[RunId]:
        """Take up what has moved, and admit who can be.

        Returns:
            Runs whose buffers could not be read back: they are gone, and their work is without a
            run.
        """
        self._due = False
        lost: list[RunId] = []
        while self._moved:
            name, slot, future = self._moved.popleft()
            if self._slots.get(name) is not slot:
                self._discard(future)
            elif not self._take_up(name, slot, future):
                lost.append(name)
        for name in [name for name, body in self._to_read.items() if body.state.done()]:
            del self._to_read[name]
            self._look(name)
        for name in tuple(self._yielding):
            self._yield(name)
        if self._no_room is None:
            while (name := self._waiting.first(self._active_bytes)) is not None and (
                self._admit(name)
            ):
                pass
        else:
            self._admit_what_fits()
        return lost

    def waiting(self) -> tuple[RunId, ...]:
        """Runs that have work and wait for a place. Any thread."""
        return self._waiting.names()

    @property
    def reason(self) -> str:
        """Why they wait, in words for their tenants. Any thread."""
        why = (
            f"The trainer's memory for adapters (engine.adapter_bytes, {self._limit} bytes) is "
            "taken by runs that have work in progress; this run goes on in its turn."
        )
        problem = self._no_room
        return why if problem is None else f"{why} {problem}"

    def close(self) -> None:
        """Remove what lies in files, and end the threads."""
        if self._retry is not None:
            self._retry.cancel()
        if self._pager is not None:
            self._pager.close()

    # One run.

    def _look(self, name: RunId) -> None:
        """Do what follows from the work that a run has now."""
        front = self._queues.front(name)
        slot = self._slots.get(name)
        if front is None:
            self._at_work.discard(name)
        if slot is None:
            self._look_at_absent(name, front)
        elif front is None and slot.place is Place.ACTIVE:
            self._rest(name, slot)
        elif front is None:
            self._waiting.remove(name)
            if slot.place is Place.RESTING:
                self._idle[name] = None
        elif slot.place is Place.RESTING and self._limit is None:
            self._activate(name, slot)
        elif slot.place is Place.RESTING or slot.place is Place.OUT:
            self._idle.pop(name, None)
            self._queues.hold(name)
            self._want(name, slot.tenant)
        elif slot.place is not Place.ACTIVE:
            self._queues.hold(name)
        elif name in self._yielding:
            self._yield(name)

    def _look_at_absent(self, name: RunId, front: Work | None) -> None:
        self._to_read.pop(name, None)
        spec: LoraSpec | None = None
        if front is not None and self._limit is not None:
            match front.body:
                case LoadState() if not front.body.state.done():
                    # How large it is will be known then; the work cannot be done before anyway.
                    self._to_read[name] = front.body
                    self._queues.hold(name)
                    return
                case LoadState():
                    spec = _spec_of(front.body)
                case CreateRun():
                    spec = front.body.spec
                case _:
                    pass
        if front is not None and spec is not None and self._can_be(spec):
            self._queues.hold(name)
            self._want(name, front.tenant)
        else:
            self._waiting.remove(name)
            self._queues.release(name)

    def _can_be(self, spec: LoraSpec) -> bool:
        """Whether a place may be kept; what cannot be is refused when its turn comes."""
        if not 1 <= spec.rank <= self._base.facts.max_rank:
            return False
        try:
            return self._limit is None or self._full_bytes(spec) <= self._limit
        except InvalidRequest:  # it names nothing that this model has
            return False

    def _check_size(self, spec: LoraSpec) -> None:
        if self._limit is not None and (needed := self._full_bytes(spec)) > self._limit:
            raise InvalidRequest(
                f"A run of rank {spec.rank} with these targets needs {needed} bytes while it "
                f"trains, and this server has {self._limit} for adapters (engine.adapter_bytes). "
                "Choose a smaller rank or fewer targets."
            )

    def _full_bytes(self, spec: LoraSpec) -> int:
        """A run's size while it trains.

        Float32 weights, two moments, a gradient, one in the making; of the weights a copy in the
        dtype of the computation; and what each slice of a pass adds to the gradient, which is in
        that dtype too, apart from the head's.
        """
        layout, itemsize = self._layouts.of(spec), self._base.dtype.itemsize
        of_slice = layout.body_size * itemsize + (layout.size - layout.body_size) * 4
        return layout.size * (5 * 4 + itemsize) + self._lanes * of_slice

    def _fresh(self, spec: LoraSpec) -> Run:
        state = RunState(adapter=init_adapter(self._base.targets(spec), spec))
        layout = self._layouts.of(spec)
        return Run.of_state(self._base, layout, state, with_optimizer=False)

    def _put(self, name: RunId, run: Run) -> None:
        slot = self._slots.get(name)
        if slot is None:  # nobody kept a place for it, because there is no limit
            front = self._queues.front(name)
            assert front is not None
            slot = self._new_slot(name, run.spec, front.tenant)
            self._count(name, slot, slot.full_bytes, Place.ACTIVE)
        # Another work may have been to make it, and was cancelled.
        slot.spec, slot.run, slot.exists, slot.made = run.spec, run, True, None
        self._grow(name, slot)
        self._lost.discard(name)

    def _grow(self, name: RunId, slot: Slot) -> None:
        """Count what an optimizer remembers beyond two moments, of which there is seldom more.

        Never more than the limit, or the run could not come back.
        """
        if slot.run is not None and (more := slot.run.bytes_beyond_moments) > slot.more_bytes:
            full = slot.full_bytes + more - slot.more_bytes
            slot.more_bytes = more
            slot.full_bytes = full if self._limit is None else min(full, self._limit)
            if slot.place is Place.ACTIVE:
                self._count(name, slot, slot.full_bytes, Place.ACTIVE)

    def _new_slot(self, name: RunId, spec: LoraSpec, tenant: TenantId) -> Slot:
        slot = Slot(
            spec=spec,
            tenant=tenant,
            place=Place.OUT,
            full_bytes=self._full_bytes(spec),
            exists=False,
        )
        self._slots[name] = slot
        return slot

    def _count(self, name: RunId, slot: Slot, num_bytes: int, place: Place) -> None:
        """Move a slot to a place where it counts so many bytes."""
        busy = (Place.ACTIVE, Place.ENTERING)
        if slot.place in busy:
            self._active_bytes[slot.tenant] -= slot.counted
            if not self._active_bytes[slot.tenant]:
                del self._active_bytes[slot.tenant]
        if place in busy:
            self._active_bytes[slot.tenant] += num_bytes
        if slot.place is Place.LEAVING:
            self._leaving_bytes -= slot.counted
        if place is Place.LEAVING:
            self._leaving_bytes += num_bytes
        if place is Place.ACTIVE:
            self._active[name] = None
        else:
            self._active.pop(name, None)
        self._counted += num_bytes - slot.counted
        slot.place, slot.counted = place, num_bytes
        self._due = self._due or len(self._waiting) > 0

    def _forget(self, name: RunId) -> None:
        slot = self._slots.pop(name, None)
        self._waiting.remove(name)
        self._to_read.pop(name, None)
        self._idle.pop(name, None)
        self._yielding.discard(name)
        self._queues.release(name)
        if slot is not None:
            self._count(name, slot, 0, Place.OUT)
            if slot.paged is not None and self._pager is not None:
                self._pager.discard(slot.paged)
                slot.paged = None

    def _rest(self, name: RunId, slot: Slot) -> None:
        self._yielding.discard(name)
        if not slot.exists:  # it was not made after all
            self._forget(name)
            return
        assert slot.run is not None
        slot.run.rest()
        self._count(name, slot, slot.run.buffers.num_bytes, Place.RESTING)
        self._idle[name] = None
        self._idle.move_to_end(name)

    # Who is next.

    def _want(self, name: RunId, tenant: TenantId) -> None:
        if name not in self._waiting:
            self._waiting.add(name, tenant)
            self._due = True

    def _admit(self, name: RunId) -> bool:
        """Give a waiting run its place, or see to it that there will be one."""
        excess = self._excess(name)
        if excess > 0:
            self._make_room(name, excess)
            return False
        return self._enter(name)

    def _admit_what_fits(self) -> None:
        """While nobody can leave, everybody who is here should get on."""
        for name in self._waiting.names():
            slot = self._slots.get(name)
            here = slot is not None and slot.place is Place.RESTING
            # Without the second, idle runs might fill the memory and none could ever work again;
            # it costs one run's gradients beyond the limit.
            if self._excess(name) <= 0 or (here and not self._active):
                self._enter(name)

    def _excess(self, name: RunId) -> int:
        """Bytes beyond the limit if a waiting run were active."""
        if self._limit is None:
            return 0
        slot = self._slots.get(name)
        if slot is None:
            needed = self._full_bytes(self._spec(name))
        else:
            needed = slot.full_bytes - slot.counted
        return self._counted + needed - self._limit

    def _spec(self, name: RunId) -> LoraSpec:
        """Of a run that is there or wants to be made."""
        if (slot := self._slots.get(name)) is not None:
            return slot.spec
        front = self._queues.front(name)
        assert front is not None
        assert isinstance(front.body, CreateRun | LoadState)
        spec = front.body.spec if isinstance(front.body, CreateRun) else _spec_of(front.body)
        assert spec is not None
        return spec

    def _enter(self, name: RunId) -> bool:
        """Give a waiting run its place. False if there is no memory; it goes on waiting then."""
        spec = self._spec(name)
        front = self._queues.front(name)
        slot = self._slots.get(name)
        coming: Future[Buffers] | None = None
        if slot is not None and slot.paged is not None:
            assert self._pager is not None
            try:
                coming = self._pager.page_in(slot.paged)
            except MemoryError as error:
                self._no_memory(error, slot)
                return False
        tenant = self._waiting.tenant(name)
        self._waiting.remove(name)
        if slot is None:
            slot = self._new_slot(name, spec, tenant)
        slot.ended, slot.turn_is_over = 0, False
        if slot.place is Place.RESTING:
            self._activate(name, slot)
        elif coming is not None:
            self._count(name, slot, slot.full_bytes, Place.ENTERING)
            self._watch(name, slot, coming)
        elif front is not None and isinstance(front.body, CreateRun) and self._pager is not None:
            self._count(name, slot, slot.full_bytes, Place.ENTERING)
            # Aside, since others should not wait: SmolLM2-135M takes 130 ms at rank 32.
            slot.made = self._pager.run(lambda: self._fresh(spec))
            self._watch(name, slot, slot.made)
        else:
            self._activate(name, slot)
        return True

    def _no_memory(self, error: MemoryError, slot: Slot) -> None:
        """Others hold more of the device than is counted; idle runs leave, and all try again."""
        if self._no_room is not None:
            return
        logger.warning("No memory for a run that has a place, it waits: %s", error)
        missing = slot.full_bytes - self._leaving_bytes
        while missing > 0 and self._idle:
            missing -= self._evict(next(iter(self._idle)))
        self._set_no_room("The device has no memory left for it at the moment.")
        self._due = True  # whoever fits should get on meanwhile

    def _activate(self, name: RunId, slot: Slot) -> None:
        self._count(name, slot, slot.full_bytes, Place.ACTIVE)
        self._queues.release(name)
        self._look(name)  # its work may have been cancelled meanwhile

    def _make_room(self, name: RunId, missing: int) -> None:
        """Have runs leave until ``missing`` bytes will be free, or until there is nobody to ask."""
        missing -= self._leaving_bytes + sum(self._slots[o].counted for o in self._yielding)
        while missing > 0 and self._idle:
            missing -= self._evict(next(iter(self._idle)))
        if missing > 0:
            # The newest first: they have longest to wait.
            for other in reversed(self._waiting.names()):
                slot = self._slots.get(other)
                if missing > 0 and slot is not None and slot.place is Place.RESTING:
                    missing -= self._evict(other) if other != name else 0
        for other in tuple(self._active):
            if missing > 0 and self._slots[other].turn_is_over and other not in self._yielding:
                missing -= self._slots[other].counted
                self._yielding.add(other)
                self._queues.hold(other)

    def _yield(self, name: RunId) -> None:
        """Let a run whose turn is over make place, or go on if nobody wants it any more."""
        if not self._waiting or self._no_room is not None:
            self._yielding.discard(name)
            self._queues.release(name)
        elif not self._queues.begun(name):
            self._rest(name, self._slots[name])
            self._look(name)

    # Moves.

    def _evict(self, name: RunId) -> int:
        """Begin to move a resting run out; returns the bytes that will be free then."""
        slot = self._slots[name]
        self._idle.pop(name, None)
        self._waiting.remove(name)  # until it is out
        assert slot.run is not None
        assert self._pager is not None
        self._count(name, slot, slot.counted, Place.LEAVING)
        self._watch(name, slot, self._pager.page_out(slot.run.buffers))
        return slot.counted

    def _watch(self, name: RunId, slot: Slot, future: "Future[Any]") -> None:
        def moved(done: "Future[Any]") -> None:
            self._moved.append((name, slot, done))
            self.on_moved()

        future.add_done_callback(moved)

    def _discard(self, future: "Future[Any]") -> None:
        """A run was dropped while it moved."""
        if self._pager is not None and not future.cancelled() and future.exception() is None:
            result = future.result()
            if isinstance(result, Paged):
                self._pager.discard(result)

    def _take_up(self, name: RunId, slot: Slot, future: "Future[Any]") -> bool:
        """A move has ended. False if the run is lost by it."""
        error = CancelledError() if future.cancelled() else future.exception()
        result: Buffers | Paged | Run | None = None if error is not None else future.result()
        if slot.place is Place.LEAVING:
            self._left(name, slot, result, error)
        elif slot.made is not None:
            self._activate(name, slot)
        elif isinstance(result, Buffers):
            slot.paged = None
            slot.run = Run(slot.spec, self._layouts.of(slot.spec), result, self._base.dtype)
            self._activate(name, slot)
        else:
            logger.error("The state of run %s could not be read back", name, exc_info=error)
            self._forget(name)
            self._lost.add(name)
            return False
        return True

    def _left(self, name: RunId, slot: Slot, result: object, error: BaseException | None) -> None:
        if isinstance(result, Paged):
            slot.paged, slot.run = result, None
            self._count(name, slot, 0, Place.OUT)
        else:
            self._count(name, slot, slot.counted, Place.RESTING)
            if self._no_room is None:
                logger.warning("Idle runs stay in memory, they cannot be written: %s", error)
                self._set_no_room(f"Idle runs cannot be written out: {error}")
        self._look(name)

    def _set_no_room(self, why: str) -> None:
        """Ask nobody to leave for a while, and let everybody on who can be."""
        self._no_room = why
        self._retry = threading.Timer(_RETRY_S, self._try_again)
        self._retry.daemon = True
        self._retry.start()

    def _try_again(self) -> None:
        self._no_room = None
        self._due = True
        self.on_moved()


def _spec_of(body: LoadState) -> LoraSpec | None:
    """Of a state that was read; None if it could not be."""
    failed = body.state.cancelled() or body.state.exception() is not None
    return None if failed else body.state.result().adapter.spec
