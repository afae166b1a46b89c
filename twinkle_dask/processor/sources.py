"""Reading what a client names: files below the operator's roots, saved data, a hub's data sets."""

import glob
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import orjson

from twinkle_dask.errors import InvalidRequest, NotFound, NotSupported
from twinkle_dask.processor.library import Rows as HfRows
from twinkle_dask.processor.library import hf
from twinkle_dask.processor.states import ListSlice, RangeSlice, Slice, Source
from twinkle_dask.processor.tables import Area
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.types import Json

#: How the library calls the format of a file, by the end of the name.
FORMATS: Final[Mapping[str, str]] = {
    "json": "json",
    "jsonl": "json",
    "csv": "csv",
    "txt": "text",
    "parquet": "parquet",
}
#: A slice may repeat rows, so it could name more than there are.
MAX_SLICE_ROWS: Final = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """What the operator opened.

    Attributes:
        data_roots: Folders below which clients may name files.
        allow_hub: Whether a data set of a hub may be named.
        saved: The tenant's saved data: blob paths by name.
    """

    data_roots: tuple[str, ...] = ()
    allow_hub: bool = False
    saved: Mapping[str, str]


def load(source: Source, area: Area, doors: Doors) -> HfRows:
    """All rows of a source, with its slice taken; good for as long as the call lasts.

    Raises:
        NotFound: No such file below the roots and no such saved data.
        NotSupported: A hub's data set where none are allowed, or a kind of file not read here.
        InvalidRequest: The file cannot be read as what its name says.
    """
    files = _files(source, area.blobs, doors, area.scratch)
    if files is None:
        rows = _from_hub(source, doors, streaming=False, cache=area.scratch)
    else:
        rows = _from_files(source, files, streaming=False, cache=area.scratch)
    return sliced(rows, source.data_slice)


def stream(source: Source, blobs: BlobStore, doors: Doors, folder: Path) -> Iterator[Json]:
    """The rows of a source one after another, without reading it at once.

    Files of the library's own go into ``folder``, which must stay as long as rows are read.

    Raises:
        InvalidRequest: The slice cannot be taken of a stream.
    """
    files = _files(source, blobs, doors, folder)
    if files is None:
        rows = _from_hub(source, doors, streaming=True, cache=folder)
    else:
        rows = _from_files(source, files, streaming=True, cache=folder)
    match source.data_slice:
        case None:
            return iter(cast(Iterable[Json], rows))
        case RangeSlice(start=start, stop=stop, step=step) if start >= 0 and step > 0:
            return itertools.islice(cast(Iterable[Json], rows), start, max(start, stop), step)
        case _:
            raise InvalidRequest(
                "A stream is read forwards: take its slice by an ascending range, or make a "
                "Dataset in place of an IterableDataset."
            )


def from_memory(data: object) -> HfRows:
    """Rows of the request: a list of rows, or a mapping from column to values.

    Raises:
        InvalidRequest: Something else, or columns of different length.
    """
    if isinstance(data, Mapping):
        columns = cast(Mapping[str, object], data)
        if not all(isinstance(column, list) for column in columns.values()):
            raise InvalidRequest("DatasetMeta.data as a mapping needs a list for every column.")
        lengths = {len(cast(list[Any], column)) for column in columns.values()}
        if len(lengths) > 1:
            raise InvalidRequest("The columns of DatasetMeta.data have different lengths.")
        names = list(columns)
        lists = [cast(list[Any], columns[name]) for name in names]
        data = [dict(zip(names, values, strict=True)) for values in zip(*lists, strict=True)]
    if not isinstance(data, list):
        raise InvalidRequest(
            "DatasetMeta.data is a list of rows or a mapping from column to values."
        )
    rows = cast(list[Any], data)
    if not all(isinstance(row, dict) for row in rows):
        raise InvalidRequest("Every row of DatasetMeta.data is a mapping from column to value.")
    return hf.Dataset.from_list(rows, on_mixed_types="use_json")


