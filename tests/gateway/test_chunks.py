import base64
from typing import Any

import pytest

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.types import Image
from twinkle_dask_gateway.tinker import tinker_pb2 as pb
from twinkle_dask_gateway.tinker import wire
from twinkle_dask_gateway.tinker.chunks import Row, row_of_json, row_of_protobuf

DATA = b"\x89PNG and so on"
BASE64 = base64.b64encode(DATA).decode()


def of_json(*chunks: dict[str, Any]) -> Row:
    return row_of_json(wire.ModelInput(chunks=list(chunks)))


def text(*tokens: int) -> dict[str, Any]:
    return {"type": "encoded_text", "tokens": list(tokens)}


def image(**fields: Any) -> dict[str, Any]:
    return {"type": "image", "data": BASE64, "format": "png"} | fields


def test_images_stand_between_the_tokens_around_them() -> None:
    first = Image(position=2, format="png", data=DATA)
    second = Image(position=2, format="jpeg", data=DATA, expected_positions=4)
    last = Image(position=3, format="png", data=DATA)
    chunks = [text(1, 2), image(), image(format="jpeg", expected_tokens=4), text(3), image()]
    in_json = of_json(*chunks)

    message = pb.Datum()
    for chunk in chunks:
        part = message.model_input.add()
        if chunk["type"] == "encoded_text":
            part.encoded_text.tokens = b"".join(n.to_bytes(4, "little") for n in chunk["tokens"])
        else:
            part.image.data, part.image.format = DATA, chunk["format"]
            if "expected_tokens" in chunk:
                part.image.expected_tokens = chunk["expected_tokens"]
    in_protobuf = row_of_protobuf(message.model_input)

    for row in (in_json, in_protobuf):
        assert row.tokens.tolist() == [1, 2, 3]
        assert row.images == (first, second, last)


def test_an_image_alone_and_nothing_at_all() -> None:
    row = of_json(image())
    assert (len(row.tokens), row.images[0].position) == (0, 0)
    assert of_json().images == ()


def test_old_clients_leave_out_the_type() -> None:
    row = of_json({"tokens": [7]}, {"data": BASE64, "format": "jpeg", "expected_tokens": None})
    assert row.tokens.tolist() == [7]
    assert row.images == (Image(position=1, format="jpeg", data=DATA),)


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        ({"location": "x"}, "'image_asset_pointer' are not supported: .* fetches nothing"),
        ({"type": "dmel", "dmel": ""}, "'dmel' are not supported: no model here hears"),
        ({"dmel": ""}, "'dmel'"),
        ({"type": "video"}, "'video' are not supported: send encoded_text or image"),
        ({}, "'unknown' are not supported"),
    ],
)
def test_other_chunks_are_refused_by_kind(chunk: dict[str, Any], says: str) -> None:
    with pytest.raises(NotSupported, match=says):
        of_json(text(1), chunk)


@pytest.mark.parametrize("tokens", [None, "12", [1.5], [2**31], [-(2**31) - 1], ["1"], [[1]]])
def test_bad_tokens_are_refused(tokens: Any) -> None:
    with pytest.raises(InvalidRequest):
        of_json({"type": "encoded_text", "tokens": tokens})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"data": ""}, "file in base64"),
        ({"data": None}, "file in base64"),
        ({"data": "no base64!"}, "file in base64"),
        ({"data": "Ünicode="}, "file in base64"),
        ({"data": [1, 2]}, "file in base64"),
        ({"format": "gif"}, "'png' or 'jpeg', not 'gif'"),
        ({"format": None}, "'png' or 'jpeg'"),
        ({"expected_tokens": "4"}, "must be an integer"),
        ({"expected_tokens": True}, "must be an integer"),
    ],
)
def test_what_is_no_image_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        of_json(image(**fields))
