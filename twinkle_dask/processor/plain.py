"""Rows as JSON can carry them."""

import base64
import datetime as dt
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, cast

import numpy as np


def plain(value: object) -> Any:
    """A value of an Arrow row as JSON: NaN and infinity are null, bytes base64, times ISO 8601."""
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else None
        case Mapping():
            items = cast(Mapping[object, object], value)
            return {str(key): plain(item) for key, item in items.items()}
        case list() | tuple():
            return [plain(item) for item in cast(list[object], value)]
        case np.ndarray() | np.generic():
            return plain(cast(Any, value).tolist())
        case bytes() | bytearray() | memoryview():
            return base64.b64encode(cast(bytes, value)).decode()
        case dt.datetime() | dt.date() | dt.time():
            return value.isoformat()
        case dt.timedelta():
            return value.total_seconds()
        case Decimal():
            return str(value)
        case _:
            raise TypeError(f"A {type(value).__name__} in a row has no form in JSON.")
