"""What changes a data set: each function takes a state and returns the next one."""

import secrets
from collections.abc import Callable
from typing import Any, cast

from twinkle_dask.errors import Conflict, InvalidRequest, NotFound, NotSupported
from twinkle_dask.processor import functions as f
from twinkle_dask.processor import sources
from twinkle_dask.processor.bins import packed_bins
from twinkle_dask.processor.encoding import packing_length
from twinkle_dask.processor.filters import row_filter
from twinkle_dask.processor.library import Rows as HfRows
from twinkle_dask.processor.library import hf, pa
from twinkle_dask.processor.naming import checked
from twinkle_dask.processor.plain import plain
from twinkle_dask.processor.preprocessors import preprocessor
from twinkle_dask.processor.rows import MIX_FIRST, Encode, Rows, encoded_row, encodes
from twinkle_dask.processor.sources import Doors
from twinkle_dask.processor.states import (
    DatasetState,
    ListSlice,
    MapStep,
    Part,
    RangeSlice,
    Slice,
    Source,
)
from twinkle_dask.processor.tables import Area
from twinkle_dask.types import Json


def add(state: DatasetState, loading: f.Loading, area: Area, doors: Doors) -> DatasetState:
    """Add a data set as a part; a stream stays where it is and is read later."""
    meta = loading.dataset_meta
    if meta is None:
        return state
    if loading.streaming and not state.is_stream:
        raise InvalidRequest("A Dataset is not streamed; make an IterableDataset.")
    source = source_of(meta, loading.revision)
    if not meta.dataset_id and meta.data is None:
        raise InvalidRequest("DatasetMeta needs a dataset_id or data.")
    part = Part(source=source)
    if meta.data is not None:
        rows = sources.sliced(sources.from_memory(meta.data), source.data_slice)
        part = Part(source=source, table=area.write(rows))
    elif state.is_stream:
        # Refuses now what cannot be read later.
        sources.stream(source, area.blobs, doors, area.scratch)
    else:
        part = Part(source=source, table=area.write(sources.load(source, area, doors)))
    # A part that comes after mixing is not mixed yet, and what applied to all applied to those.
    parts = tuple(
        one.model_copy(update={"steps": (*one.steps, *state.steps)}) for one in state.parts
    )
    return changed(state, parts=(*parts, part), interleave=None, steps=())


def source_of(meta: f.Meta, revision: str | None = None) -> Source:
    """What a ``DatasetMeta`` names."""
    return Source(
        dataset_id=meta.dataset_id,
        subset_name=meta.subset_name,
        split=meta.split,
        data_slice=_slice(meta.data_slice),
        revision=revision,
        rows_id="" if meta.data is None else sources.rows_id(meta.data),
    )


def changed(state: DatasetState, **update: Any) -> DatasetState:
    """A state with other rows.

    Raises:
        Conflict: Rows that are read are being saved, so they may not change now.
    """
    if state.saving is not None:
        raise Conflict(
            f"The rows are being saved to {state.saving.name!r} as they are read; call "
            "flush_save() before you change the data set."
        )
    update = {
        "packs": None,
        "packed": False,
        "stream_rows": None,
        "data_version": state.data_version + 1,
        **update,
    }
    return state.model_copy(update=update)


def map_rows(state: DatasetState, call: f.Map, area: Area) -> DatasetState:
    """Apply a preprocessor: now, or for a lazy data set and a stream when rows are asked for."""
    arguments = call.init_args or {}
    preprocess = preprocessor(call.preprocess_func, arguments)
    removed = call.remove_columns or ()
    step = MapStep(
        preprocessor=call.preprocess_func, arguments=arguments, remove_columns=tuple(removed)
    )
    if state.interleave is not None:
        _refuse_meta(call.dataset_meta)
        return changed(state, steps=(*state.steps, step))
    chosen = _chosen(state, call.dataset_meta, every=state.is_lazy or state.is_stream)

    def new_columns(batch: Json) -> Json:
        return columns(preprocess(row) for row in rows_of(batch))

    parts = list(state.parts)
    for number in chosen:
        part = parts[number]
        if part.table is None or state.is_lazy or state.is_stream:
            parts[number] = part.model_copy(update={"steps": (*part.steps, step)})
            continue
        rows = area.open(part.table)
        missing = [name for name in removed if name not in rows.column_names]
        if missing:
            raise InvalidRequest(f"remove_columns names {missing[0]!r}, which no row has.")
        made = mapped(rows, area, new_columns, list(removed))
        parts[number] = part.model_copy(update={"table": area.write(made)})
    return changed(state, parts=tuple(parts))


