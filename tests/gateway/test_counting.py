"""Bodies that would make the parser build more than anybody can want."""

import time

import pytest

from tests.gateway.test_codec_proto import TARGETS, one_datum, sdk_body
from twinkle_dask.errors import InvalidRequest
from twinkle_dask_gateway.tinker.codec_proto import parse_forward_backward
from twinkle_dask_gateway.tinker.counting import check_counts

EMPTY_DATUM = b"\x1a\x00"  # field 3, no bytes


def test_as_many_data_as_the_limit_says() -> None:
    body = sdk_body(*[one_datum(target_tokens=TARGETS)] * 5)
    assert len(parse_forward_backward(body, max_data=5).data) == 5
    with pytest.raises(InvalidRequest, match="more than 4 data"):
        parse_forward_backward(body, max_data=4)


@pytest.mark.parametrize(
    "piece",
    [
        EMPTY_DATUM,
        b"\x2a\x00",  # a loss setting
        b"\x10\x01",  # the place, over and over
        b"\x1a\x80\x08" + b"\x0a\x00" * 512,  # a datum of empty chunks
        b"\x1a\x80\x08" + b"\x12\x00" * 512,  # or of empty tensors
    ],
    ids=["data", "settings", "numbers", "chunks", "tensors"],
)
def test_a_large_body_of_tiny_things_is_refused_at_once(piece: bytes) -> None:
    body = sdk_body() + piece * (20_000_000 // len(piece))
    start = time.perf_counter()
    with pytest.raises(InvalidRequest, match="more than"):
        parse_forward_backward(body, max_data=16384)
    assert time.perf_counter() - start < 5  # seconds where the parser alone takes as many


@pytest.mark.parametrize(
    "body",
    [
        b"\x1a",
        b"\x1a\x05abc",  # longer than the body
        b"\x1a\x02\x0a\x05" + b"abcdefgh",  # longer than its datum
        b"\x1b\x1c",  # a group
        b"\xff" * 20,  # a number without an end
        b"\x11abc",
        b"\x15ab",
    ],
)
def test_what_is_no_message_is_called_so(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not a complete protobuf"):
        check_counts(body, 10)


@pytest.mark.parametrize("run", ["", "x" * 257])
def test_an_id_is_short(run: str) -> None:
    with pytest.raises(InvalidRequest, match="model_id must have from 1 to 256"):
        parse_forward_backward(sdk_body(run=run), max_data=1)
