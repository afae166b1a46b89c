"""Where running sequences keep their keys and values, and how much memory that may take.

A decode pass needs its rows side by side in one tensor, all as long as the longest. So sequences
run in a few *lanes* by length: a long one shares neither its width nor its memory with many short
ones. Within a lane the rows are dense and those of one adapter are neighbours, which keeps the
segments of a pass few and free of copies; when a sequence comes or goes, at most one row of each
other adapter moves.
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass

from twinkle_dask.model.lora import BatchPlan, LoraTensors
from twinkle_dask.sampler.kv_cache import KvLayout, SlotCache, aligned
from twinkle_dask.sampler.plans import PlanMaker, segments_of
from twinkle_dask.sampler.sequences import Sequence


@dataclass(slots=True)
class _Group:
    """Neighbouring rows of one adapter."""

    adapter: LoraTensors | None
    size: int


class Lane:
    """Running sequences of up to ``ceiling`` tokens.

    Attributes:
        rows: The sequences in the order of their slots.
        version: Grows whenever ``rows`` changes.
    """

    def __init__(self, layout: KvLayout, ceiling: int) -> None:
        self.ceiling = ceiling
        self._layout = layout
        self.cache = SlotCache(layout, slots=0, capacity=0)
        self.rows: list[Sequence] = []
        self.version = 0
        self._groups: list[_Group] = []
        self._plans = PlanMaker()

    @property
    def longest(self) -> int:
        """Tokens that the longest sequence keeps; 0 without sequences."""
        return max((sequence.num_cached for sequence in self.rows), default=0)

    def plan(self, rows: slice) -> BatchPlan:
        """Which of these rows wear which adapter."""
        adapters = [sequence.adapter for sequence in self.rows[rows]]
        if len(adapters) == len(self.rows):
            return self._plans.plan(adapters)
        return BatchPlan(segments_of(adapters))

    def insert(self, sequences: Several[Sequence], source: SlotCache, source_row: int) -> None:
        """Add sequences of one adapter and one length, copying what ``source`` has of them."""
        adapter, length = sequences[0].adapter, sequences[0].num_cached
        end = 0
        for sequence in sequences:
            end = self._open(adapter, sequence)
        self.cache.copy(source, source_row, slice(end - len(sequences), end), length)
        self.version += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out and clear its slot."""
        hole = self.rows.index(sequence)
        self.cache.clear(hole, self._extent(sequence))
        end = 0
        for group in list(self._groups):
            end += group.size
            if end <= hole:
                continue
            if end - 1 > hole:
                self._move(end - 1, hole)
            if sequence.adapter is group.adapter:
                group.size -= 1
            hole = end - 1
        self.rows.pop()
        self._groups = [group for group in self._groups if group.size]
        self.version += 1

    def reshape(self, slots: int, capacity: int) -> None:
        """Change the size of the cache to one that still holds the sequences."""
        length = min(self.longest, capacity)
        self.cache.reshape(slots=slots, capacity=capacity, rows=len(self.rows), length=length)

    def reset(self) -> list[Sequence]:
        """Start over with an empty cache; returns the sequences that were here."""
        lost, self.rows, self._groups = self.rows, [], []
        self.cache = SlotCache(self._layout, slots=0, capacity=0)
        self.version += 1
        return lost

    def _open(self, adapter: LoraTensors | None, sequence: Sequence) -> int:
        """Put a sequence behind the others of its adapter; returns the row after it."""
        hole = len(self.rows)
        self.rows.append(sequence)
        place = next((g for g in self._groups if g.adapter is adapter), None)
        if place is None:
            place = _Group(adapter, 0)
            self._groups.append(place)
        for group in reversed(self._groups):
            if group is place:
                break
            self._move(hole - group.size, hole)
            hole -= group.size
        place.size += 1
        self.rows[hole] = sequence
        return hole + 1

    def _move(self, source: int, target: int) -> None:
        self.rows[target] = self.rows[source]
        self.cache.move(source, target, self._extent(self.rows[source]))

    def _extent(self, sequence: Sequence) -> int:
        # A pass that failed may have left something at the next position as well.
        return min(sequence.num_cached + 1, self.cache.capacity)


