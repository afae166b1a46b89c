"""What loaders can be asked."""

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.processor import exports, loaders
from twinkle_dask.processor import functions as f
from twinkle_dask.processor.calling import AnyState, Call
from twinkle_dask.processor.dataset_calls import rows_of
from twinkle_dask.processor.object_calls import collate
from twinkle_dask.processor.states import DatasetState, LoaderState, ObjectState
from twinkle_dask.processor.streams import counted
from twinkle_dask.types import Json


def made_loader(call: Call) -> LoaderState:
    """The state of a new loader."""
    given: f.CreateLoader = call.read(f.CreateLoader)
    dataset = call.dataset(given.dataset)
    if dataset.is_stream and given.shuffle:
        raise NotSupported("A stream is read forwards and cannot be shuffled; load it as Dataset.")
    if given.min_batch_size is not None and given.min_batch_size > given.batch_size:
        raise InvalidRequest("min_batch_size is larger than batch_size.")
    return LoaderState(
        dataset=given.dataset.removeprefix("pid:"),
        batch_size=given.batch_size,
        min_batch_size=given.min_batch_size,
        shuffle=given.shuffle,
        seed=given.seed,
        drop_last=given.drop_last,
        max_retries=given.max_retries,
    )


def _num_rows(call: Call, loader: LoaderState) -> int:
    dataset = call.dataset(loader.dataset)
    if not dataset.is_stream:
        return len(rows_of(call, dataset))
    if dataset.stream_rows is None:
        number = counted(dataset, call.area, call.doors, call.encode(dataset.template))
        dataset = dataset.model_copy(update={"stream_rows": number})
        _change(call, loader.dataset, dataset)
    return cast(int, dataset.stream_rows)


def _change(call: Call, key: str, state: AnyState) -> None:
    call.others[key] = state
    call.changed.add(key)


def _loader_len(call: Call, loader: LoaderState) -> int:
    return loaders.num_batches(loader, _num_rows(call, loader))


def _set_processor(call: Call, loader: LoaderState) -> None:
    other = call.others.get(str(call.arguments.get("processor_cls", "")).removeprefix("pid:"))
    if isinstance(other, ObjectState) and other.processor_type == "processor":
        arguments = other.arguments
    else:
        given: f.SetProcessor = call.read(f.SetProcessor)
        f.check_class("processor", given.processor_cls)
        arguments = given.model_dump(exclude={"processor_cls"})
    call.state = loader.model_copy(update={"collator": arguments})


def _loader_iter(call: Call, loader: LoaderState) -> str:
    dataset = call.dataset(loader.dataset)
    if not dataset.is_stream:
        rows_of(call, dataset)  # says now what is missing, not with the first batch
    call.state = loaders.begun(loader, dataset)
    return "ok"


def _loader_next(call: Call, loader: LoaderState) -> Any:
    dataset = call.dataset(loader.dataset)
    loaders.check_iterating(loader, dataset)
    batch = (
        _stream_batch(call, loader, dataset)
        if dataset.is_stream
        else _numbered_batch(call, loader, dataset)
    )
    call.state = loaders.advanced(loader, len(batch))
    call.over = not batch
    if not batch or loader.collator is None:
        return batch
    return collate(batch, loader.collator)


def _stream_batch(call: Call, loader: LoaderState, dataset: DatasetState) -> list[Json]:
    iteration = (call.processor, loader.epoch, dataset.data_version)
    encode = call.encode(dataset.template)
    batch = call.streams.take(
        iteration, loader.position, loader.batch_size, dataset, call.area, call.doors, encode
    )
    smallest = loader.batch_size if loader.drop_last else (loader.min_batch_size or 0)
    return batch if len(batch) >= smallest else []


def _numbered_batch(call: Call, loader: LoaderState, dataset: DatasetState) -> list[Json]:
    rows = rows_of(call, dataset)
    batch, numbers = loaders.batch_of(loader, rows, loaders.next_numbers(loader, len(rows)))
    if dataset.saving is not None:
        _change(call, loader.dataset, exports.reading(dataset, numbers))
    return batch


def _skip(call: Call, loader: LoaderState) -> None:
    model = f.Skip if call.function == "skip_consumed_samples" else f.Resume
    consumed = call.read(model).consumed_train_samples
    call.state = loaders.skipped(loader, consumed or 0, _num_rows(call, loader))


def _get_state(call: Call, loader: LoaderState) -> Json:
    return {"consumed_train_samples": loader.consumed}


LOADER: Final[Mapping[str, Callable[[Call, LoaderState], Any]]] = {
    "__len__": _loader_len,
    "set_processor": _set_processor,
    "__iter__": _loader_iter,
    "__next__": _loader_next,
    "skip_consumed_samples": _skip,
    "resume_from_checkpoint": _skip,
    "get_state": _get_state,
}
