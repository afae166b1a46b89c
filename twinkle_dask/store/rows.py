"""Records to rows and back. Columns carry the names of fields; a ``LoraSpec`` lies flat."""

from dataclasses import Field, fields
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

from sqlalchemy import RowMapping

from twinkle_dask.types import LoraSpec

_SPEC_FIELDS = tuple(field.name for field in fields(LoraSpec))

RowValues: TypeAlias = dict[str, Any]


class Record(Protocol):
    """Any of the records."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


R = TypeVar("R", bound=Record)


def to_row(record: Record) -> RowValues:
    """The columns of a record."""
    row = {field.name: getattr(record, field.name) for field in fields(record)}
    if "spec" in row:
        spec = row.pop("spec")
        row.update((name, getattr(spec, name)) for name in _SPEC_FIELDS)
    return row


def from_row(kind: type[R], row: RowMapping) -> R:
    """The record of a row that holds all its columns."""
    values: RowValues = {str(column): value for column, value in row.items()}
    if "spec" in kind.__dataclass_fields__:
        spec = {name: values.pop(name) for name in _SPEC_FIELDS}
        values["spec"] = LoraSpec(**{k: value for k, value in spec.items() if value is not None})
    return kind(**values)
