"""Filters by name. Twinkle has the base class alone; these are what data sets are cut by."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.processor.naming import known
from twinkle_dask.processor.preprocessors import Row
from twinkle_dask.types import Json


class _Filter(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def keeps(self, row: Row) -> bool:
        """Whether the row stays."""
        raise NotImplementedError


class NotEmptyFilter(_Filter):
    """Rows that have something in every one of some columns."""

    columns: tuple[str, ...] = Field(min_length=1)

    def keeps(self, row: Row) -> bool:
        """Whether no column is missing, null or empty."""
        return all(_length(_value(row, column)) > 0 for column in self.columns)


class LengthFilter(_Filter):
    """Rows with a column, of text or a list, of such a length."""

    column: str
    min_length: int = Field(default=0, ge=0)
    max_length: int | None = Field(default=None, ge=0)

    def keeps(self, row: Row) -> bool:
        """Whether the length is within both bounds, which are included."""
        length = _length(_value(row, self.column))
        return self.min_length <= length and (self.max_length is None or length <= self.max_length)


class EqualsFilter(_Filter):
    """Rows with one of some values in a column."""

    column: str
    values: tuple[str | int | float | bool | None, ...] = Field(min_length=1)

    def keeps(self, row: Row) -> bool:
        """Whether the value is one of them."""
        return _value(row, self.column) in self.values


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise InvalidRequest(
            f"The rows have no column {column!r}; they have {', '.join(sorted(row)) or 'none'}."
        )
    return row[column]


def _length(value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, str | list | tuple | Mapping):
        return len(value)  # pyright: ignore[reportUnknownArgumentType]
    return 1


FILTERS: Final[Mapping[str, type[_Filter]]] = {
    cls.__name__: cls for cls in (NotEmptyFilter, LengthFilter, EqualsFilter)
}


def row_filter(name: str, arguments: Json) -> Callable[[Row], bool]:
    """What a name and its arguments say of one row.

    Raises:
        InvalidRequest: Unknown name or arguments; the message has those there are.
    """
    return known(FILTERS, "filter", name, arguments).keeps
