"""What an image file tells without being decoded: its size, and that decoding it is no trap.

Hosts decode in the thread that computes for everybody. So what makes a decoder slow is bounded:
pixels, and pieces of a file that it looks at one by one, of which a few bytes can make many.
"""

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.types import Image

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
# Encoders make pieces of 8 KiB; whatever is smaller on average than this was made to hurt.
_BYTES_PER_CHUNK = 256
_FEW_CHUNKS = 64
# A JPEG has a dozen segments before its first scan, or two.
_MAX_SEGMENTS = 256
# Every scan goes over all pixels again; progressive files have ten.
_SCAN = b"\xff\xda"
_MAX_SCANS = 32


def size_of(image: Image) -> tuple[int, int]:
    """Width and height in pixels.

    Raises:
        InvalidRequest: The file is not of the format that it is said to be, incomplete, or made of
            more pieces than any encoder makes.
    """
    data = image.data
    if image.format == "png" and data.startswith(_PNG):
        return _png(data)
    if image.format == "jpeg" and data.startswith(_JPEG):
        return _jpeg(data)
    raise InvalidRequest(
        f"is said to be {image.format} and is not: it does not begin as such a file does"
    )


def _png(data: bytes) -> tuple[int, int]:
    width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
    if len(data) < 24 or data[12:16] != b"IHDR" or not width or not height:
        raise InvalidRequest("is not complete: it tells no size")
    at = len(_PNG)
    for _ in range(_FEW_CHUNKS + len(data) // _BYTES_PER_CHUNK):
        kind = data[at + 4 : at + 8]
        if kind == b"IHDR" and at > len(_PNG):
            raise InvalidRequest("tells its size twice; save it anew")  # decoders take the last
        at += 12 + int.from_bytes(data[at : at + 4])
        if kind == b"IEND" or at >= len(data):
            return width, height
    raise InvalidRequest("is cut into too many chunks; save it anew")


def _jpeg(data: bytes) -> tuple[int, int]:
    if data.count(_SCAN) > _MAX_SCANS:
        raise InvalidRequest("is cut into too many scans; save it anew")
    at, width, height = 2, 0, 0
    for _ in range(_MAX_SEGMENTS):
        if data[at : at + 1] != b"\xff" or len(data) < at + 4:
            break
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # before a marker there may be more of them
            at += 1
            continue
        if marker == _SCAN[1] and width and height:
            return width, height
        # The start of a frame of any kind; the three others of this range are tables.
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}:
            height, width = (int.from_bytes(data[at + n : at + n + 2]) for n in (5, 7))
        at += 2 + size
    else:
        raise InvalidRequest("is cut into too many segments; save it anew")
    raise InvalidRequest("is not complete: it tells no size, or has no scan")
