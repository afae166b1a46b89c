"""About data sets and loaders, which live on the service."""

from collections.abc import Mapping
from typing import Any

from twinkle_dask_client.calls.base import Call
from twinkle_dask_client.inputs import plain
from twinkle_dask_client.results import Made, Result


def create(kind: str, class_name: str, settings: Mapping[str, Any]) -> Call[Made]:
    """Make one."""
    return Call(
        method="POST",
        path="processor/twinkle/create",
        reply=Made,
        body={**plain(settings), "processor_type": kind, "class_type": class_name},
        doing=f"making a {kind}",
    )


def call(
    processor: str,
    function: str,
    settings: Mapping[str, Any] | None = None,
    *,
    repeatable: bool = False,
    doing: str = "",
) -> Call[Result[Any]]:
    """Have one do something."""
    return Call(
        method="POST",
        path="processor/twinkle/call",
        reply=Result[Any],
        body={**plain(settings or {}), "processor_id": processor, "function": function},
        repeatable=repeatable,
        doing=doing,
        timeout_s=None if repeatable else _LONG_S,
    )


#: Encoding a large data set takes minutes, and the service says nothing meanwhile.
_LONG_S = 3600.0