def rows_id(data: object) -> str:
    """Names rows of a request by what is in them."""
    return hashlib.sha256(orjson.dumps(data, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def sliced(rows: HfRows, part: Slice | None) -> HfRows:
    """The rows that a slice names; numbers beyond the end begin again at the first row."""
    match part:
        case None:
            return rows
        case RangeSlice():
            numbers: Sequence[int] = range(part.start, part.stop, part.step)
        case ListSlice():
            numbers = part.values
    if len(numbers) > MAX_SLICE_ROWS:
        raise InvalidRequest(f"data_slice names {len(numbers)} rows; {MAX_SLICE_ROWS} is the most.")
    if not len(rows):
        return rows
    return rows.select(np.asarray(numbers, dtype=np.int64) % len(rows))


def local_files(dataset_id: str, doors: Doors) -> list[str] | None:
    """The real paths of a file or of the files of a folder; None if it must be a hub's id.

    Links are followed first and must end below a root as well, so that nothing outside can be
    named; what is there outside and what is not there look the same.

    Raises:
        NotFound: It looks like a path, and there is nothing below the roots.
    """
    if "\0" in dataset_id:
        raise InvalidRequest("dataset_id has a NUL character.")
    roots = [os.path.realpath(root) for root in doors.data_roots]
    for root in roots:
        path = os.path.realpath(os.path.join(root, dataset_id))
        if not _is_below(path, roots):
            continue
        if os.path.isfile(path):
            return [path]
        if os.path.isdir(path):
            return _folder_files(path, roots, dataset_id)
    if not _looks_like_hub_id(dataset_id) or not doors.allow_hub:
        where = (
            "this server has no data folder (setting data_roots)"
            if not roots
            else "it is neither below the server's data folders nor saved data of yours"
        )
        hub = "" if doors.allow_hub else ", and data sets of a hub are not loaded here"
        raise NotFound(
            f"There is no data set {dataset_id[:200]!r}: {where}{hub}. Rows can also be sent with "
            "DatasetMeta(data=[...])."
        )
    return None


def _is_below(path: str, roots: Sequence[str]) -> bool:
    return any(os.path.commonpath([path, root]) == root for root in roots)


def _folder_files(folder: str, roots: Sequence[str], dataset_id: str) -> list[str]:
    paths = [os.path.realpath(os.path.join(folder, name)) for name in sorted(os.listdir(folder))]
    files = [p for p in paths if os.path.isfile(p) and _is_below(p, roots) and _format(p)]
    if not files:
        raise InvalidRequest(
            f"The folder {dataset_id[:200]!r} has no {', '.join(FORMATS)} file directly in it."
        )
    if len({_format(path) for path in files}) > 1:
        raise InvalidRequest(
            f"The folder {dataset_id[:200]!r} has files of several formats; name one file."
        )
    return files


def _looks_like_hub_id(dataset_id: str) -> bool:
    parts = dataset_id.split("/")
    return 1 <= len(parts) <= 2 and all(part and part[0] not in ".~" for part in parts)


def _format(path: str) -> str | None:
    return FORMATS.get(path.rpartition(".")[2].lower())


def _files(source: Source, blobs: BlobStore, doors: Doors, folder: Path) -> list[str] | None:
    blob = doors.saved.get(source.dataset_id)
    if blob is None:
        return local_files(source.dataset_id, doors)
    copy = folder / f"saved-{blob.rpartition('/')[2]}"
    copy.write_bytes(blobs.get(blob))
    return [str(copy)]


def _from_files(source: Source, files: list[str], *, streaming: bool, cache: Path) -> HfRows:
    kind = _format(files[0])
    if kind is None:
        raise NotSupported(
            f"{source.dataset_id[:200]!r} is not read here; the name of a file ends in "
            f"{', '.join(FORMATS)}."
        )
    if any("::" in file for file in files):
        raise NotSupported(f"{source.dataset_id[:200]!r} is not read here: '::' in a file's name.")
    # An empty cell of a CSV file is an empty text and not a missing number.
    extra = {"na_filter": False} if kind == "csv" else {}
    try:
        return hf.load_dataset(
            kind,
            data_files=[glob.escape(file) for file in files],
            split="train",
            streaming=streaming,
            cache_dir=str(cache),
            **extra,
        )
    except (hf.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise InvalidRequest(_unreadable(source, kind, error, files)) from error


def _unreadable(source: Source, kind: str, error: BaseException, files: Sequence[str] = ()) -> str:
    told = str(error.__cause__ or error)
    for file in files:
        told = told.replace(file, os.path.basename(file))
    return f"{source.label} cannot be read as {kind}: {told[:300]}"


def _refuse_other_places(source: Source, data_files: Mapping[str, Sequence[str]] | None) -> None:
    """Only files of the data set itself.

    The library takes an id for a folder of the server's working directory or for a format of its
    own too, and a data set of the hub may name any path or address as its file.

    Raises:
        NotSupported: It names another place, or none.
    """
    files = [str(file) for of_split in (data_files or {}).values() for file in of_split]
    own = f"hf://datasets/{source.dataset_id}@".lower()
    if not files or not all(file.lower().startswith(own) and "::" not in file for file in files):
        raise NotSupported(
            f"{source.dataset_id[:200]!r} is not read here: it is no data set of the hub that "
            "consists of files of its own."
        )


def _from_hub(source: Source, doors: Doors, *, streaming: bool, cache: Path) -> HfRows:
    if not doors.allow_hub:
        raise NotSupported("Data sets of a hub are not loaded here.")
    subset = None if source.subset_name == "default" else source.subset_name
    try:
        builder = hf.load_dataset_builder(
            source.dataset_id, subset, revision=source.revision, cache_dir=str(cache)
        )
        _refuse_other_places(source, builder.config.data_files)
        if streaming:
            return builder.as_streaming_dataset(split=source.split)
        builder.download_and_prepare()
        return builder.as_dataset(split=source.split)
    except (hf.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise NotFound(f"The hub has no data set {source.dataset_id[:200]!r}.") from error
    except (hf.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise InvalidRequest(_unreadable(source, "a hub's data set", error)) from error
