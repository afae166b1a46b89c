"""Models that see: what they compute with images, against transformers and PEFT."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image as PilImage
from torch import Tensor

from tests.model.test_families import random_state
from tests.models import SEEING_FAMILIES, encoded_image, tiny_seeing
from twinkle_dask.checkpoints import folders
from twinkle_dask.errors import InvalidRequest, StartupError
from twinkle_dask.model.attention import Rows
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.loading import load_base
from twinkle_dask.model.lora import BatchPlan, LoraTensors, Segment
from twinkle_dask.model.vision import Patch
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.types import Image, LoraSpec, RunState

hf: Any = transformers
peft_model: Any = peft.PeftModel
SPEC = LoraSpec(rank=3, seed=1, alpha=7.5)


@pytest.fixture(scope="module", params=SEEING_FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, BaseModel]:
    folder = tiny_seeing(tmp_path_factory.mktemp(request.param), request.param)
    return folder, load_base(str(folder), "float32", max_rank=8)


def image_of(base: BaseModel, data: bytes, position: int = 2, format_: str = "png") -> Image:
    facts = base.facts.images
    assert facts is not None
    return Image(position=position, format=format_, data=data, num_positions=facts.num_positions)


def row_with(base: BaseModel, *images: Image) -> Tensor:
    """Tokens 5, 6, ... with placeholders for the images."""
    facts = base.facts.images
    assert facts is not None
    row = torch.arange(5, 60)
    for image in images:
        row[image.position : image.position + image.num_positions] = facts.placeholder
    return row


def pixels(folder: Path, *files: bytes) -> dict[str, Tensor]:
    """As transformers' own users make them."""
    processor = hf.AutoImageProcessor.from_pretrained(folder, backend="pil")
    splitting = {
        name: False
        for name in ("do_image_splitting", "crop_to_patches")
        if hasattr(processor, name)
    }
    opened = [PilImage.open(io.BytesIO(file)).convert("RGB") for file in files]
    return dict(processor(images=opened, return_tensors="pt", **splitting))


# Which of its warnings come with which model says nothing about the adapter.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_peft_computes_the_same_logits(family: tuple[Path, BaseModel], tmp_path: Path) -> None:
    """On the whole model, with our checkpoint, which puts nothing on the vision tower."""
    folder, base = family
    state = random_state(base, SPEC)
    saved = RunState(adapter=state)
    folders.write_state(BlobStore(tmp_path), "saved", saved, base_model=str(folder))
    adapter = LoraTensors.from_state(state, device=base.device, dtype=base.dtype)

    files = encoded_image(1), encoded_image(2, size=(50, 90), format_="JPEG")
    first = image_of(base, files[0])
    second = image_of(base, files[1], position=30, format_="jpeg")
    row = row_with(base, first, second)
    looks = base.look([[first, second]])
    patches = [Patch(image.position, looks[image.data]) for image in (first, second)]
    plan = BatchPlan((Segment(slice(0, 1), adapter),))
    with torch.no_grad():
        ours = base.head.logits(base.hidden(row[None], plan, patches=patches), plan)
        plain = hf.AutoModelForImageTextToText.from_pretrained(folder).eval()
        inputs = {"input_ids": row[None], **pixels(folder, *files)}
        unadapted = plain(**inputs).logits
        wearing = peft_model.from_pretrained(plain, str(tmp_path / "saved")).eval()
        theirs = wearing(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - unadapted).abs().max() > 0.01
    names = [name for name, _ in wearing.named_parameters() if ".lora_" in name]
    worn = {name.rsplit(".lora_", 1)[0] for name in names}
    assert worn == {f"base_model.model.{name.rsplit('.lora_', 1)[0]}" for name in state.weights}


def test_rows_with_and_without_images_are_packed(family: tuple[Path, BaseModel]) -> None:
    _, base = family
    assert base.why_padded is None
    image = image_of(base, encoded_image(1))
    seeing, text = row_with(base, image), torch.arange(7, 20)
    looks = base.look([[image]])
    tokens = torch.cat([text, seeing, text])
    rows = Rows.of([len(text), len(seeing), len(text)], base.device)
    patch = Patch(len(text) + image.position, looks[image.data])
    with torch.no_grad():
        packed = base.hidden_packed(tokens, rows, BatchPlan(), [patch])
        alone = base.hidden(
            seeing[None], BatchPlan(), patches=[Patch(image.position, looks[image.data])]
        )[0]
        blind = base.hidden(seeing[None], BatchPlan())[0]
    before, middle, after = packed[:13], packed[13:-13], packed[-13:]
    torch.testing.assert_close(middle, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)
    # What comes before the image does not see it, what comes after does.
    assert torch.equal(alone[:2], blind[:2])
    assert (alone[-1] - blind[-1]).abs().max() > 1e-3