def filter_rows(state: DatasetState, call: f.Filter, area: Area, encode: Encode) -> DatasetState:
    """Keep the rows of which a filter says so; a lazy data set's are made for it to see."""
    keeps = row_filter(call.filter_func, call.init_args or {})
    if state.interleave is not None:
        _refuse_meta(call.dataset_meta)
        raise Conflict("Filter a lazy data set before its parts are mixed.")
    parts = list(state.parts)
    for number in _chosen(state, call.dataset_meta, every=False):
        part = parts[number]
        if part.table is None:
            raise NotSupported("A stream is not filtered; make a Dataset.")
        alone = state.model_copy(
            update={"parts": (part,), "encoding": None, "checking": False, "class_type": "Dataset"}
        )
        seen = Rows(alone, area, encode).raw()
        numbers = [index for index, row in enumerate(seen) if keeps(row)]
        kept = area.open(part.table).select(numbers)
        parts[number] = part.model_copy(update={"table": area.write(kept)})
    return changed(state, parts=tuple(parts))


def mix(state: DatasetState, interleave: bool, area: Area) -> DatasetState:
    """Make one data set of the parts; nothing happens to one that has a single part."""
    if len(state.parts) < 2:
        return state
    if state.is_lazy:
        return changed(state, interleave=interleave)
    rows = [area.open(part.table) for part in state.parts if part.table is not None]
    aligned = [_cast_like(one, rows[0]) for one in rows]
    try:
        mixed = hf.interleave_datasets(aligned) if interleave else hf.concatenate_datasets(aligned)
    except (ValueError, TypeError, pa.ArrowInvalid) as error:
        raise InvalidRequest(f"The parts do not go together: {str(error)[:300]}") from error
    source = Source(dataset_id="mixed", rows_id=secrets.token_hex(8))
    return changed(state, parts=(Part(source=source, table=area.write(mixed)),))


def encode_rows(state: DatasetState, call: f.Encode, area: Area, encode: Encode) -> DatasetState:
    """Encode every row with the template; rows that become nothing go."""
    template = _template(state)
    if state.is_lazy:
        if template.get("truncation_strategy") == "split":
            raise InvalidRequest("A lazy data set cannot split rows; use Dataset.")
        if call.remove_columns:
            raise NotSupported("A lazy data set keeps its columns; use Dataset for remove_columns.")
        return changed(state, encoding=call.add_generation_prompt)
    part = _single(state)
    removed = set(call.remove_columns)

    def encoded(batch: Json) -> Json:
        made = [
            new
            for row in rows_of(batch)
            for new in encoded_row(row, template, call.add_generation_prompt, encode)
        ]
        kept = [name for name in batch if name not in removed]
        return columns(({k: v for k, v in new.items() if k not in removed} for new in made), kept)

    rows = area.open(cast(Any, part.table))
    made = mapped(rows, area, encoded, rows.column_names)
    return changed(state, parts=(part.model_copy(update={"table": area.write(made)}),))


def check_rows(state: DatasetState, area: Area, encode: Encode) -> DatasetState:
    """Leave out rows that cannot be encoded."""
    template = _template(state)
    if state.is_lazy:
        return changed(state, checking=True)
    part = _single(state)
    rows = area.open(cast(Any, part.table))
    numbers = [
        index for index, row in enumerate(rows) if encodes(cast(Json, plain(row)), template, encode)
    ]
    return changed(
        state, parts=(part.model_copy(update={"table": area.write(rows.select(numbers))}),)
    )


