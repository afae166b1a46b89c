"""What makes an image into hidden states that a decoder takes in the place of tokens.

An image is decoded, put through the model's own image processor, its vision tower and its
projector, all of them frozen: so what comes out depends on the image alone. It is computed for
one image at a time, whoever else has some, and kept for a while, since samples of one prompt,
chunks of a prefill and epochs ask for the same again.

Shapes: P positions of one image, D hidden size of the decoder.
"""

import hashlib
import io
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np
import torch
from PIL import Image as PilImage
from PIL import ImageOps
from torch import Tensor, nn

from twinkle_dask.errors import InvalidRequest, StartupError
from twinkle_dask.types import Image, ImageFacts, Json

_KEPT_BYTES = 256 * 2**20
_FORMATS = ("PNG", "JPEG")
# The gateway has its own, lower bound (``limits.max_image_pixels``), and goes by the first size
# that a file tells; one that tells another size to its decoder ends here.
_MOST_PIXELS = 2**26


@dataclass(frozen=True, slots=True)
class Family:
    """How a family of models that see is told to take each image as one grid of patches.

    Attributes:
        settings: For the image processor.
    """

    settings: Json = field(default_factory=dict[str, Any])


# By model_type. Their positions are those of text, their attention over images is causal as over
# tokens, and every image takes the same number of positions.
FAMILIES: Final = {
    "llava": Family(),
    "internvl": Family({"crop_to_patches": False}),
    "idefics3": Family({"do_image_splitting": False}),
    "smolvlm": Family({"do_image_splitting": False}),
}


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """Hidden states that take the place of some tokens' embeddings.

    Attributes:
        place: Of the first of them, in the flattened tokens of a pass.
        embedded_PD: As ``Vision.features`` gives them, or a stretch of it.
    """

    place: int
    embedded_PD: Tensor


class Vision:
    """The frozen part of a model that sees. Used by one thread.

    Attributes:
        decoder: The model's text part, without its head.
        decoder_path: Where it is in the whole model, with a trailing dot.
        facts: What the gateway must know.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        """Try the vision part on images of two sizes.

        Args:
            model: A ``transformers`` model of one of ``FAMILIES``, on its device.
            processor: Its image processor.

        Raises:
            StartupError: Images do not all take one number of positions, or none.
        """
        self._model: Any = model
        self._processor = processor
        self._family = FAMILIES[self._model.config.model_type]
        self.decoder: Any = self._model.get_decoder()
        modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
        self.decoder_path = next(f"{name}." for name, part in modules if part is self.decoder)
        self._kept: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()
        self._kept_bytes = 0
        try:
            lengths = {len(self.look(example)) for example in self.examples()}
        # What a processor and a vision part of different kinds make of each other is open.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise StartupError(
                f"This model is not supported: it cannot look at an image ({reason})."
            ) from error
        if len(lengths) != 1:
            raise StartupError(
                "This model is not supported: images of different sizes take different numbers "
                f"of positions ({', '.join(map(str, sorted(lengths)))})."
            )
        placeholder: int = self._model.config.image_token_id
        vocab_size = min(
            len(self._model.get_input_embeddings().weight),
            len(self._model.get_output_embeddings().weight),
        )
        if not 0 <= placeholder < vocab_size:
            raise StartupError(
                f"This model is not supported: its image token {placeholder} is outside of its "
                f"vocabulary of {vocab_size}."
            )
        self.facts = ImageFacts(num_positions=lengths.pop(), placeholder=placeholder)

    @staticmethod
    def examples() -> list[PilImage.Image]:
        """Two images of different sizes and shapes."""
        rng = np.random.default_rng(0)
        shapes = ((96, 64, 3), (40, 120, 3))
        return [PilImage.fromarray(rng.integers(0, 256, shape, np.uint8)) for shape in shapes]

    def inputs(self, decoded: PilImage.Image) -> dict[str, Tensor]:
        """What the model takes for one image, as its image processor makes it."""
        made = self._processor(images=[decoded], return_tensors="pt", **self._family.settings)
        device = self._model.device
        names = ("pixel_values", "pixel_attention_mask")
        inputs: dict[str, Tensor] = {name: made[name].to(device) for name in names if name in made}
        # In the weights' dtype, which not every family casts to.
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        return inputs

    def features(self, image: Image, owner: str) -> Tensor:
        """Hidden states (P, D) of an image, without gradient.

        What is kept is kept for its owner: by the time it takes, nobody learns what others sent.

        Raises:
            InvalidRequest: The bytes cannot be decoded, or the image takes another number of
                positions than there is room for.
        """
        key = owner, hashlib.sha256(image.data).digest()
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            self._keep(key, self.look(_decoded(image.data)))
        found_PD = self._kept[key]
        if len(found_PD) != image.num_positions:
            raise InvalidRequest(
                f"An image takes {len(found_PD)} positions here, not {image.num_positions}."
            )
        return found_PD

    def of_rows(self, images: Iterable[Sequence[Image]], owner: str) -> dict[bytes, Tensor]:
        """The features of all images in some rows of one owner, by their encoded bytes.

        Raises:
            InvalidRequest: As ``features``.
        """
        return {image.data: self.features(image, owner) for row in images for image in row}

    def look(self, decoded: PilImage.Image) -> Tensor:
        """Hidden states (P, D) of a decoded image, without gradient."""
        # Not in inference mode, where the sampler may be: the trainer's backward meets it as well.
        with torch.inference_mode(False), torch.no_grad():
            found: Any = self._model.get_image_features(**self.inputs(decoded), return_dict=True)
            parts: list[Tensor] = list(found.pooler_output)
            return torch.cat(parts).to(self._model.get_input_embeddings().weight.dtype)

    def _keep(self, key: tuple[str, bytes], features_PD: Tensor) -> None:
        self._kept[key] = features_PD
        self._kept_bytes += features_PD.nbytes
        while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
            _, dropped_PD = self._kept.popitem(last=False)
            self._kept_bytes -= dropped_PD.nbytes


def _decoded(data: bytes) -> PilImage.Image:
    """An upright RGB image.

    Raises:
        InvalidRequest: The bytes are no PNG or JPEG, or damaged.
    """
    try:
        with PilImage.open(io.BytesIO(data), formats=_FORMATS) as file:
            if file.width * file.height > _MOST_PIXELS:
                raise InvalidRequest(f"An image has {file.width} x {file.height} pixels.")
            return ImageOps.exif_transpose(file).convert("RGB")
    except InvalidRequest:
        raise
    # Whatever is wrong with a file, decoders find it in their own ways.
    except Exception as error:
        raise InvalidRequest(
            "An image cannot be decoded: it is damaged, or not all of it is there."
        ) from error
