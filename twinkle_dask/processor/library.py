"""The ``datasets`` library and pyarrow, which have no types, behind one door.

Importing this takes a second; the gateway does without.
"""

from typing import Any, TypeAlias

import datasets  # pyright: ignore[reportMissingTypeStubs]
import pyarrow  # pyright: ignore[reportMissingTypeStubs]
import pyarrow.parquet  # pyright: ignore[reportMissingTypeStubs]

hf: Any = datasets
pa: Any = pyarrow
pq: Any = pyarrow.parquet

#: ``datasets.Dataset``.
Rows: TypeAlias = Any
