"""What CPU workers can be told: one function by which Dask calls those of a closed table.

Values and answers travel packed, so that nothing of a tenant's is ever unpickled. The functions
import their rooms when they are called, since the gateway imports this module to name ``run``.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from twinkle_dask import packing
from twinkle_dask.errors import ServiceFault, TwinkleDaskError, new_incident
from twinkle_dask.logs import configure
from twinkle_dask.processor import templates as templates  # registers the values of its calls

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
        Packed ``{"result": ...}``, or ``{"kind", "message", "incident"}`` of a
        ``TwinkleDaskError``. Nothing is raised: Dask would send it pickled, and would not send
        what cannot be pickled.
    """
    _configure_once(log_level)
    try:
        return packing.pack({"result": FUNCTIONS[name](packing.unpack(packed))})
    except TwinkleDaskError as error:
        incident = error.incident if isinstance(error, ServiceFault) else ""
        return _failure(type(error).__name__, error.message, incident)
    except Exception:
        incident = new_incident()
        log.exception("Function %s failed; incident %s", name, incident)
        return _failure(ServiceFault.__name__, "A CPU worker failed.", incident)


def _failure(kind: str, message: str, incident: str) -> bytes:
    return packing.pack({"kind": kind, "message": message, "incident": incident})


@functools.cache
def _configure_once(log_level: str) -> None:
    configure(log_level)
