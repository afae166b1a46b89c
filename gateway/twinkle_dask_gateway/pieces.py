"""JSON of any size, parsed without keeping the interpreter's lock for long.

orjson holds the lock until it is done: 8 MB of numbers stop every other thread, the event loop's
too, for a tenth of a second. So a large document is cut into pieces that orjson reads one after
another, where numpy, which lets go of the lock, finds its brackets and commas. All that is taken
away between pieces is one bracket or comma each, so what passes piece by piece is JSON as a whole.
"""

from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

PIECE_BYTES: Final = 512 * 1024
# Of what is larger than a piece. A batch's lists of numbers lie on level 8.
MAX_LEVELS: Final = 16

_Container = TypeVar("_Container", list[Any], dict[str, Any])
_Places: TypeAlias = NDArray[np.int64]

_STRUCTURE = np.zeros(256, bool)
_STRUCTURE[list(b'"[]{},:')] = True
_LEVEL = np.zeros(256, np.int8)
_LEVEL[list(b"[{")], _LEVEL[list(b"]}")] = 1, -1
_QUOTE, _BACKSLASH, _COMMA, _COLON = b'"\\,:'
_CLOSING = {ord("["): ord("]"), ord("{"): ord("}")}


def load(document: bytes, piece_bytes: int = PIECE_BYTES) -> Any:
    """Parse a document; gives what ``orjson.loads`` gives.

    Raises:
        orjson.JSONDecodeError: It is no JSON, or large parts of it are nested too deeply.
    """
    if len(document) <= piece_bytes:
        return orjson.loads(document)
    return _Document(document, piece_bytes).value(0, len(document), 1)


class _Document:
    """A document and where its brackets, commas and colons are, except those in strings.

    ``_level[i]`` counts the containers that are open after ``_places[i]``.
    """

    def __init__(self, document: bytes, piece_bytes: int) -> None:
        self._document, self._piece_bytes = document, piece_bytes
        content = np.frombuffer(document, np.uint8)
        places = np.flatnonzero(np.take(_STRUCTURE, content))
        if b"\\" in document:
            places = places[~np.isin(places, _escaped(content), assume_unique=True)]
        signs = np.take(content, places)
        quotes = signs == _QUOTE
        outside = (np.cumsum(quotes) & 1 == 0) & ~quotes
        self._places, self._signs = places[outside], signs[outside]
        self._level = np.cumsum(np.take(_LEVEL, self._signs), dtype=np.int32)

    def value(self, start: int, end: int, level: int) -> Any:
        """The value between two places, which opens the container number ``level``, if any."""
        first, last = np.searchsorted(self._places, (start, end))
        if end - start <= self._piece_bytes or first == last:
            return self._loads(start, end)
        opening, closing = int(self._places[first]), int(self._places[last - 1])
        sign = int(self._signs[first])
        if _CLOSING.get(sign) != self._signs[last - 1]:
            raise self._no_json("a bracket is not closed", opening)
        if level > MAX_LEVELS:
            raise self._no_json("too many levels", opening)
        around = self._document[start:opening] + self._document[closing + 1 : end]
        if around.strip(b" \t\r\n"):
            raise self._no_json("something stands beside a bracket", start)
        signs, levels = self._signs[first:last], self._level[first:last]
        commas = self._places[first:last][(signs == _COMMA) & (levels == level)]
        ends = np.append(commas, closing)
        if sign == ord("["):
            return self._gather([], opening + 1, ends, level)
        return self._gather({}, opening + 1, ends, level)

    def _gather(self, out: _Container, start: int, ends: _Places, level: int) -> _Container:
        """What a container holds: ``ends`` are the places after each of its items."""
        num = 0
        while num < len(ends):
            # As many items as fit into a piece, or one that does not.
            after = int(np.searchsorted(ends, start + self._piece_bytes, side="right"))
            after = max(after, num + 1)
            end = int(ends[after - 1])
            empty = len(ends) == 1
            if end - start <= self._piece_bytes:
                self._put_small(out, start, end, empty=empty)
            elif not self._document[start:end].strip(b" \t\r\n"):
                self._put_small(out, start, start, empty=empty)  # nothing but spaces
            else:
                self._put_large(out, start, end, level)
            num, start = after, end + 1
        return out

    def _put_small(self, out: _Container, start: int, end: int, *, empty: bool) -> None:
        before = len(out)
        if isinstance(out, list):
            out += self._loads(start, end, b"[", b"]")
            there = len(out) > before
        else:
            found = self._loads(start, end, b"{", b"}")
            out.update(found)
            there = bool(found)
        if not there and not empty:
            raise self._no_json("a comma follows nothing or precedes nothing", start)

    def _put_large(self, out: _Container, start: int, end: int, level: int) -> None:
        if isinstance(out, list):
            out.append(self.value(start, end, level + 1))
        else:
            first = int(np.searchsorted(self._places, start))
            colon = int(self._places[first])
            key = self._loads(start, colon)
            if self._signs[first] != _COLON or not isinstance(key, str):
                raise self._no_json("a key is not followed by a colon", start)
            out[key] = self.value(colon + 1, end, level + 1)

    def _loads(self, start: int, end: int, opening: bytes = b"", closing: bytes = b"") -> Any:
        try:
            return orjson.loads(opening + self._document[start:end] + closing)
        except orjson.JSONDecodeError as error:
            raise self._no_json(error.msg, start + error.pos - len(opening)) from None

    def _no_json(self, message: str, place: int) -> orjson.JSONDecodeError:
        return orjson.JSONDecodeError(message, "", place)


def _escaped(content: NDArray[np.uint8]) -> _Places:
    """The places after an odd number of backslashes."""
    slashes = np.flatnonzero(content == _BACKSLASH)
    breaks = np.diff(slashes) != 1
    firsts = slashes[np.concatenate(([True], breaks))]
    lasts = slashes[np.concatenate((breaks, [True]))]
    return lasts[(lasts - firsts) % 2 == 0] + 1
