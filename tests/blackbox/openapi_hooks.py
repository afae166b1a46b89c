"""What Schemathesis is told besides the document: which things exist, and what protobuf looks like.

Its command line imports this module (``SCHEMATHESIS_HOOKS``); ``test_openapi`` hands it the world
through the environment.
"""

import json
import os
import zlib
from typing import Any, cast

import hypothesis.strategies as st
import schemathesis

from tests.blackbox.data import datum, random_tokens
from tests.blackbox.wire import PROTOBUF, forward_backward_bytes

_world: dict[str, dict[str, str]] = json.loads(os.environ["TWINKLE_DASK_TEST_WORLD"])
_fields, _segments = _world.get("fields", {}), _world.get("segments", {})
# What these end must not be what the others ask for.
_ENDS = {"finish_session", "delete_checkpoint"}
# How long a poll is held, or that it does not say: for as long as the server likes.
_Waiting = int | float | None


def map_case(context: Any, case: Any) -> Any:
    """Two requests of three are about what there is; which ones, their content decides."""
    content = repr((case.path_parameters, case.query, case.body)).encode(errors="replace")
    real = zlib.crc32(content) % 3 > 0
    operation = case.operation.definition.raw["operationId"]
    ends = operation in _ENDS
    path = cast(dict[str, Any], case.path_parameters or {})
    for name in path.keys() & _segments.keys():
        if ends and path[name] == _segments[name]:  # found in an answer
            path[name] = "another"
        elif real and not ends:
            path[name] = _segments[name]
    sent: object = case.body
    if real and isinstance(sent, dict):
        body = cast(dict[str, Any], sent)
        case.body = body | {
            name: value for name, value in _fields.items() if isinstance(body.get(name), str)
        }
        if operation == "retrieve_futures" and isinstance(body.get("timeout"), _Waiting):
            case.body["timeout"] = 0.05
    return case


def _batches() -> st.SearchStrategy[bytes]:
    """Protobuf bodies: whole ones, damaged ones, and none at all."""
    run = _fields.get("model_id", "nobody")
    whole = forward_backward_bytes(run, 4, [datum(random_tokens(9, 2))])
    places = st.integers(0, len(whole) - 1)
    changed = st.tuples(places, st.integers(0, 255)).map(
        lambda change: whole[: change[0]] + bytes([change[1]]) + whole[change[0] + 1 :]
    )
    return st.one_of(st.just(whole), changed, places.map(lambda end: whole[:end]), st.binary())


_library: Any = schemathesis  # typed in part
_library.hook(map_case)
_library.openapi.media_type(PROTOBUF, _batches())
