"""What is kept of a tenant's data set, loader or other processor: plain data, no library.

A state is all there is: a worker holds nothing that cannot be made again from it, so any worker
may serve the next call. Rows lie in tables (Arrow files among the blobs) that are never changed;
an operation writes new ones and returns the state that names them.
"""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from twinkle_dask.types import Json


class Frozen(BaseModel):
    """Base of states: nothing unknown, nothing changed in place."""

    model_config = ConfigDict(extra="forbid", frozen=True)


#: A row's number; wider ones do not fit the arrays that rows are picked with.
RowNumber: TypeAlias = Annotated[int, Field(ge=-(2**61), le=2**61)]


class RangeSlice(Frozen):
    """Rows by ``range(start, stop, step)``."""

    kind: Literal["range"] = "range"
    start: RowNumber
    stop: RowNumber
    step: RowNumber


class ListSlice(Frozen):
    """Rows by their numbers, in this order."""

    kind: Literal["list"] = "list"
    values: tuple[RowNumber, ...]


Slice: TypeAlias = Annotated[RangeSlice | ListSlice, Field(discriminator="kind")]


class Source(Frozen):
    """Where rows come from: a file, saved data or a hub's data set, or the request itself.

    Attributes:
        rows_id: Names rows that came with a request, by their contents; empty for the others.
    """

    dataset_id: str = ""
    subset_name: str = "default"
    split: str = "train"
    data_slice: Slice | None = None
    revision: str | None = None
    rows_id: str = ""

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"rows {self.rows_id[:8]}" if self.rows_id else repr(self.dataset_id)

    def is_like(self, other: "Source") -> bool:
        """Whether both name the same data, whatever the slice."""
        return self.identity == other.identity

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What names the data, without the slice."""
        return (self.dataset_id, self.subset_name, self.split, self.rows_id)


class Table(Frozen):
    """Rows in one Arrow file, by its path among the blobs."""

    path: str
    num_rows: int
    num_bytes: int


class MapStep(Frozen):
    """A preprocessor by name, applied when a row is asked for."""

    preprocessor: str
    arguments: Json = Field(default_factory=dict[str, Any])
    remove_columns: tuple[str, ...] = ()


class Part(Frozen):
    """One data set that was added. Without a table it is read from its source as a stream."""

    source: Source
    table: Table | None = None
    steps: tuple[MapStep, ...] = ()


class Saving(Frozen):
    """A file that gathers the rows which are read; the rows so far as (start, stop) spans."""

    name: str
    format: Literal["jsonl", "csv", "parquet"]
    spans: tuple[tuple[int, int], ...] = ()


class Cursor(Frozen):
    """Where an iteration over a stream stands.

    Attributes:
        pass_number: Counts iterations, so that a worker does not mistake an old one for this.
        position: Rows given so far.
        over: The stream has ended.
    """

    pass_number: int
    position: int = 0
    over: bool = False


DatasetClass: TypeAlias = Literal[
    "Dataset", "LazyDataset", "PackingDataset", "IterableDataset", "IterablePackingDataset"
]


class DatasetState(Frozen):
    """A data set.

    Attributes:
        parts: What was added; an eager data set is one part once it is mixed.
        interleave: How the parts of a lazy data set are mixed; None while they are not.
        steps: What a lazy data set applies after mixing.
        template: A ``TemplateSpec`` in words, if one was set.
        encoding: A lazy data set encodes on access: whether with a generation prompt.
        checking: A lazy data set leaves out what cannot be encoded, on access.
        packs: Which rows share a packed row, as a table with one column of lists.
        packed: ``pack_dataset`` was called on a stream.
        data_version: Counts changes of the rows; loaders notice by it.
        stream_rows: Length of a stream once it was counted.
    """

    kind: Literal["dataset"] = "dataset"
    class_type: DatasetClass
    parts: tuple[Part, ...] = ()
    interleave: bool | None = None
    steps: tuple[MapStep, ...] = ()
    template: Json | None = None
    encoding: bool | None = None
    checking: bool = False
    packs: Table | None = None
    packed: bool = False
    packing_interval: int = 128
    cyclic: bool = False
    saving: Saving | None = None
    cursor: Cursor | None = None
    data_version: int = 0
    stream_rows: int | None = None

    @property
    def is_lazy(self) -> bool:
        """Whether rows are made when they are asked for."""
        return self.class_type == "LazyDataset"

    @property
    def is_stream(self) -> bool:
        """Whether rows have no numbers."""
        return self.class_type in {"IterableDataset", "IterablePackingDataset"}

    def tables(self) -> tuple[Table, ...]:
        """The files it needs."""
        found = [part.table for part in self.parts] + [self.packs]
        return tuple(table for table in found if table is not None)


class LoaderState(Frozen):
    """A loader over a data set of the same tenant.

    Attributes:
        dataset: Id of the data set.
        collator: Arguments of an ``InputProcessor`` that makes one feature of a batch.
        consumed: Rows given since the beginning, over all epochs.
        epoch: The epoch that is read, or read last; -1 before the first.
        position: Rows of this epoch that are behind.
        pending: The next iteration goes on at ``position`` of ``epoch`` instead of a new epoch.
        iterating: ``__iter__`` was called.
        data_version: Of the data set when the iteration began.
    """

    kind: Literal["dataloader"] = "dataloader"
    dataset: str
    batch_size: int
    min_batch_size: int | None = None
    shuffle: bool = False
    seed: int = 42
    drop_last: bool = False
    max_retries: int = 20
    collator: Json | None = None
    consumed: int = 0
    epoch: int = -1
    position: int = 0
    pending: bool = False
    iterating: bool = False
    data_version: int = 0


class ObjectState(Frozen):
    """A preprocessor, template, reward or input processor: its name and arguments."""

    kind: Literal["object"] = "object"
    processor_type: str
    class_type: str
    arguments: Json = Field(default_factory=dict[str, Any])


State: TypeAlias = Annotated[DatasetState | LoaderState | ObjectState, Field(discriminator="kind")]

_STATE: TypeAdapter[DatasetState | LoaderState | ObjectState] = TypeAdapter(State)


def read_state(text: str | bytes) -> DatasetState | LoaderState | ObjectState:
    """The inverse of ``model_dump_json``."""
    return _STATE.validate_json(text)
