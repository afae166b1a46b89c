"""How much is in a protobuf body, counted before it is parsed.

The parser makes an object of every message, empty ones of two bytes too, and holds the
interpreter's lock until it is done: 20 MiB of tiny data stop the whole server for a second.
Counting stops where there are too many.
"""

from collections.abc import Generator

from twinkle_dask.errors import InvalidRequest

_DATA = 3  # the field number of ForwardBackwardRequest.data
# A datum has a field or so for each of its chunks and loss inputs; a batch a handful of its own.
_FIELDS_PER_DATUM = 8
_MIN_FIELDS = 16_384


def check_num_data(num_data: int, max_data: int) -> None:
    """Refuse a batch of too many data.

    Raises:
        InvalidRequest: There are more than ``max_data``.
    """
    if num_data > max_data:
        raise InvalidRequest(
            f"The batch has more than {max_data} data. Send it as several requests; losses are "
            "sums, so the gradient is the same."
        )


def check_counts(body: bytes, max_data: int) -> None:
    """Refuse a ``ForwardBackwardRequest`` of too many data, or of too many fields in them.

    Raises:
        InvalidRequest: So it is, or the bytes are no such message.
    """
    num_data = num_fields = 0
    max_fields = max(_MIN_FIELDS, _FIELDS_PER_DATUM * max_data)
    try:
        for number, start, end in _fields(body, 0, len(body)):
            num_fields += 1
            if number == _DATA:
                num_data += 1
                check_num_data(num_data, max_data)
                for _ in _fields(body, start, end):
                    num_fields += 1
                    if num_fields > max_fields:
                        break
            if num_fields > max_fields:
                raise InvalidRequest(
                    f"The batch has more than {max_fields} chunks and tensors. Send it as several "
                    "requests."
                )
    except (IndexError, _NoMessage):
        raise InvalidRequest(
            f"The body ({len(body)} bytes) is not a complete protobuf ForwardBackwardRequest."
        ) from None


class _NoMessage(Exception):
    """The bytes are not protobuf as our schema has it."""


def _fields(body: bytes, start: int, end: int) -> Generator[tuple[int, int, int]]:
    """Number, start and end of each field's content between two places of ``body``."""
    while start < end:
        tag, start = _varint(body, start)
        match tag & 7:
            case 0:  # a number
                _, after = _varint(body, start)
            case 1:  # 8 bytes
                after = start + 8
            case 2:  # a length and so many bytes
                size, start = _varint(body, start)
                after = start + size
            case 5:  # 4 bytes
                after = start + 4
            case _:  # groups, which proto3 does not have
                raise _NoMessage
        if after > end:
            raise _NoMessage
        yield tag >> 3, start, after
        start = after


def _varint(body: bytes, start: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and the place after it."""
    value = shift = 0
    while True:
        byte = body[start]
        start += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, start
        shift += 7
        if shift > 63:
            raise _NoMessage
