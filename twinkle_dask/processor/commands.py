"""What CPU workers can be told: one function by which Dask calls those of a closed table.

Values and answers travel packed, so that nothing of a tenant's is ever unpickled. The functions
import their rooms when they are called, since the gateway imports this module to name ``run``.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from twinkle_dask import packing
from twinkle_dask.errors import CapacityError, ServiceFault, TwinkleDaskError, new_incident
from twinkle_dask.logs import configure
from twinkle_dask.processor import templates as templates  # registers the values of its calls
from twinkle_dask.types import Json

log = logging.getLogger(__name__)


def _encode(value: Any) -> object:
    from twinkle_dask.processor import template_calls

    return template_calls.encode(value)


def _continued(value: Any) -> object:
    from twinkle_dask.processor import template_calls

    return template_calls.continued(value)


def _decode(value: Any) -> object:
    from twinkle_dask.processor import template_calls

    return template_calls.decode(value)


def _process(value: Any) -> object:
    from twinkle_dask.processor import calls

    return calls.run(value)


#: Name to function; each takes an unpacked value and answers one that can be packed.
FUNCTIONS: Final[Mapping[str, Callable[[Any], object]]] = {
    "templates.encode": _encode,
    "templates.continued": _continued,
    "templates.decode": _decode,
    "processors.run": _process,
}


def run(name: str, packed: bytes, log_level: str) -> bytes:
    """Call a function of the table; runs on a CPU worker.

    Args:
        name: Of the function.
        packed: Its value.
        log_level: Of the worker's log.

    Returns:
        Packed ``{"result": ...}``, or the fields of the cluster's ``Failure``, as which errors
        travel. Nothing is raised: Dask would send it pickled, and would not send what cannot be
        pickled.
    """
    _configure_once(log_level)
    try:
        return packing.pack({"result": FUNCTIONS[name](packing.unpack(packed))})
    except TwinkleDaskError as error:
        return packing.pack(_failure(error))
    except Exception:
        incident = new_incident()
        log.exception("Function %s failed; incident %s", name, incident)
        return packing.pack(_failure(ServiceFault("A CPU worker failed.", incident)))


def _failure(error: TwinkleDaskError) -> Json:
    failure: Json = {"kind": type(error).__name__, "message": error.message}
    if isinstance(error, ServiceFault):
        failure["incident"] = error.incident
    if isinstance(error, CapacityError):
        failure["retry_after_s"] = error.retry_after_s
    return failure


@functools.cache
def _configure_once(log_level: str) -> None:
    configure(log_level)
