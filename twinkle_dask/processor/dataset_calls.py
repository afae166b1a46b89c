"""What data sets and streams can be asked."""

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.processor import editing, exports
from twinkle_dask.processor import functions as f
from twinkle_dask.processor.calling import Call
from twinkle_dask.processor.rows import Rows
from twinkle_dask.processor.states import Cursor, DatasetState, ObjectState, Saving
from twinkle_dask.processor.streams import counted
from twinkle_dask.types import Json


def _set_template(call: Call, state: DatasetState) -> None:
    given: f.SetTemplate = call.read(f.SetTemplate)
    template = _template_of(call, given)
    call.encode(template)
    if state.class_type == "IterablePackingDataset" and (
        template.get("truncation_strategy") == "split"
    ):
        raise InvalidRequest("A packing stream cannot split rows.")
    call.state = state.model_copy(update={"template": template})
    if state.saving is None and (state.encoding is not None or state.is_stream):
        call.state = editing.changed(call.state, packed=state.packed)


def _template_of(call: Call, given: f.SetTemplate) -> Json:
    extra = given.model_extra or {}
    other = call.others.get(given.name.removeprefix("pid:"))
    if isinstance(other, ObjectState) and other.processor_type == "template":
        if extra:
            raise InvalidRequest("A template that was made already takes no more arguments.")
        return {"template": other.class_type, **other.arguments}
    return {**extra, "template": given.name}


def _map(call: Call, state: DatasetState) -> None:
    given: f.Map = call.read(f.Map)
    other = call.others.get(given.preprocess_func.removeprefix("pid:"))
    if isinstance(other, ObjectState) and other.processor_type == "preprocessor":
        update = {"preprocess_func": other.class_type, "init_args": other.arguments}
        given = given.model_copy(update=update)
    call.state = editing.map_rows(state, given, call.area)


def _filter(call: Call, state: DatasetState) -> None:
    encode = call.encode(state.template)
    call.state = editing.filter_rows(state, call.read(f.Filter), call.area, encode)


def _add(call: Call, state: DatasetState) -> None:
    call.state = editing.add(state, call.read(f.AddDataset), call.area, call.doors)


def _mix(call: Call, state: DatasetState) -> None:
    call.state = editing.mix(state, call.read(f.Mix).interleave, call.area)


def _encode(call: Call, state: DatasetState) -> None:
    encode = call.encode(state.template)
    call.state = editing.encode_rows(state, call.read(f.Encode), call.area, encode)


def _check(call: Call, state: DatasetState) -> None:
    call.read(f.Hints)
    call.state = editing.check_rows(state, call.area, call.encode(state.template))


def _cast_column(call: Call, state: DatasetState) -> None:
    call.state = editing.cast_column(state, call.read(f.CastColumn), call.area)


def _pack(call: Call, state: DatasetState) -> None:
    call.state = editing.pack_rows(state, call.area)


def _save_as(call: Call, state: DatasetState) -> str:
    given: f.SaveAs = call.read(f.SaveAs)
    name = exports.checked_name(given.output_path)
    kind = exports.format_of(name, given.format)
    unpacked = state.model_copy(update={"class_type": "Dataset"}) if state.packs else state
    rows = rows_of(call, unpacked)
    if given.mode == "training":
        saving = Saving(name=name, format=kind)
        call.state = state.model_copy(update={"saving": saving})
        return name
    found = (row for i in range(len(rows)) if (row := rows.row(i)) is not None)
    call.saved = _saved(call, name, kind, found)
    return name


def _flush_save(call: Call, state: DatasetState) -> str | None:
    if state.saving is None:
        return None
    rows = exports.gathered(state.saving, rows_of(call, state))
    call.saved = _saved(call, state.saving.name, state.saving.format, rows)
    call.state = state.model_copy(update={"saving": None})
    return state.saving.name


def _saved(call: Call, name: str, kind: str, rows: Any) -> Json:
    file = exports.write(rows, kind, call.area)
    path = f"{call.saved_folder}/{call.area.call_id}.{kind}"
    return {"name": name, "path": path, "num_bytes": call.area.put_file(path, file)}


def _get_item(call: Call, state: DatasetState) -> Any:
    rows = rows_of(call, state)
    number = rows.index(call.read(f.GetItem).index)
    if number is None:
        call.over = True
        return None
    row = rows.row(number)
    if state.saving is not None:
        call.state = exports.reading(state, [number])
    return row


def _len(call: Call, state: DatasetState) -> int:
    return len(rows_of(call, state))


def rows_of(call: Call, state: DatasetState) -> Rows:
    """The rows that a data set has, by number."""
    return Rows(state, call.area, call.encode(state.template))


def _stream_len(call: Call, state: DatasetState) -> int:
    if state.stream_rows is None:
        number = counted(state, call.area, call.doors, call.encode(state.template))
        state = state.model_copy(update={"stream_rows": number})
        call.state = state
    return cast(int, state.stream_rows)


def _stream_item(call: Call, state: DatasetState) -> None:
    raise NotSupported(
        "A stream has no rows by number; iterate over it, or make a Dataset of the same source."
    )


def _stream_iter(call: Call, state: DatasetState) -> str:
    passed = 0 if state.cursor is None else state.cursor.pass_number + 1
    encode = call.encode(state.template)
    call.state = state.model_copy(update={"cursor": Cursor(pass_number=passed)})
    # What is missing is told now, and not with the first row.
    call.streams.take(
        (call.processor, passed, state.data_version), 0, 0, state, call.area, call.doors, encode
    )
    return "ok"


def _stream_next(call: Call, state: DatasetState) -> Any:
    cursor = state.cursor
    if cursor is None:
        raise InvalidRequest("Begin an iteration with __iter__ first.")
    rows: list[Json] = []
    if not cursor.over:
        iteration = (call.processor, cursor.pass_number, state.data_version)
        encode = call.encode(state.template)
        rows = call.streams.take(
            iteration, cursor.position, 1, state, call.area, call.doors, encode
        )
    update = {"position": cursor.position + len(rows), "over": not rows}
    call.state = state.model_copy(update={"cursor": cursor.model_copy(update=update)})
    call.over = not rows
    return rows[0] if rows else None


DATASET: Final[Mapping[str, Callable[[Call, DatasetState], Any]]] = {
    "set_template": _set_template,
    "encode": _encode,
    "check": _check,
    "cast_column": _cast_column,
    "map": _map,
    "filter": _filter,
    "add_dataset": _add,
    "mix_dataset": _mix,
    "save_as": _save_as,
    "flush_save": _flush_save,
    "pack_dataset": _pack,
    "__getitem__": _get_item,
    "__len__": _len,
}
STREAM: Final[Mapping[str, Callable[[Call, DatasetState], Any]]] = {
    "add_dataset": _add,
    "map": _map,
    "set_template": _set_template,
    "pack_dataset": _pack,
    "__getitem__": _stream_item,
    "__len__": _stream_len,
    "__iter__": _stream_iter,
    "__next__": _stream_next,
}
