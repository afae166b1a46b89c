"""The rows of a data set by number, made on access where the data set is lazy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.processor.bins import joined
from twinkle_dask.processor.library import Rows as HfRows
from twinkle_dask.processor.plain import plain
from twinkle_dask.processor.preprocessors import preprocessor
from twinkle_dask.processor.states import DatasetState, MapStep
from twinkle_dask.processor.tables import Area
from twinkle_dask.types import Json

#: ``encode(template, row, add_generation_prompt)``: the features of one row; a template may make
#: several of one or none. ``InvalidRequest`` where it cannot.
Encode: TypeAlias = Callable[[Json, Json, bool], list[Json]]

MIX_FIRST = (
    "The data set has {number} parts that are not mixed; call mix_dataset first, with "
    "interleave=True or False."
)


class Rows:
    """What ``__getitem__`` and ``__len__`` see.

    Args:
        state: Of a data set that is not a stream.
        area: Where its tables lie.
        encode: For lazy data sets that encode.

    Raises:
        InvalidRequest: There are no rows yet, or parts are not mixed, or packing was not asked for.
    """

    def __init__(self, state: DatasetState, area: Area, encode: Encode) -> None:
        self._state = state
        self._encode = encode
        tables = [part.table for part in state.parts if part.table is not None]
        if not tables:
            raise InvalidRequest("The data set is empty; call add_dataset first.")
        if len(tables) > 1 and state.interleave is None:
            raise InvalidRequest(MIX_FIRST.format(number=len(tables)))
        self._parts = [area.open(table) for table in tables]
        self._steps = [applied(part.steps) for part in state.parts]
        self._last_steps = applied(state.steps)
        self._packs: HfRows = None
        if state.class_type == "PackingDataset":
            if state.packs is None:
                raise InvalidRequest("Call pack_dataset() first, after encode().")
            self._packs = area.open(state.packs)

    def __len__(self) -> int:
        if self._packs is not None:
            return len(self._packs)
        return self.num_unpacked

    @property
    def num_unpacked(self) -> int:
        """Rows before packing."""
        return mixed_length([len(part) for part in self._parts], self._state.interleave)

    def index(self, number: int) -> int | None:
        """A row's number from the beginning; None if it is out of range."""
        number = number + len(self) if number < 0 else number
        return number if 0 <= number < len(self) else None

    def row(self, number: int) -> Json | None:
        """One row, JSON-clean; None if a lazy data set leaves it out.

        Raises:
            InvalidRequest: A lazy data set cannot make it.
        """
        if self._packs is not None:
            return joined([self._made(int(i)) for i in self._packs[number]["rows"]])
        return self._encoded(self._made(number))

    def originals(self, number: int) -> list[Json]:
        """A row as it is saved: a packed one as the rows that it was made of."""
        if self._packs is not None:
            return [self._made(int(i)) for i in self._packs[number]["rows"]]
        row = self.row(number)
        return [] if row is None else [row]

    def raw(self) -> Iterator[Json]:
        """All rows before encoding and packing."""
        return (self._made(number) for number in range(self.num_unpacked))

    def _made(self, number: int) -> Json:
        part, within = placed(number, [len(one) for one in self._parts], self._state.interleave)
        row = cast(Json, plain(self._parts[part][within]))
        return self._last_steps(self._steps[part](row))

    def _encoded(self, row: Json) -> Json | None:
        state = self._state
        if state.encoding is None and not state.checking:
            return row
        if state.template is None:
            raise InvalidRequest("Call set_template() first.")
        if state.encoding is None:
            return row if encodes(row, state.template, self._encode) else None
        if state.checking and not encodes(row, state.template, self._encode):
            return None
        made = encoded_row(row, state.template, state.encoding, self._encode)
        if len(made) > 1:
            raise InvalidRequest("A lazy data set cannot split rows; use Dataset.")
        return cast(Json, plain(made[0])) if made else None


def mixed_length(lengths: Sequence[int], interleave: bool | None) -> int:
    """Rows of parts that are mixed: turns end with the shortest part, as for eager data sets."""
    return min(lengths) * len(lengths) if interleave else sum(lengths)


def placed(number: int, lengths: Sequence[int], interleave: bool | None) -> tuple[int, int]:
    """The part and the number within it of a row of mixed parts."""
    if interleave:
        return number % len(lengths), number // len(lengths)
    for part, length in enumerate(lengths):
        if number < length:
            return part, number
        number -= length
    raise IndexError(number)


def encoded_row(row: Json, template: Json, prompt: bool, encode: Encode) -> list[Json]:
    """A row's columns with those of its encoding; several rows or none where the template says so.

    A row with ``messages`` is a trajectory. In other rows every column that holds one is encoded
    in its place, as preference data need it.

    Raises:
        InvalidRequest: The row has no messages, or they cannot be encoded.
    """
    if row.get("messages") is not None:
        return [{**row, **feature} for feature in encode(template, cleaned(row), prompt)]
    columns = [
        key
        for key, value in row.items()
        if isinstance(value, Mapping) and cast(Mapping[str, Any], value).get("messages") is not None
    ]
    if not columns:
        raise InvalidRequest(
            "The rows have no column 'messages' to encode; they have "
            f"{', '.join(sorted(row)) or 'none'}. Map them with a preprocessor first."
        )
    made = dict(row)
    for key in columns:
        features = encode(template, cleaned(row[key]), prompt)
        if len(features) > 1:
            raise InvalidRequest(f"Column {key!r} would become several rows; use Dataset rows.")
        if not features:
            return []
        made[key] = {**row[key], **features[0]}
    return [made]


def encodes(row: Json, template: Json, encode: Encode) -> bool:
    """Whether a row can be encoded."""
    try:
        return bool(encoded_row(row, template, False, encode))
    except (InvalidRequest, NotSupported):
        return False


def cleaned(trajectory: Json) -> Json:
    """A trajectory without the nulls that a table fills in where rows have different fields."""
    return {key: _without_nulls(value) for key, value in trajectory.items() if value is not None}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        items = cast(Mapping[str, Any], value)
        return {key: _without_nulls(item) for key, item in items.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in cast(list[Any], value)]
    return value


def applied(steps: Sequence[MapStep]) -> Callable[[Json], Json]:
    """The preprocessors of some steps, one after another, on one row."""
    made = [(preprocessor(step.preprocessor, step.arguments), step) for step in steps]

    def apply(row: Json) -> Json:
        for preprocess, step in made:
            new = preprocess(row)
            row = {k: v for k, v in row.items() if k not in step.remove_columns} | new
        return row

    return apply
