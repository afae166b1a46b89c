"""Rows as files that other programs read."""

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal, cast

import orjson

from twinkle_dask.errors import Conflict, InvalidRequest
from twinkle_dask.processor.library import pq
from twinkle_dask.processor.rows import Rows
from twinkle_dask.processor.states import DatasetState, Saving
from twinkle_dask.processor.tables import Area
from twinkle_dask.types import Json

_FORMATS: Final[dict[str, Literal["jsonl", "csv", "parquet"]]] = {
    "jsonl": "jsonl",
    "json": "jsonl",
    "csv": "csv",
    "parquet": "parquet",
    "pq": "parquet",
}
_SEGMENT: Final = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"
_NAME: Final = re.compile(rf"{_SEGMENT}(/{_SEGMENT}){{0,4}}")
_MAX_SPANS: Final = 65536
_LOOK_EVERY: Final = 100


def checked_name(path: str) -> str:
    """A name in the tenant's own area.

    Raises:
        InvalidRequest: It could mean a place outside of it.
    """
    if not _NAME.fullmatch(path):
        raise InvalidRequest(
            f"{path[:80]!r} cannot be saved to: output_path is a name in your own area of this "
            "server, such as 'cleaned.jsonl' or 'week1/cleaned.jsonl', of letters, digits, '.', "
            "'_' and '-'."
        )
    return path


def format_of(path: str, given: str | None) -> Literal["jsonl", "csv", "parquet"]:
    """What a file is written as; by the end of its name if nothing is given."""
    return _FORMATS.get(given or path.rpartition(".")[2].lower(), "jsonl")


def write(rows: Iterable[Json], kind: str, area: Area) -> Path:
    """Write rows to a file of this call. A value of a CSV cell that is no scalar is JSON."""
    file = area.temporary()
    rows = _bounded(rows, file, area)
    match kind:
        case "csv":
            _write_csv(rows, file)
        case "parquet":
            pq.write_table(area.gathered(rows).data.table, str(file))
        case _:
            with file.open("wb") as out:
                out.writelines(orjson.dumps(row) + b"\n" for row in rows)
    return file


def _bounded(rows: Iterable[Json], file: Path, area: Area) -> Iterator[Json]:
    """The rows, for as long as the file that is made of them stays within what may be written."""
    for number, row in enumerate(rows):
        if number % _LOOK_EVERY == 0 and file.exists():
            area.check(file.stat().st_size)
        yield row


def reading(state: DatasetState, numbers: Iterable[int]) -> DatasetState:
    """Note rows that were read, if a file gathers them.

    Raises:
        Conflict: The file has gathered too much.
    """
    if state.saving is None:
        return state
    spans = list(state.saving.spans)
    for number in numbers:
        if spans and spans[-1][1] == number:
            spans[-1] = (spans[-1][0], number + 1)
        else:
            spans.append((number, number + 1))
    if len(spans) > _MAX_SPANS:
        raise Conflict(
            f"{state.saving.name!r} has gathered as many rows as it can; call flush_save()."
        )
    saving = state.saving.model_copy(update={"spans": tuple(spans)})
    return state.model_copy(update={"saving": saving})


def gathered(saving: Saving, rows: Rows) -> Iterator[Json]:
    """The rows that a file has gathered; packed rows as those they were made of."""
    for start, stop in saving.spans:
        for number in range(start, stop):
            yield from cast(Iterable[Json], rows.originals(number))


def _write_csv(rows: Iterable[Json], file: Path) -> None:
    made = iter(rows)
    first = next(made, None)
    with file.open("w", encoding="utf-8", newline="") as out:
        if first is None:
            return
        writer = csv.DictWriter(out, list(first), restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerow(_cells(first))
        writer.writerows(_cells(row) for row in made)


def _cells(row: Json) -> Json:
    return {
        key: orjson.dumps(value).decode() if isinstance(value, dict | list) else value
        for key, value in row.items()
    }