def cast_column(state: DatasetState, call: f.CastColumn, area: Area) -> DatasetState:
    """Read a column as images, as the bytes of their files."""
    if call.decode:
        raise NotSupported(
            "Decoded images cannot be sent; cast with decode=False, which gives the bytes of each "
            "file (base64)."
        )
    parts = list(state.parts)
    for number, part in enumerate(parts):
        if part.table is None:
            raise NotSupported("The columns of a stream cannot be cast; make a Dataset.")
        rows = area.open(part.table)
        if call.column not in rows.column_names:
            raise InvalidRequest(
                f"{part.source.label} has no column {call.column!r}; it has "
                f"{', '.join(rows.column_names)}."
            )
        try:
            made = rows.cast_column(call.column, hf.Image(decode=False))
            parts[number] = part.model_copy(update={"table": area.write(made)})
        except (TypeError, ValueError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InvalidRequest(f"Column {call.column!r} has no images: {error}") from error
    return changed(state, parts=tuple(parts))


def pack_rows(state: DatasetState, area: Area) -> DatasetState:
    """Decide which encoded rows share a packed row; a stream packs as it is read."""
    length = packing_length(_template(state))
    if state.is_stream:
        return changed(state, packed=True)
    rows = area.open(cast(Any, _single(state).table))
    if "input_ids" not in rows.column_names:
        raise InvalidRequest("Call encode() before pack_dataset(): the rows have no input_ids.")
    lengths = [len(ids) for ids in cast(list[list[int]], rows.with_format(None)["input_ids"])]
    bins = packed_bins(lengths, length)
    types = hf.Features({"rows": hf.List(hf.Value("int64"))})
    packs = area.write_rows(({"rows": one} for one in bins), types)
    return changed(state, packs=packs)


def mapped(rows: HfRows, area: Area, batch: Callable[[Json], Json], removed: list[str]) -> HfRows:
    """Rows with new columns, made batch by batch, in a file of this call.

    Raises:
        InvalidRequest: The new columns have no common type.
        QuotaExceeded: They take more than may be written.
    """
    before = area.made_on_the_way()

    def bounded(columns_of_rows: Json) -> Json:
        area.check(area.made_on_the_way() - before)
        return batch(columns_of_rows)

    try:
        return rows.map(
            bounded,
            batched=True,
            remove_columns=removed,
            cache_file_name=str(area.temporary()),
            load_from_cache_file=False,
            new_fingerprint=secrets.token_hex(8),
        )
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise InvalidRequest(
            f"The new columns do not have one type over all rows: {str(error)[:300]}"
        ) from error


def rows_of(batch: Json) -> list[Json]:
    """The rows of a batch of columns."""
    names = list(batch)
    lists = zip(*(batch[name] for name in names), strict=True)
    return [cast(Json, plain(dict(zip(names, values, strict=True)))) for values in lists]


def columns(rows: Any, names: list[str] | None = None) -> Json:
    """The columns of rows; ``names`` are there even if there are no rows."""
    made: dict[str, list[Any]] = {name: [] for name in names or ()}
    for number, row in enumerate(rows):
        for name in row:
            made.setdefault(name, [None] * number)
        for name, values in made.items():
            values.append(row.get(name))
    return made


def _slice(value: Any) -> Slice | None:
    if value is None:
        return None
    if isinstance(value, dict) and cast(Json, value).get("kind") == "list":
        return checked(ListSlice, "data_slice", cast(Json, value))
    if not isinstance(value, dict) or cast(Json, value).get("kind") != "range":
        raise InvalidRequest("data_slice is a range or a list of row numbers.")
    made = checked(RangeSlice, "data_slice", cast(Json, value))
    if not made.step:
        raise InvalidRequest("data_slice has a step of 0.")
    return made


def _refuse_meta(meta: f.Meta | None) -> None:
    if meta is not None:
        raise InvalidRequest("The parts are mixed already; leave dataset_meta out.")


def _chosen(state: DatasetState, meta: f.Meta | None, *, every: bool) -> list[int]:
    """The parts that a call is about."""
    if not state.parts:
        raise InvalidRequest("The data set is empty; call add_dataset first.")
    if meta is None:
        if len(state.parts) > 1 and not every:
            raise InvalidRequest(
                f"The data set has {len(state.parts)} parts; say which one with dataset_meta, or "
                "call mix_dataset first."
            )
        return list(range(len(state.parts)))
    source = source_of(meta)
    like = [i for i, part in enumerate(state.parts) if part.source.is_like(source)]
    same = [i for i in like if state.parts[i].source.data_slice == source.data_slice]
    if not like:
        raise NotFound(f"No part of this data set was made of {source.label}.")
    return same or like


def _template(state: DatasetState) -> Json:
    if state.template is None:
        raise InvalidRequest("Call set_template() first.")
    return state.template


def _single(state: DatasetState) -> Part:
    parts = list(state.parts)
    if not parts:
        raise InvalidRequest("The data set is empty; call add_dataset first.")
    if len(parts) > 1:
        raise InvalidRequest(MIX_FIRST.format(number=len(parts)))
    return parts[0]


def _cast_like(rows: HfRows, first: HfRows) -> HfRows:
    """Where the columns are the same, their types are too."""
    same_names = sorted(rows.column_names) == sorted(first.column_names)
    if not same_names or rows.features == first.features:
        return rows
    try:
        return rows.cast(first.features)
    except (ValueError, TypeError, pa.ArrowInvalid) as error:
        raise InvalidRequest(
            f"The parts have columns of different types: {str(error)[:300]}"
        ) from error