def test_an_image_looks_the_same_whoever_looks(family: tuple[Path, BaseModel]) -> None:
    _, base = family
    one, other = image_of(base, encoded_image(1)), image_of(base, encoded_image(2))
    assert base.vision is not None
    first = base.look([[one]])[one.data].clone()
    both = base.look([[other], [one, other]])
    assert torch.equal(both[one.data], first)
    with torch.inference_mode():
        again = base.vision.look(PilImage.open(io.BytesIO(one.data)))
    assert torch.equal(again, first)
    assert not again.is_inference()
    assert not torch.equal(both[other.data], first)


def test_what_is_kept_for_one_tenant_is_not_used_for_another(
    family: tuple[Path, BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the time of an answer would tell who else has an image."""
    _, base = family
    assert base.vision is not None
    image, looked = image_of(base, encoded_image(7)), 0
    look = base.vision.look

    def counted(decoded: PilImage.Image) -> torch.Tensor:
        nonlocal looked
        looked += 1
        return look(decoded)

    monkeypatch.setattr(base.vision, "look", counted)
    mine = [base.look([[image]], "me")[image.data] for _ in range(2)]
    assert looked == 1
    theirs = base.look([[image]], "them")[image.data]
    assert looked == 2
    assert torch.equal(mine[0], theirs)


def test_a_damaged_image_is_the_senders_fault(family: tuple[Path, BaseModel]) -> None:
    _, base = family
    whole = encoded_image(1, size=(200, 200))
    for data in (whole[: len(whole) // 2], whole[:40], b"no image"):
        with pytest.raises(InvalidRequest, match="cannot be decoded"):
            base.look([[image_of(base, data)]])


def test_an_image_that_needs_other_room_is_refused(family: tuple[Path, BaseModel]) -> None:
    _, base = family
    image = Image(position=0, format="png", data=encoded_image(1), num_positions=3)
    with pytest.raises(InvalidRequest, match="positions here, not 3"):
        base.look([[image]])


def test_orientation_and_transparency_are_read(family: tuple[Path, BaseModel]) -> None:
    _, base = family
    rng = np.random.default_rng(0)
    upright = PilImage.fromarray(rng.integers(0, 256, (60, 40, 4), np.uint8))
    exif = PilImage.Exif()
    exif[0x0112] = 6  # the camera was turned
    plain, turned = io.BytesIO(), io.BytesIO()
    upright.save(plain, "PNG")
    upright.transpose(PilImage.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    looks = base.look([[image_of(base, file.getvalue()) for file in (plain, turned)]])
    assert torch.equal(looks[plain.getvalue()], looks[turned.getvalue()])


def test_it_loads_in_bfloat16(family: tuple[Path, BaseModel]) -> None:
    folder, exact = family
    base = load_base(str(folder), "bfloat16", max_rank=8)
    image = image_of(base, encoded_image(1))
    rough, fine = (each.look([[image]])[image.data] for each in (base, exact))
    assert rough.dtype == torch.bfloat16
    assert (rough - fine).abs().max() <= 0.03 * fine.abs().max()


def test_a_text_model_looks_at_nothing(qwen: BaseModel) -> None:
    assert qwen.facts.images is None
    assert qwen.look([(), ()]) == {}
    image = Image(position=0, format="png", data=encoded_image(1), num_positions=4)
    with pytest.raises(InvalidRequest, match="text alone"):
        qwen.look([(), (image,)])


def test_models_that_see_otherwise_are_refused(tmp_path: Path) -> None:
    config = hf.Qwen2VLConfig(vision_config={"depth": 1}, text_config={"num_hidden_layers": 1})
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(StartupError, match="sees in a way that is not supported \\(qwen2_vl\\)"):
        load_base(str(tmp_path), "float32", max_rank=8)


def test_a_model_without_an_image_processor_is_refused(tmp_path: Path) -> None:
    folder = tiny_seeing(tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(StartupError, match=r"image processor of model .* cannot be loaded"):
        load_base(str(folder), "float32", max_rank=8)


def test_images_that_take_as_many_positions_as_they_are_large_are_refused(tmp_path: Path) -> None:
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "patch_size": 8}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64}
    config = hf.LlavaConfig(
        text_config={"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1},
        vision_config=vision,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    hf.AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    size = {"longest_edge": 64}
    hf.PixtralImageProcessorPil(patch_size=8, size=size).save_pretrained(tmp_path)
    with pytest.raises(StartupError, match=r"different numbers of positions \(24, 48\)"):
        load_base(str(tmp_path), "float32", max_rank=8)


def test_an_image_processor_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = tiny_seeing(tmp_path)
    hf.CLIPImageProcessorPil(do_resize=False, do_center_crop=False).save_pretrained(folder)
    with pytest.raises(StartupError, match="cannot look at an image"):
        load_base(str(folder), "float32", max_rank=8)
