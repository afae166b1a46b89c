"""A model's input as the wire carries it, in chunks, to a row of tokens and the images in it."""

import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.types import Image, Int32Array
from twinkle_dask_gateway.tinker import tinker_pb2 as pb
from twinkle_dask_gateway.tinker import wire
from twinkle_dask_gateway.tinker.tensors import integers

_INT32 = np.iinfo(np.int32)
_FORMATS = frozenset({"png", "jpeg"})
# What old SDKs leave out: the kind of a chunk follows from its content's key.
_KEYS = {
    "tokens": "encoded_text",
    "location": "image_asset_pointer",
    "data": "image",
    "dmel": "dmel",
}
_REFUSED = {
    "dmel": "no model here hears; send encoded_text or image",
    "image_asset_pointer": (
        "this server fetches nothing from elsewhere; send the image itself, as kind 'image'"
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens, and images that stand between them; see ``Image.position``."""

    tokens: Int32Array
    images: tuple[Image, ...] = ()


class _Builder:
    def __init__(self) -> None:
        self._parts: list[Int32Array] = []
        self._images: list[Image] = []
        self._length = 0

    def text(self, tokens: Int32Array) -> None:
        self._parts.append(tokens)
        self._length += len(tokens)

    def image(self, data: bytes, format_: str, expected: int | None) -> None:
        if format_ not in _FORMATS:
            raise InvalidRequest(f"an image's format must be 'png' or 'jpeg', not {format_[:20]!r}")
        self._images.append(
            Image(position=self._length, format=format_, data=data, expected_positions=expected)
        )

    def row(self) -> Row:
        match self._parts:
            case []:
                tokens = np.empty(0, np.int32)
            case [only]:
                tokens = only
            case parts:
                tokens = np.concatenate(parts)
        return Row(tokens, tuple(self._images))


def row_of_json(model_input: wire.ModelInput) -> Row:
    """Put chunks together.

    Raises:
        InvalidRequest: A token is no 32-bit integer, or an image is no file in base64.
        NotSupported: A chunk is of a kind that is not served.
    """
    builder = _Builder()
    for chunk in model_input.chunks:
        kind = chunk.get("type") or next(
            (kind for key, kind in _KEYS.items() if key in chunk), "unknown"
        )
        match kind:
            case "encoded_text":
                builder.text(_tokens(chunk.get("tokens")))
            case "image":
                builder.image(*_image(chunk))
            case _:
                raise _refusal(str(kind))
    return builder.row()


def row_of_protobuf(chunks: Iterable[pb.Chunk]) -> Row:
    """Put chunks together. The tokens may share memory with the message.

    Raises:
        InvalidRequest: A chunk is empty, or holds no whole number of tokens.
        NotSupported: A chunk is of a kind that is not served.
    """
    builder = _Builder()
    for chunk in chunks:
        match chunk.WhichOneof("chunk"):
            case "encoded_text":
                data = chunk.encoded_text.tokens
                if len(data) % 4:
                    raise InvalidRequest(f"{len(data)} bytes are no whole number of tokens")
                builder.text(np.frombuffer(data, "<i4"))
            case "image":
                image = chunk.image
                if image.HasField("override_dimensions"):
                    raise NotSupported(
                        "'override_dimensions' of an image is not supported; send it in the size "
                        "that is meant"
                    )
                has_length = image.HasField("expected_tokens")
                expected = image.expected_tokens if has_length else None
                builder.image(image.data, image.format, expected)
            case None:
                raise InvalidRequest("a chunk of model_input is empty")
            case kind:
                raise _refusal(kind)
    return builder.row()


def _refusal(kind: str) -> NotSupported:
    reason = _REFUSED.get(kind, "send encoded_text or image")
    return NotSupported(f"chunks of kind {kind[:40]!r} are not supported: {reason}")


def _tokens(values: Any) -> Int32Array:
    array = integers(values, "tokens")
    if len(array) and not (_INT32.min <= array.min() and array.max() <= _INT32.max):
        raise InvalidRequest("a token is not within 32 bits")
    return array.astype(np.int32)


def _image(chunk: dict[str, Any]) -> tuple[bytes, str, int | None]:
    expected = chunk.get("expected_tokens")
    if expected is not None and type(expected) is not int:
        raise InvalidRequest("an image's expected_tokens must be an integer")
    data = chunk.get("data")
    try:
        decoded = binascii.a2b_base64(data, strict_mode=True) if isinstance(data, str) else b""
    except (binascii.Error, ValueError):  # a character that is not ASCII is a ValueError
        decoded = b""
    if not decoded:
        raise InvalidRequest("an image's data must be a file in base64")
    return decoded, str(chunk.get("format")), expected
