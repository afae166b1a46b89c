"""Doing one call of a tenant's on a worker: states and JSON in, states and JSON out.

Nothing is kept between calls but copies of what can be read again, so a call may be done on any
worker, and again if a worker died in the middle.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

import orjson

from twinkle_dask.errors import InvalidRequest, QuotaExceeded
from twinkle_dask.processor import editing, rewards
from twinkle_dask.processor import functions as f
from twinkle_dask.processor.calling import AnyState, Call
from twinkle_dask.processor.dataset_calls import DATASET, STREAM
from twinkle_dask.processor.encoding import encoder
from twinkle_dask.processor.loader_calls import LOADER, made_loader
from twinkle_dask.processor.naming import known
from twinkle_dask.processor.object_calls import answer_object
from twinkle_dask.processor.plain import plain
from twinkle_dask.processor.preprocessors import PREPROCESSORS
from twinkle_dask.processor.sources import Doors
from twinkle_dask.processor.states import (
    DatasetState,
    LoaderState,
    ObjectState,
    Table,
    read_state,
)
from twinkle_dask.processor.streams import Streams
from twinkle_dask.processor.tables import Area, OpenTables, quiet, work_folder
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.types import Json

#: A state travels with each call and lies in the database, beside the quota for files.
MAX_STATE: Final = 4 * 2**20
_TABLES: Final = OpenTables()
_STREAMS: Final = Streams()


def run(value: Mapping[str, Any]) -> Json:
    """Do a call as ``operations.processors`` sends it; see ``Call`` and ``answer``.

    Returns:
        ``result`` as JSON bytes; ``states`` as JSON text and ``sizes`` of their files, of those
        that are new; ``dropped`` blobs that no state names any more; ``over``, ``saved``, and the
        names of saved data that were ``used``.
    """
    quiet()
    with tempfile.TemporaryDirectory(prefix="twinkle-dask-call-", dir=work_folder()) as scratch:
        area = Area(
            blobs=BlobStore(value["blobs_url"]),
            opened=_TABLES,
            folder=value["folder"],
            call_id=value["call_id"],
            allowance=value["allowance"],
            scratch=Path(scratch),
        )
        doors = Doors(
            data_roots=tuple(value["data_roots"]),
            allow_hub=value["allow_hub"],
            saved=dict(value["saved"]),
        )
        others = {key: read_state(text) for key, text in value["others"].items()}
        arguments = cast(Json, orjson.loads(value["arguments"]))
        arguments |= {key: text.decode() for key, text in value["texts"].items()}
        given = read_state(value["state"]) if value["state"] else None
        call = Call(
            processor=value["processor"],
            function=value["function"],
            arguments=arguments,
            state=given or ObjectState(processor_type="", class_type=""),
            others=others,
            area=area,
            doors=doors,
            streams=_STREAMS,
            models=value["models"],
            saved_folder=value["saved_folder"],
        )
        try:
            return _done(call, given, value)
        except BaseException:
            for path in area.paths:
                area.blobs.remove(path)
            raise


def _done(call: Call, given: AnyState | None, value: Mapping[str, Any]) -> Json:
    before = {call.processor: given, **call.others}
    if given is None:
        call.state = made(call, value["processor_type"], value["class_type"])
        result: Any = None
    else:
        result = answer(call)
    answered = orjson.dumps(plain(result))
    if len(answered) > value["max_answer_bytes"]:
        raise InvalidRequest(
            f"The answer has {len(answered)} bytes; {value['max_answer_bytes']} is the most. Ask "
            "for fewer rows at a time."
        )
    now: dict[str, AnyState] = {key: call.others[key] for key in call.changed}
    if call.state is not given:
        now[call.processor] = call.state
    texts = {key: state.model_dump_json() for key, state in now.items()}
    if max(map(len, texts.values()), default=0) > MAX_STATE:
        raise QuotaExceeded(
            f"What describes this processor (its arguments, parts and steps) would have more than "
            f"{MAX_STATE} characters. Make another one.",
            30.0,
        )
    kept = {table.path for state in now.values() for table in _tables(state)}
    old = {table.path for key in now for table in _tables(before[key])}
    return {
        "result": answered,
        "states": texts,
        "sizes": {key: sum(t.num_bytes for t in _tables(s)) for key, s in now.items()},
        "dropped": sorted(old - kept),
        "over": call.over,
        "saved": call.saved,
        "used": sorted(_sources(call.state) & set(call.doors.saved)) if call.area.paths else [],
    }


def _tables(state: AnyState | None) -> tuple[Table, ...]:
    return state.tables() if isinstance(state, DatasetState) else ()


def _sources(state: AnyState) -> set[str]:
    if not isinstance(state, DatasetState):
        return set()
    return {part.source.dataset_id for part in state.parts}


def made(call: Call, processor_type: str, class_type: str) -> AnyState:
    """The state of a new processor."""
    call.function = class_type
    f.check_class(processor_type, class_type)
    arguments = call.arguments
    match processor_type:
        case "dataset":
            loading = call.read(f.loading_arguments(class_type))
            state = DatasetState(class_type=cast(Any, class_type))
            if isinstance(loading, f.IterablePackingLoading):
                update = {"packing_interval": loading.packing_interval, "cyclic": loading.cyclic}
                state = state.model_copy(update=update)
            return editing.add(state, loading, call.area, call.doors)
        case "dataloader":
            return made_loader(call)
        case "preprocessor":
            known(PREPROCESSORS, processor_type, class_type, arguments)
        case "processor":
            call.read(f.InputProcessorArguments)
        case "reward":
            rewards.reward(class_type, arguments)
        case _:
            encoder({"template": class_type, **arguments}, call.models)
    return ObjectState(processor_type=processor_type, class_type=class_type, arguments=arguments)


def answer(call: Call) -> Any:
    """The result of a function."""
    state = call.state
    match state:
        case LoaderState():
            return LOADER[call.function](call, state)
        case DatasetState():
            table = STREAM if state.is_stream else DATASET
            return table[call.function](call, state)
        case ObjectState():
            return answer_object(call, state)
