"""Rows in Arrow files among the blobs: written once, opened by mapping them into memory."""

import mmap
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from distributed import get_worker

from twinkle_dask.errors import QuotaExceeded
from twinkle_dask.processor.library import Rows, hf, pa
from twinkle_dask.processor.plain import plain
from twinkle_dask.processor.states import Table
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.types import Json

#: Rows that are in memory at a time while a table is written.
BATCH_ROWS: Final = 1000
_MAX_OPEN: Final = 128


class OpenTables:
    """Tables that this process has open, least recently used out first. Thread-safe.

    A table's path is never written twice, so what is open cannot be out of date.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Rows] = OrderedDict()

    def open(self, blobs: BlobStore, path: str) -> Rows:
        """A table's rows, in a file that is mapped and not read."""
        key = f"{blobs.url}|{path}"
        with self._lock:
            if (table := self._open.get(key)) is not None:
                self._open.move_to_end(key)
                return table
        if "://" in blobs.url:
            table = _opened_copy(blobs, path)
        else:
            blobs.size(path)  # checks the name, and that it is there
            table = hf.Dataset.from_file(str(Path(blobs.url, path)))
        with self._lock:
            # What was removed takes its place on the disk for as long as it is open here.
            for old in [old for old in self._open if _is_removed(old)]:
                del self._open[old]
            self._open[key] = table
            while len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        return table


def _opened_copy(blobs: BlobStore, path: str) -> Rows:
    """A table out of an object store; its file goes with the last who has it open."""
    with tempfile.TemporaryDirectory(prefix="twinkle-dask-table-", dir=work_folder()) as folder:
        copy = Path(folder, "table.arrow")
        copy.write_bytes(blobs.get(path))
        return hf.Dataset.from_file(str(copy))


def _is_removed(key: str) -> bool:
    url, _, path = key.partition("|")
    return "://" not in url and not Path(url, path).exists()


@dataclass(slots=True, kw_only=True)
class Area:
    """Where one call reads and writes tables.

    Attributes:
        folder: Of the processor, among the blobs.
        call_id: Begins the names of what this call writes; no two calls have the same.
        allowance: Bytes that this call may write.
        paths: What it has written.
        scratch: A local folder for what is made on the way; it goes when the call ends.
    """

    blobs: BlobStore
    opened: OpenTables
    folder: str
    call_id: str
    allowance: int
    scratch: Path
    paths: list[str] = field(default_factory=list[str])
    _written: int = 0
    _names: Iterator[int] = field(default_factory=lambda: iter(range(10_000)))

    def open(self, table: Table) -> Rows:
        """The rows of a table."""
        return self.opened.open(self.blobs, table.path)

    def write(self, rows: Rows) -> Table:
        """Write rows as a table.

        Raises:
            QuotaExceeded: It would be more than the allowance; nothing is left behind.
        """
        schema = rows.features.arrow_schema
        file = self.temporary()
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            arrow = rows.with_format("arrow")
            for batch in arrow.iter(batch_size=BATCH_ROWS):
                writer.write_table(batch.cast(schema))
                self.check(file.stat().st_size)
        return self._keep(file, len(rows))

    def write_rows(self, rows: Iterable[Json], features: Any = None) -> Table:
        """Write rows that come one by one; the first of them decide the columns' types."""
        return self.write(self.gathered(rows, features))

    def gathered(self, rows: Iterable[Json], features: Any = None) -> Rows:
        """Rows in memory as a data set; columns of mixed types are kept as JSON."""
        made = list(rows)
        if features is not None:
            return hf.Dataset.from_list(made, features=features)
        return hf.Dataset.from_list(made, on_mixed_types="use_json")

    def made_on_the_way(self) -> int:
        """Bytes of the scratch folder's files."""
        return sum(file.stat().st_size for file in self.scratch.iterdir() if file.is_file())

    def temporary(self) -> Path:
        """A new name in the scratch folder."""
        return self.scratch / f"temporary-{next(self._names)}.arrow"

    def check(self, num_bytes: int) -> None:
        """Whether so many bytes more may be written.

        Raises:
            QuotaExceeded: They are more than what is left.
        """
        if self._written + num_bytes > self.allowance:
            raise QuotaExceeded(
                f"The rows take more than the {self.allowance} bytes that are left of your quota "
                "for processed data. End sessions whose data sets you do not need, or prepare "
                "less at a time.",
                30.0,
            )

    def _keep(self, file: Path, num_rows: int) -> Table:
        path = f"{self.folder}/{self.call_id}-{next(self._names)}.arrow"
        num_bytes = self.put_file(path, file)
        return Table(path=path, num_rows=num_rows, num_bytes=num_bytes)

    def put_file(self, path: str, file: Path) -> int:
        """Store a local file; its bytes.

        Raises:
            QuotaExceeded: It is larger than what is left.
        """
        num_bytes = file.stat().st_size
        self.check(num_bytes)
        with file.open("rb") as opened, mapped(opened.fileno(), num_bytes) as data:
            self.blobs.put(path, data)
        self.paths.append(path)
        self._written += num_bytes
        return num_bytes


@contextmanager
def mapped(descriptor: int, num_bytes: int) -> Generator[memoryview]:
    """A file's bytes without reading them at once; an empty file cannot be mapped."""
    if not num_bytes:
        yield memoryview(b"")
        return
    with mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            yield view
        finally:
            view.release()


def row_of(rows: Rows, index: int) -> Json:
    """One row, JSON-clean."""
    return cast(Json, plain(rows[index]))


def work_folder() -> str | None:
    """Where temporary folders go: on a Dask worker into its own, which its successor clears.

    A worker that is ended in the middle of a call removes nothing itself.
    """
    try:
        return str(get_worker().local_directory)
    except ValueError:  # not on a worker
        return None


def quiet() -> None:
    """No progress bars and no cache of the library's own in this process."""
    hf.disable_progress_bars()
    hf.disable_caching()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
