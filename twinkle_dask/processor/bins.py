"""Which rows share a packed row."""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from twinkle_dask.types import Json


def packed_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows put together so that few sums of lengths exceed nothing and leave little free.

    Best fit, longest rows first. A row longer than ``capacity`` stays alone.

    Returns:
        Row numbers of each bin; every row is in one. Bins stand by their first row, and rows in
        their order, so the result depends on the lengths alone.
    """
    # Free space of bins that are open, ascending, with the bin's number beside it.
    free: list[tuple[int, int]] = []
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(free, (lengths[row], -1))
        if place == len(free):
            bins.append([row])
            left, number = capacity - lengths[row], len(bins) - 1
        else:
            left, number = free.pop(place)
            left -= lengths[row]
            bins[number].append(row)
        if left > 0:
            bisect.insort(free, (left, number))
    return sorted(sorted(rows) for rows in bins)


def joined(rows: Sequence[Mapping[str, Any]]) -> Json:
    """Rows as one: columns of numbers are put end to end, the others become lists.

    Position ids begin again at each row, which is how a trainer tells the rows apart.
    """
    made: Json = {}
    for key in rows[0]:
        values = [row.get(key) for row in rows]
        if all(_numbers(value) for value in values):
            made[key] = [number for value in values if value for number in value]
        else:
            made[key] = values
    return made


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int | float)
        for item in value[:1]  # pyright: ignore[reportUnknownVariableType]
    )
