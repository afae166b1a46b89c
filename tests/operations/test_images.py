"""Room for images, and what is known of them before anything is decoded."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PilImage

from tests.models import encoded_image
from tests.operations.test_validation import LIMITS, MODEL, SAMPLE
from twinkle_dask import packing
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.losses import loss_spec
from twinkle_dask.operations import images, validation
from twinkle_dask.operations.image_files import size_of
from twinkle_dask.types import Datum, ForwardBackward, Image, ImageFacts, SampleRequest

PNG = encoded_image(1, size=(30, 20))
JPEG = encoded_image(1, size=(30, 20), format_="JPEG")
FACTS = ImageFacts(num_positions=5, placeholder=9)
SEEING = replace(MODEL, facts=replace(MODEL.facts, images=FACTS, context_length=64))


def image(position: int = 1, data: bytes = PNG, format_: str = "png", **fields: Any) -> Image:
    return Image(position=position, format=format_, data=data, **fields)


def prompt(*some: Image, length: int = 3) -> SampleRequest:
    return replace(SAMPLE, prompt=np.arange(1, length + 1, dtype=np.int32), images=some)


@given(st.lists(st.integers(0, 6), max_size=6).map(sorted))
def test_images_get_room_where_they_stood(places: list[int]) -> None:
    asked = prompt(*[image(place) for place in places], length=6)
    placed = validation.sample(asked, SEEING, LIMITS)
    expected = list(range(1, 7))
    for place in reversed(places):
        expected[place:place] = [FACTS.placeholder] * FACTS.num_positions
    assert placed.prompt.tolist() == expected
    assert placed.prompt.dtype == np.int32
    rest = placed.prompt.tolist()
    for one in reversed(placed.images):
        assert one.num_positions == FACTS.num_positions
        here = slice(one.position, one.position + one.num_positions)
        assert rest[here] == [FACTS.placeholder] * FACTS.num_positions
        del rest[here]
    assert rest == list(range(1, 7))
    assert packing.unpack(packing.pack(placed)).images == placed.images


def test_targets_are_as_long_as_tokens_and_images_together() -> None:
    def batch(num_targets: int) -> ForwardBackward:
        datum = Datum(
            tokens=np.array([1, 2], np.int32),
            target_tokens=np.ones(num_targets, np.int64),
            loss_inputs={},
            images=(image(),),
        )
        text = Datum(tokens=datum.tokens, target_tokens=np.ones(2, np.int64), loss_inputs={})
        return ForwardBackward(data=(text, datum), loss=loss_spec("cross_entropy", {}))

    placed = validation.batch(batch(7), SEEING, LIMITS)
    assert [len(datum.tokens) for datum in placed.data] == [2, 7]
    assert placed.num_tokens == 9
    for wrong in (2, 3, 8):
        with pytest.raises(InvalidRequest, match=r"Datum 1: target_tokens .* there are 7 tokens"):
            validation.batch(batch(wrong), SEEING, LIMITS)
    with pytest.raises(InvalidRequest, match=r"Datum 1 has an image, but .* reads text alone"):
        validation.batch(batch(7), MODEL, LIMITS)


def test_without_images_nothing_is_made_anew() -> None:
    assert images.placed_in_prompt(SAMPLE, MODEL, LIMITS) is SAMPLE


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (image(data=JPEG), "image 0 is said to be png and is not"),
        (image(format_="jpeg"), "image 0 is said to be jpeg and is not"),
        (image(data=b""), "is said to be png"),
        (image(data=PNG[:20]), "is not complete"),
        (image(data=JPEG[:30], format_="jpeg"), "is not complete"),
        (image(data=b"\xff\xd8" + b"\xff" * 1500, format_="jpeg"), "too many segments"),
        (image(data=JPEG[:2] + b"\xff\xfe\x00\x04ab" * 300, format_="jpeg"), "too many segments"),
        (image(data=JPEG[:-2] + b"\xff\xda\x00\x02" * 64, format_="jpeg"), "too many scans"),
        (image(data=PNG[:33] + (bytes(4) + b"tEXt" + bytes(4)) * 120), "too many chunks"),
        (image(data=PNG[:33] + PNG[8:]), "tells its size twice"),
        (image(data=PNG + bytes(2000)), "has .* bytes; send at most 2000"),
        (image(data=encoded_image(1, (50, 21))), "50 x 21 pixels; send at most 1000"),
        (image(expected_positions=4), "takes 5 tokens with this model.*expected_tokens says 4"),
    ],
)
def test_what_cannot_be_used_is_refused(bad: Image, says: str) -> None:
    limits = LIMITS.model_copy(update={"max_image_bytes": 2000, "max_image_pixels": 1000})
    validation.sample(prompt(image(expected_positions=5)), SEEING, limits)
    with pytest.raises(InvalidRequest, match=f"The prompt: .*{says}"):
        validation.sample(prompt(bad), SEEING, limits)


def test_a_bomb_is_known_by_its_header() -> None:
    """Nothing of it is unpacked, here or anywhere."""
    bomb = PNG[:16] + (2**31 - 1).to_bytes(4) * 2 + PNG[24:]
    with pytest.raises(InvalidRequest, match="2147483647 x 2147483647 pixels"):
        validation.sample(prompt(image(data=bomb)), SEEING, LIMITS)


def test_many_images_and_long_rows_are_refused() -> None:
    few = LIMITS.model_copy(update={"max_images": 2})
    with pytest.raises(InvalidRequest, match="3 images; send at most 2"):
        validation.sample(prompt(*[image()] * 3), SEEING, few)
    small = LIMITS.model_copy(update={"max_request_pixels": 2 * 600})
    validation.sample(prompt(*[image()] * 2), SEEING, small)
    with pytest.raises(InvalidRequest, match="1800 pixels together; send at most 1200"):
        validation.sample(prompt(*[image()] * 3), SEEING, small)
    with pytest.raises(InvalidRequest, match=r"68 positions, 5 for each image.*holds 64"):
        validation.sample(prompt(*[image()] * 13), SEEING, LIMITS)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (640, 3), (17, 500)])
def test_sizes_are_those_that_decoders_see(size: tuple[int, int], progressive: bool) -> None:
    exif = PilImage.Exif()
    exif[0x010E] = "a description"
    for format_ in ("png", "jpeg"):
        file = io.BytesIO()
        made = PilImage.new("RGB", size)
        made.save(file, format_.upper(), exif=exif, progressive=progressive)
        assert size_of(image(data=file.getvalue(), format_=format_)) == size
    assert images.placed_in_prompt(prompt(image(data=PNG + bytes(5000))), SEEING, LIMITS).images
    filled = JPEG[:2] + b"\xff" * 7 + JPEG[2:]
    assert size_of(image(data=filled, format_="jpeg")) == (30, 20)
