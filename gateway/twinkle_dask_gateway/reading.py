"""From a request to a checked body."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import orjson
import zstandard
from fastapi import Request
from pydantic import BaseModel, ValidationError

from twinkle_dask.errors import InvalidRequest
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.faults import describe
from twinkle_dask_gateway.pieces import load

PROTOBUF = "application/x-protobuf"

_M = TypeVar("_M", bound=BaseModel)
_T = TypeVar("_T")
# A zstd block of 4 bytes may unfold to 128 KiB; so one such piece cannot unfold to more than 32 MiB
# before the output is counted.
_ZSTD_PIECE_BYTES = 1024
_ZSTD_WINDOW_BYTES = 32 * 1024 * 1024


async def read(request: Request, model: type[_M]) -> _M:
    """Read a JSON body.

    Raises:
        InvalidRequest: It is no JSON, or not what ``model`` says.
    """
    return check(model, await read_object(request))


async def read_object(request: Request) -> dict[str, Any]:
    """Read a JSON body as it is.

    Raises:
        InvalidRequest: It is no JSON object.
    """
    content_type = _media_type(request)
    if content_type and not (content_type.endswith(("/json", "+json"))):
        raise InvalidRequest(f"Content-Type must be application/json here, not {content_type!r}.")
    body = await read_bytes(request)
    return await aside(len(body), _config(request), lambda: parse(body))


def parse(body: bytes) -> dict[str, Any]:
    """Parse a JSON body.

    Raises:
        InvalidRequest: It is no JSON object, or holds what no database takes as text.
    """
    try:
        value = load(body)
    except orjson.JSONDecodeError as error:
        # error.msg only: the exception carries the whole document.
        raise InvalidRequest(f"The body is no JSON: {error.msg} at {error.pos}.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    fields = cast(dict[str, Any], value)
    if b"\\u0000" in body and _has_null(fields):
        raise InvalidRequest("No text may hold the character U+0000.")
    return fields


def check(model: type[_M], body: Mapping[str, Any], *, max_data: int | None = None) -> _M:
    """Hold a body against its model, which may have at most ``max_data`` data.

    Raises:
        InvalidRequest: It does not fit; the message names the field, never its content.
    """
    try:
        return model.model_validate(body, context={"max_data": max_data})
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise InvalidRequest(describe(problems)) from None


async def read_bytes(request: Request) -> bytes:
    """Read a body and undo its zstd compression.

    Raises:
        InvalidRequest: Another encoding, damaged, or larger than allowed once unpacked.
    """
    body = await request.body()
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in {"", "identity"}:
        return body
    if encoding != "zstd":
        raise InvalidRequest(f"Content-Encoding {encoding[:40]!r} is not supported; use zstd.")
    max_bytes = _config(request).max_decoded_bytes
    return await asyncio.to_thread(unpack, body, max_bytes)


async def size_of(request: Request) -> int:
    """How large a body is that was read; of a compressed one, how large it may be unpacked."""
    if request.headers.get("content-encoding", "").strip().lower() in {"", "identity"}:
        return len(await request.body())
    return _config(request).max_decoded_bytes


def is_protobuf(request: Request) -> bool:
    """Whether the body says it is protobuf."""
    return _media_type(request) in {PROTOBUF, "application/protobuf"}


async def aside(num_bytes: int, config: GatewayConfig, work: Callable[[], _T]) -> _T:
    """Do decoding or encoding work, in a thread if it is much: the loop serves everybody."""
    if num_bytes > config.thread_above_bytes:
        return await asyncio.to_thread(work)
    return work()


def unpack(body: bytes, max_bytes: int) -> bytes:
    """Undo zstd's compression.

    Raises:
        InvalidRequest: It is damaged, or unpacks to more than ``max_bytes``.
    """
    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
    out = bytearray()
    start = 0
    try:
        for start in range(0, len(body), _ZSTD_PIECE_BYTES):
            out += unpacker.decompress(body[start : start + _ZSTD_PIECE_BYTES])
            if len(out) > max_bytes:
                raise InvalidRequest(
                    f"The body unpacks to more than {max_bytes / 2**20:.1f} MiB. "
                    "Send it in several requests."
                )
            if unpacker.eof:
                break
    except zstandard.ZstdError:
        raise InvalidRequest("The body is no valid zstd frame.") from None
    if not unpacker.eof:
        raise InvalidRequest("The zstd frame of the body is not complete.")
    if start + _ZSTD_PIECE_BYTES < len(body) or unpacker.unused_data:
        raise InvalidRequest("There are bytes after the end of the zstd frame.")
    return bytes(out)


def let_go(*values: Any) -> None:
    """Take a large JSON value to pieces, a list of numbers at a time.

    Freed at once, a million numbers keep the interpreter's lock for 20 ms.
    """
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, dict):
            fields = cast(dict[str, Any], value)
            left += fields.values()
            fields.clear()
        elif isinstance(value, list):
            items = cast(list[Any], value)
            # Lists are of one kind; those of numbers go as they are.
            if items and not isinstance(items[0], int | float):
                left += items
            items.clear()


def _has_null(value: Any) -> bool:
    """Whether a text in a JSON value holds U+0000, which PostgreSQL refuses."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            if "\0" in value:
                return True
        elif isinstance(value, dict):
            fields = cast(dict[str, Any], value)
            left += fields.keys()
            left += fields.values()
        elif isinstance(value, list):
            left += cast(list[Any], value)
    return False


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _config(request: Request) -> GatewayConfig:
    return cast(GatewayConfig, request.app.state.config)
