"""Batches of a data set: in which order, how many, and where an iteration stands.

The order of an epoch is computed from the number of rows, the seed and the epoch alone, so nothing
but a position is kept, and any worker can give the next batch.
"""

import functools
import math

import numpy as np

from twinkle_dask.errors import Conflict, InvalidRequest, NotSupported
from twinkle_dask.processor.rows import Rows
from twinkle_dask.processor.states import DatasetState, LoaderState
from twinkle_dask.types import Json


def end_of(loader: LoaderState, num_rows: int, start: int = 0) -> int:
    """Where an epoch that begins at ``start`` ends: without its last rows if those are too few.

    They are too few for ``drop_last`` if they fill no batch, else below ``min_batch_size``.
    """
    tail = max(num_rows - start, 0) % loader.batch_size
    smallest = loader.batch_size if loader.drop_last else (loader.min_batch_size or 0)
    return num_rows - tail if tail < smallest else num_rows


def num_batches(loader: LoaderState, num_rows: int) -> int:
    """Batches of a whole epoch: as many as an iteration gives."""
    return math.ceil(end_of(loader, num_rows) / loader.batch_size)


def skipped(loader: LoaderState, consumed: int, num_rows: int) -> LoaderState:
    """Let the next iteration go on after so many rows, counted over all epochs."""
    rows_of_epoch = end_of(loader, num_rows)
    epoch, position = divmod(consumed, rows_of_epoch) if rows_of_epoch else (0, 0)
    return loader.model_copy(
        update={
            "consumed": consumed,
            "epoch": epoch,
            "position": position,
            "pending": True,
            "iterating": False,
        }
    )


def begun(loader: LoaderState, dataset: DatasetState) -> LoaderState:
    """Start an iteration: the next epoch, or the one that was skipped into."""
    update = {"iterating": True, "pending": False, "data_version": dataset.data_version}
    if not loader.pending:
        update |= {"epoch": loader.epoch + 1, "position": 0}
    return loader.model_copy(update=update)


def check_iterating(loader: LoaderState, dataset: DatasetState) -> None:
    """Whether there is an iteration to go on with.

    Raises:
        InvalidRequest: ``__iter__`` was not called.
        Conflict: The rows are others by now.
    """
    if not loader.iterating:
        raise InvalidRequest("Begin an iteration with __iter__ first.")
    if loader.data_version != dataset.data_version:
        raise Conflict("The data set was changed since __iter__; begin another iteration.")


def next_numbers(loader: LoaderState, num_rows: int) -> list[int]:
    """The rows of the next batch; none at the end."""
    end = end_of(loader, num_rows, loader.position)
    places = range(loader.position, min(loader.position + loader.batch_size, end))
    if not loader.shuffle:
        return list(places)
    order = _order(num_rows, loader.seed, loader.epoch)
    return [int(order[place]) for place in places]


def advanced(loader: LoaderState, num_rows: int) -> LoaderState:
    """The state after a batch of so many rows."""
    return loader.model_copy(
        update={
            "position": loader.position + num_rows,
            "consumed": loader.consumed + num_rows,
        }
    )


def batch_of(loader: LoaderState, rows: Rows, numbers: list[int]) -> tuple[list[Json], list[int]]:
    """The rows of a batch, and their numbers.

    A row that a lazy data set cannot make is replaced by another one, drawn by seed, epoch and
    place, so that a batch has as many rows as its length says.

    Raises:
        InvalidRequest: None of ``max_retries`` others can be made either.
    """
    made: list[Json] = []
    used: list[int] = []
    for place, number in enumerate(numbers, loader.position):
        row, used_number = _row_or_other(loader, rows, number, place)
        made.append(row)
        used.append(used_number)
    return made, used


def _row_or_other(loader: LoaderState, rows: Rows, number: int, place: int) -> tuple[Json, int]:
    why = "it is left out"
    try:
        row = rows.row(number)
    except (InvalidRequest, NotSupported) as error:
        row, why = None, error.message
    if row is not None:
        return row, number
    draw = np.random.default_rng([loader.seed, loader.epoch, place])
    for other in draw.integers(len(rows), size=loader.max_retries).tolist():
        try:
            row = rows.row(other)
        except (InvalidRequest, NotSupported):
            continue
        if row is not None:
            return row, other
    raise InvalidRequest(
        f"Row {number} cannot be had ({why}), nor can {loader.max_retries} others in its place."
    )


@functools.lru_cache(maxsize=8)
def _order(num_rows: int, seed: int, epoch: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.random.default_rng([seed, epoch]).permutation(num_rows)