class KvMemory:
    """All lanes and prefills, within one bound.

    A sequence needs its slot twice while it moves from a prefill or a shorter lane to its lane, so
    the longest one allowed, ``max_length``, is half of what the bound holds.
    """

    def __init__(self, layout: KvLayout, *, max_bytes: int, ceilings: Several[int]) -> None:
        """Set up empty lanes.

        Args:
            layout: What one token takes.
            max_bytes: Bound of everything here.
            ceilings: Lengths at which lanes end, growing; the last lane takes what is longer.
        """
        self._layout = layout
        self._max_tokens = max_bytes // layout.token_bytes
        self.max_length = self._max_tokens // 2 - self._max_tokens // 2 % 16
        bounds = [c for c in map(aligned, ceilings) if c < self.max_length]
        self.lanes = [Lane(layout, ceiling) for ceiling in (*bounds, self.max_length)]
        self._prefills: dict[SlotCache, int] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes taken at the moment."""
        tokens = sum(cache.num_tokens for cache in self._caches())
        return tokens * self._layout.token_bytes

    def lane_for(self, length: int) -> Lane:
        """The lane for a sequence that keeps ``length`` tokens and is about to get one more."""
        return next(lane for lane in self.lanes if length < lane.ceiling or lane is self.lanes[-1])

    def fits(self, *, prefill: int, lane: Lane, rows: int, length: int) -> bool:
        """Whether a prefill of so many tokens and such a lane can both be had now, at least."""
        others = sum(cache.num_tokens for cache in self._prefills)
        others += sum(_least(other) for other in self.lanes if other is not lane)
        return others + prefill + rows * aligned(length) <= self._max_tokens

    def start_prefill(self, *, rows: int, length: int) -> SlotCache:
        """A cache for a prefill that ``fits``; each row is given back with ``end_prefill``."""
        if not self._free(rows * length):
            raise ValueError("a prefill was started that does not fit")
        cache = SlotCache(self._layout, slots=rows, capacity=length)
        self._prefills[cache] = rows
        return cache

    def end_prefill(self, cache: SlotCache) -> None:
        """Say that one row of a prefill is no longer needed."""
        self._prefills[cache] -= 1
        if not self._prefills[cache]:
            del self._prefills[cache]

    def make_room(self, lane: Lane, *, rows: int, length: int) -> bool:
        """Let a lane hold ``rows`` sequences of ``length`` tokens; False if the bound forbids it.

        Slots and their size grow to powers of two, so that growing is rare, or just as far as the
        bound allows.
        """
        cache = lane.cache
        if rows <= cache.slots and length <= cache.capacity:
            return True
        many = max(_power(rows, least=4), cache.slots)
        wide = min(_power(length, least=64), lane.ceiling)
        for slots, capacity in (
            (many, max(wide, cache.capacity)),
            (many, wide),
            (rows, wide),
            (rows, aligned(length)),
        ):
            if self._free(slots * capacity, instead_of=lane):
                lane.reshape(slots, capacity)
                return True
        return False

    def _free(self, num_tokens: int, instead_of: Lane | None = None) -> bool:
        """Whether so much is free or can be freed by shrinking lanes that hold more than needed."""
        others = [lane for lane in self.lanes if lane is not instead_of]

        def taken() -> int:
            return sum(cache.num_tokens for cache in self._caches()) - (
                0 if instead_of is None else instead_of.cache.num_tokens
            )

        if taken() + num_tokens <= self._max_tokens:
            return True
        prefills = sum(cache.num_tokens for cache in self._prefills)
        if prefills + sum(map(_least, others)) + num_tokens > self._max_tokens:
            return False
        for lane in others:
            if lane.cache.num_tokens > _least(lane):
                lane.reshape(len(lane.rows), _width(lane))
        return True

    def _caches(self) -> list[SlotCache]:
        return [lane.cache for lane in self.lanes] + list(self._prefills)


def _power(number: int, *, least: int) -> int:
    """The next power of two, at least ``least``."""
    return max(least, 1 << (number - 1).bit_length())


def _width(lane: Lane) -> int:
    """The least capacity with which the lane's sequences can each get one more token."""
    return min(aligned(lane.longest + 1), lane.ceiling) if lane.rows else 0


def _least(lane: Lane) -> int:
    return len(lane.rows) * _width(lane)
