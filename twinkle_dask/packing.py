"""Values as one buffer: a small JSON header and raw little-endian arrays behind it.

This is the only format between gateway and host, and of journal payloads and stored results.
Layout, version 1 (all integers little-endian)::

    b"TWDP" | version u16 | reserved u16 | header bytes u32 | header | pad to 8 | arrays

The header is ``{"tree": ..., "arrays": [[dtype, shape, offset], ...]}``; every array starts at a
multiple of 8 from the end of the padded header. In the tree ``{"$a": i}`` is array i, ``{"$b": i}``
the same as bytes, and ``{"$t": name, ...fields}`` a value class. Only classes that were registered
here by name are ever built, so a buffer cannot name code. NaN and infinity travel in arrays, or
as ``{"$f": text}``, since JSON has no words for them. A mapping's own keys that begin with ``$``
get another one in front, so that what a tenant sends is never taken for any of these.

A reader refuses a version it does not know; a change of layout or of a value's meaning takes a
new version number.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any, Final, cast

import numpy as np
import orjson

from twinkle_dask.types import (
    AdamParams,
    ClipGradient,
    CsrLayout,
    CustomLoss,
    Datum,
    Embed,
    EmbedResult,
    ForwardBackward,
    ForwardBackwardResult,
    GradientStep,
    GradientStepResult,
    Image,
    ImageFacts,
    LoraSpec,
    LossName,
    LossSpec,
    ModelFacts,
    OptimizerSpec,
    OptimStep,
    SampledSequence,
    SamplePart,
    SampleRequest,
    SampleResult,
    SamplingParams,
    SchedulerSpec,
    ScoredTokens,
    StepResult,
    Stop,
    StopReason,
    TargetLogprobs,
    TargetTokens,
)

VERSION: Final = 1
_MAGIC: Final = b"TWDP"
_PREFIX: Final = struct.Struct("<4sHHI")
_DTYPES: Final = frozenset({"<i4", "<i8", "<f4", "|u1", "|b1"})

_CLASSES: dict[str, type[Any]] = {}


class UnreadableBuffer(ValueError):
    """The bytes are not a buffer of a version that this code reads."""


def register(*classes: type[Any]) -> None:
    """Allow frozen dataclasses and string enums in buffers, under their class names."""
    for cls in classes:
        if _CLASSES.setdefault(cls.__name__, cls) is not cls:
            raise ValueError(f"{cls.__name__} is registered twice")


register(
    AdamParams,
    ClipGradient,
    CsrLayout,
    CustomLoss,
    Datum,
    Embed,
    EmbedResult,
    ForwardBackward,
    ForwardBackwardResult,
    GradientStep,
    GradientStepResult,
    Image,
    ImageFacts,
    LoraSpec,
    LossName,
    LossSpec,
    ModelFacts,
    OptimStep,
    OptimizerSpec,
    SampleRequest,
    SamplePart,
    SampleResult,
    SampledSequence,
    SamplingParams,
    SchedulerSpec,
    ScoredTokens,
    StepResult,
    Stop,
    StopReason,
    TargetLogprobs,
    TargetTokens,
)


def pack(value: object) -> bytes:
    """Write a value.

    It may be made of registered dataclasses and enums, dicts with string keys, sequences (read
    back as tuples), numbers, strings, None, bytes, and int32, int64, float32, uint8 or bool arrays
    of any shape.

    Raises:
        TypeError: Something else is inside.
    """
    writer = _Writer()
    tree = writer.tree(value)
    header = orjson.dumps({"tree": tree, "arrays": writer.index})
    head = _PREFIX.pack(_MAGIC, VERSION, 0, len(header)) + header
    return b"".join([head, bytes(-len(head) % 8), *writer.parts])


def unpack(buffer: bytes | bytearray | memoryview) -> Any:
    """Read what ``pack`` wrote. Arrays are read-only views into ``buffer``.

    Raises:
        UnreadableBuffer: Truncated, not such a buffer, an unknown version or class.
    """
    view = memoryview(buffer)
    try:
        magic, version, _, size = _PREFIX.unpack_from(view)
        if magic != _MAGIC:
            raise UnreadableBuffer("These bytes are not a packed value.")
        if version != VERSION:
            raise UnreadableBuffer(f"Packed with version {version}; this code reads {VERSION}.")
        header = orjson.loads(view[_PREFIX.size : _PREFIX.size + size])
        body = view[_PREFIX.size + size + (-(_PREFIX.size + size) % 8) :]
        return _Reader(header["arrays"], body).value(header["tree"])
    except UnreadableBuffer:
        raise
    except (struct.error, KeyError, TypeError, ValueError, IndexError) as error:
        raise UnreadableBuffer(f"The packed value is damaged: {error}") from error


class _Writer:
    def __init__(self) -> None:
        self.index: list[tuple[str, tuple[int, ...], int]] = []
        self.parts: list[bytes | memoryview] = []
        self._offset = 0

    def _append(self, dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> int:
        self.index.append((dtype, shape, self._offset))
        size = len(data)
        self.parts.append(data)
        if pad := -size % 8:
            self.parts.append(bytes(pad))
        self._offset += size + pad
        return len(self.index) - 1

    def tree(self, value: object) -> object:
        match value:
            case StrEnum():
                return {"$t": type(value).__name__, "v": value.value}
            case None | bool() | int() | str():
                return value
            case float():
                return value if math.isfinite(value) else {"$f": repr(value)}
            case np.ndarray():
                array = cast(np.ndarray[Any, Any], value)
                dtype = array.dtype.str
                if dtype not in _DTYPES:
                    raise TypeError(f"Arrays of {array.dtype} do not travel.")
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                return {"$a": self._append(dtype, array.shape, data)}
            case bytes() | bytearray() | memoryview():
                raw = memoryview(cast(bytes, value)).cast("B")
                return {"$b": self._append("|u1", (len(raw),), raw)}
            case Mapping():
                items = cast(Mapping[str, object], value)
                return {_escaped(key): self.tree(item) for key, item in items.items()}
            case list() | tuple():
                return [self.tree(item) for item in cast(list[object], value)]
            case _:
                return self._dataclass(value)

    def _dataclass(self, value: object) -> object:
        name = type(value).__name__
        if not is_dataclass(value) or _CLASSES.get(name) is not type(value):
            raise TypeError(f"{type(value)!r} does not travel; see packing.register.")
        tree: dict[str, object] = {"$t": name}
        for field in fields(value):
            tree[field.name] = self.tree(getattr(value, field.name))
        return tree


class _Reader:
    def __init__(self, index: list[tuple[str, list[int], int]], body: memoryview) -> None:
        self._index = index
        self._body = body

    def _array(self, i: int) -> np.ndarray[Any, Any]:
        dtype, shape, offset = self._index[i]
        if dtype not in _DTYPES:
            raise UnreadableBuffer(f"Arrays of {dtype} do not travel.")
        array = np.frombuffer(self._body, dtype=dtype, count=math.prod(shape), offset=offset)
        return array.reshape(shape)

    def value(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return tuple(self.value(item) for item in cast(list[Any], tree))
        if not isinstance(tree, dict):
            return tree
        items = cast(dict[str, Any], tree)
        if "$t" in items:
            cls = _CLASSES.get(items["$t"])
            if cls is None:
                raise UnreadableBuffer(f"Unknown value class {items['$t']!r}.")
            if issubclass(cls, StrEnum):
                return cls(items["v"])
            return cls(**{key: self.value(item) for key, item in items.items() if key != "$t"})
        if "$a" in items:
            return self._array(items["$a"])
        if "$b" in items:
            return self._array(items["$b"]).tobytes()
        if "$f" in items:
            return float(items["$f"])
        return {key[key.startswith("$$") :]: self.value(item) for key, item in items.items()}


def _escaped(key: object) -> object:
    return f"${key}" if isinstance(key, str) and key.startswith("$") else key
