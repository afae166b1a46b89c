"""Reading data sets as streams: forwards only, and from any worker.

A worker keeps the iteration that it served last, so the next row costs nothing; another worker, or
this one after a restart, opens the source again and passes over what was given already.
"""

import itertools
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias, cast

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.processor.bins import joined, packed_bins
from twinkle_dask.processor.encoding import packing_length
from twinkle_dask.processor.plain import plain
from twinkle_dask.processor.rows import Encode, applied, encoded_row
from twinkle_dask.processor.sources import Doors, stream
from twinkle_dask.processor.states import DatasetState, Part
from twinkle_dask.processor.tables import Area, work_folder
from twinkle_dask.types import Json

#: What tells one iteration from all others: the processor, its iteration, the version of the rows.
Iteration: TypeAlias = tuple[str, int, int]

_MAX_LIVE: Final = 32


@dataclass(slots=True, weakref_slot=True, eq=False)
class _Live:
    rows: Iterator[Json]
    position: int


class Streams:
    """The iterations that this process has in hand. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: OrderedDict[Iteration, _Live] = OrderedDict()

    def take(
        self,
        iteration: Iteration,
        position: int,
        number: int,
        state: DatasetState,
        area: Area,
        doors: Doors,
        encode: Encode,
    ) -> list[Json]:
        """The next rows of an iteration that has given ``position`` rows; fewer at its end."""
        with self._lock:
            live = self._live.pop(iteration, None)
        if live is None or live.position != position:
            folder = tempfile.mkdtemp(prefix="twinkle-dask-stream-", dir=work_folder())
            live = _Live(iter(()), position)
            weakref.finalize(live, shutil.rmtree, folder, ignore_errors=True)
            live.rows = opened(state, area, doors, encode, Path(folder))
            if sum(1 for _ in itertools.islice(live.rows, position)) < position:
                return []
        made = list(itertools.islice(live.rows, number))
        live.position += len(made)
        if made:
            with self._lock:
                self._live[iteration] = live
                while len(self._live) > _MAX_LIVE:
                    self._live.popitem(last=False)
        return made


def opened(
    state: DatasetState, area: Area, doors: Doors, encode: Encode, folder: Path
) -> Iterator[Json]:
    """The rows of a stream from its beginning.

    Raises:
        InvalidRequest: It is empty, or to be packed without ``pack_dataset`` or a template.
    """
    if not state.parts:
        raise InvalidRequest("The data set is empty; call add_dataset first.")
    if state.class_type == "IterablePackingDataset":
        if state.template is None:
            raise InvalidRequest("Call set_template() first.")
        if not state.packed:
            raise InvalidRequest("Call pack_dataset() first.")
        return _packed(state, area, doors, encode, folder)
    return _rows(state, area, doors, folder)


def counted(state: DatasetState, area: Area, doors: Doors, encode: Encode) -> int:
    """The length of a stream, which is read for it.

    Raises:
        InvalidRequest: It begins again for ever.
    """
    if state.cyclic:
        raise InvalidRequest("A cyclic data set has no length.")
    return sum(1 for _ in opened(state, area, doors, encode, area.scratch))


def _rows(state: DatasetState, area: Area, doors: Doors, folder: Path) -> Iterator[Json]:
    for part in state.parts:
        apply = applied(part.steps)
        for row in _part_rows(part, area, doors, folder):
            yield apply(cast(Json, plain(row)))


def _part_rows(part: Part, area: Area, doors: Doors, folder: Path) -> Iterator[Json]:
    if part.table is not None:
        return iter(area.open(part.table))
    return stream(part.source, area.blobs, doors, folder)


def _packed(
    state: DatasetState, area: Area, doors: Doors, encode: Encode, folder: Path
) -> Iterator[Json]:
    template = cast(Json, state.template)
    length = packing_length(template)
    waiting: list[Json] = []
    rows = _encoded(state, area, doors, encode, folder)
    while True:
        fresh = list(itertools.islice(rows, state.packing_interval))
        waiting += fresh
        bins = packed_bins([len(row["input_ids"]) for row in waiting], length)
        kept: list[int] = []
        if fresh and len(bins) > 1:
            # The emptiest waits for rows of the next interval that may fill it.
            kept = min(bins, key=lambda one: sum(len(waiting[i]["input_ids"]) for i in one))
            bins.remove(kept)
        elif fresh:
            kept, bins = (bins[0], []) if bins else ([], [])
        for one in bins:
            yield joined([waiting[i] for i in one])
        waiting = [waiting[i] for i in kept]
        if not fresh:
            return


def _encoded(
    state: DatasetState, area: Area, doors: Doors, encode: Encode, folder: Path
) -> Iterator[Json]:
    template = cast(Json, state.template)
    while True:
        number = 0
        for row in _rows(state, area, doors, folder):
            for made in encoded_row(row, template, False, encode):
                number += 1
                yield cast(Json, plain(made))
        if not state.cyclic or not number:
            return
