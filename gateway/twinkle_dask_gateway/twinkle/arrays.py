"""Large answers as JSON, without keeping the interpreter's lock for long.

orjson holds the lock until it is done: a million numbers stop the event loop for 50 ms. So arrays
are written a part at a time, between which other threads have their turn.
"""

from collections.abc import Mapping
from typing import Any, Final, cast

import numpy as np
import orjson
from numpy.typing import NDArray

_PART: Final = 65_536


def encode(value: Any) -> bytes:
    """JSON of objects, lists, plain values and numpy; NaN and infinities become null."""
    if isinstance(value, np.ndarray):
        return _array(np.ascontiguousarray(cast(NDArray[Any], value)))
    if isinstance(value, Mapping):
        fields = cast(Mapping[str, Any], value).items()
        return b"{%b}" % b",".join(orjson.dumps(key) + b":" + encode(one) for key, one in fields)
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _array(array: NDArray[Any]) -> bytes:
    if array.size <= _PART:
        return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)
    if array.ndim > 1:
        return b"[%b]" % b",".join(_array(part) for part in array)
    parts = (array[start : start + _PART] for start in range(0, len(array), _PART))
    return b"[%b]" % b",".join(_array(part)[1:-1] for part in parts)
