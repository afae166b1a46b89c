"""Images among tokens: what of them is checked before anything is decoded, and room for them.

A face hands images over between the tokens of a row. Only the model's facts say how many positions
they take; those are filled with its placeholder here, so that from here on a row is as long as
what the model reads, and everything that counts tokens counts right.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from twinkle_dask.config import LimitConfig
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.image_files import size_of
from twinkle_dask.operations.values import ServedModel
from twinkle_dask.types import (
    ForwardBackward,
    Image,
    ImageFacts,
    Int32Array,
    SampleRequest,
)


def placed_in_batch(
    request: ForwardBackward, model: ServedModel, limits: LimitConfig
) -> ForwardBackward:
    """The batch with room for its images; the same one if it has none.

    Raises:
        InvalidRequest: The model reads text alone, or an image is not to be used.
    """
    if not any(datum.images for datum in request.data):
        return request
    _not_too_many(sum(len(datum.images) for datum in request.data), limits)
    data = list(request.data)
    pixels = 0
    for index, datum in enumerate(data):
        if datum.images:
            tokens, images, own_pixels = _placed(
                datum.tokens, datum.images, model, limits, f"Datum {index}"
            )
            pixels += own_pixels
            data[index] = replace(datum, tokens=tokens, images=images)
    _not_too_large(pixels, limits)
    return replace(request, data=tuple(data))


def placed_in_prompt(
    request: SampleRequest, model: ServedModel, limits: LimitConfig
) -> SampleRequest:
    """The same for a prompt.

    Raises:
        InvalidRequest: As above.
    """
    if not request.images:
        return request
    _not_too_many(len(request.images), limits)
    prompt, images, pixels = _placed(request.prompt, request.images, model, limits, "The prompt")
    _not_too_large(pixels, limits)
    return replace(request, prompt=prompt, images=images)


def _not_too_many(count: int, limits: LimitConfig) -> None:
    if count > limits.max_images:
        raise InvalidRequest(
            f"The request has {count} images; send at most {limits.max_images} at a time."
        )


def _not_too_large(pixels: int, limits: LimitConfig) -> None:
    """Decoding is done between passes, where all tenants wait for it."""
    if pixels > limits.max_request_pixels:
        raise InvalidRequest(
            f"The request's images have {pixels} pixels together; send at most "
            f"{limits.max_request_pixels} at a time, for example by scaling them down."
        )


def _placed(
    tokens: Int32Array,
    images: Sequence[Image],
    model: ServedModel,
    limits: LimitConfig,
    where: str,
) -> tuple[Int32Array, tuple[Image, ...], int]:
    """The tokens with room for the images, the images in their places, and how many pixels."""
    facts = model.facts.images
    if facts is None:
        raise InvalidRequest(
            f"{where} has an image, but {model.name!r} reads text alone; send tokens, or use a "
            "model that sees."
        )
    length = len(tokens) + len(images) * facts.num_positions
    if length > model.facts.context_length:
        raise InvalidRequest(
            f"{where} has {length} positions, {facts.num_positions} for each image, but the "
            f"context of {model.name!r} holds {model.facts.context_length}."
        )
    parts: list[Int32Array] = []
    placed: list[Image] = []
    before = pixels = 0
    filled = np.full(facts.num_positions, facts.placeholder, np.int32)
    for number, image in enumerate(images):
        try:
            pixels += _checked_pixels(image, facts, limits)
        except InvalidRequest as error:
            raise InvalidRequest(f"{where}: image {number} {error.message}.") from None
        parts += [tokens[before : image.position], filled]
        position = image.position + number * facts.num_positions
        placed.append(replace(image, position=position, num_positions=facts.num_positions))
        before = image.position
    return np.concatenate([*parts, tokens[before:]], dtype=np.int32), tuple(placed), pixels


def _checked_pixels(image: Image, facts: ImageFacts, limits: LimitConfig) -> int:
    """How many pixels there are, once everything is checked that can be without decoding."""
    if len(image.data) > limits.max_image_bytes:
        raise InvalidRequest(
            f"has {len(image.data)} bytes; send at most {limits.max_image_bytes}, for example by "
            "scaling it down"
        )
    width, height = size_of(image)
    if width * height > limits.max_image_pixels:
        raise InvalidRequest(
            f"has {width} x {height} pixels; send at most {limits.max_image_pixels} in all"
        )
    if image.expected_positions not in {None, facts.num_positions}:
        raise InvalidRequest(
            f"takes {facts.num_positions} tokens with this model, whatever its size; "
            f"expected_tokens says {image.expected_positions}"
        )
    return width * height
