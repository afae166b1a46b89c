"""Large answers are the JSON that small ones are."""

import json
from typing import Any

import numpy as np
import pytest

from twinkle_dask_gateway.twinkle import arrays


@pytest.mark.parametrize("part", [1, 3, 100])
@pytest.mark.parametrize("shape", [(0,), (7,), (1, 1), (2, 5), (3, 2, 4), (2, 0)])
def test_parts_make_the_whole(
    monkeypatch: pytest.MonkeyPatch, part: int, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(arrays, "_PART", part)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 4
    body: Any = {"a": values, "b": {"c": values.T, "d": [1, None, "x"]}, 'e"': 1.5}
    told = {"a": values.tolist(), "b": {"c": values.T.tolist(), "d": [1, None, "x"]}, 'e"': 1.5}
    assert json.loads(arrays.encode(body)) == told


def test_what_is_no_number_is_null() -> None:
    values = np.asarray([1.0, np.nan, np.inf, -np.inf], np.float32)
    assert arrays.encode({"x": values, "y": float("nan")}) == b'{"x":[1.0,null,null,null],"y":null}'
