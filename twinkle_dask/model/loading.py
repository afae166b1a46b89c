"""From a model's source to a ``BaseModel``: files, dtype and device, tokenizer, facts."""

import logging
import time
from dataclasses import replace
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from twinkle_dask.errors import StartupError
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.source import ModelSource, check_source
from twinkle_dask.model.tokenizer import file_arguments, first_line, load_tokenizer, to_local
from twinkle_dask.model.vision import FAMILIES, Vision
from twinkle_dask.types import ModelFacts

log = logging.getLogger(__name__)

# These libraries' methods are untyped or partly so; they are used through Any on purpose.
_config_class: Any = transformers.AutoConfig
_model_class: Any = transformers.AutoModelForCausalLM
_seeing_class: Any = transformers.AutoModelForImageTextToText
_image_processor_class: Any = transformers.AutoImageProcessor

_MIN_HIDDEN_FOR_BFLOAT16 = 512

# Settings by which some architectures change the logits after the head, with their neutral values.
_LOGIT_MATHS = {
    "final_logit_softcapping": (None, 0, 0.0),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "lm_head_multiplier": (None, 1, 1.0),
}


def load_base(source: str, dtype: str, max_rank: int) -> BaseModel:
    """Load a causal language model, frozen and ready to wear adapters; it may see as well.

    Args:
        source: A Hugging Face folder, a GGUF file or a folder with one, or a hub id.
        dtype: ``float32``, ``bfloat16``, or ``auto``: bfloat16 where the hardware is fast at it.
        max_rank: Largest LoRA rank this host accepts; passed on in the facts.

    Raises:
        StartupError: The source cannot be had, is damaged, or is no model that is supported.
    """
    # Progress bars would break up the log on standard error.
    transformers.utils.logging.disable_progress_bar()
    started_s = time.monotonic()
    place = to_local(check_source(source))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _load_model(place, dtype, device).to(device)
    tokenizer = load_tokenizer(place)
    vision = _load_vision(model, place)
    facts = _facts(model, place, tokenizer, max_rank)
    if vision is not None:
        facts = replace(facts, images=vision.facts)
    base = BaseModel(model, facts, tokenizer, vision)
    if base.why_padded is not None:
        log.warning(
            "Rows of %s are padded to the longest, which is slower than packing them: %s",
            place.location,
            base.why_padded,
        )
    log.info("Loaded %s in %.1f s", place.location, time.monotonic() - started_s)
    return base


def choose_dtype(dtype: str, device: torch.device, hidden_size: int) -> torch.dtype:
    """The torch dtype for a setting of ``auto``, ``float32`` or ``bfloat16`` on this machine.

    Args:
        dtype: One of the three.
        device: Where the model will lie.
        hidden_size: Of the model; a processor gains from bfloat16 only where products are large.

    Raises:
        StartupError: The setting is none of the three.
    """
    match dtype:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "auto":
            fast = _bfloat16_is_fast(device, hidden_size)
            return torch.bfloat16 if fast else torch.float32
        case _:
            raise StartupError(f"Unknown dtype {dtype!r}; known are auto, float32 and bfloat16.")


def _bfloat16_is_fast(device: torch.device, hidden_size: int) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # With AMX tiles one core does about 1000 GFLOP/s in bfloat16 against 155 in float32; without
    # such instructions bfloat16 is emulated and slower than float32. Casting costs as well: a
    # training step of a model with hidden size 128 takes 1.4 times as long in bfloat16.
    can = torch.cpu.get_capabilities()
    return hidden_size >= _MIN_HIDDEN_FOR_BFLOAT16 and bool(
        can.get("amx_bf16") or can.get("avx512_bf16")
    )


def _load_model(place: ModelSource, dtype: str, device: torch.device) -> nn.Module:
    try:
        config = _config_class.from_pretrained(place.location, **file_arguments(place))
        _refuse_unsupported(config, place)
        model_class = _seeing_class if config.model_type in FAMILIES else _model_class
        model, report = model_class.from_pretrained(
            place.location,
            config=config,
            dtype=choose_dtype(dtype, device, config.get_text_config().hidden_size),
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,  # to be told of by name, below
            output_loading_info=True,
            **_weights(place),
        )
    except StartupError:
        raise
    # A file that is not what it claims to be fails in transformers, safetensors, gguf or numpy, in
    # as many ways as there are bytes to damage; the operator needs the place, the log the trace.
    except Exception as error:
        damaged = "its weights are damaged: " if isinstance(error, SafetensorError) else ""
        raise StartupError(
            f"Model {place.location} cannot be loaded: {damaged}{first_line(error)}"
        ) from error
    _refuse_incomplete(report, place)
    return model


def _weights(place: ModelSource) -> dict[str, Any]:
    if place.gguf_file is None:
        return {**file_arguments(place), "use_safetensors": True}
    # Packed weights have no plain linears to adapt, and their kernels no gradient.
    plain = transformers.GgufConfig(dequantize=True)
    return {**file_arguments(place), "quantization_config": plain}


def _load_vision(model: nn.Module, place: ModelSource) -> Vision | None:
    if cast("Any", model).config.model_type not in FAMILIES:
        return None
    try:
        # "pil" computes without torchvision, and the same numbers on every machine.
        processor = _image_processor_class.from_pretrained(
            place.location, backend="pil", **file_arguments(place)
        )
    except Exception as error:  # as many kinds as there are image processors
        raise StartupError(
            f"The image processor of model {place.location} cannot be loaded: {first_line(error)}"
        ) from error
    return Vision(model, processor)


def _refuse_unsupported(config: Any, place: ModelSource) -> None:
    causal = cast("dict[str, str]", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    seeing = cast("dict[str, str]", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    named: list[str] = config.architectures or []
    # transformers takes the text part out of some models that see as well, such as Qwen3.5.
    text_part = config.get_text_config() is not config and not config.is_encoder_decoder
    known = config.model_type in causal or config.model_type in FAMILIES
    if not known and config.model_type in seeing:
        raise StartupError(
            f"Model {place.location} sees in a way that is not supported ({config.model_type}). "
            f"Models that see and are supported are {', '.join(sorted(FAMILIES))}."
        )
    if not known or (named and not text_part and not set(named) & set(causal.values())):
        raise StartupError(
            f"Model {place.location} is no causal language model but "
            f"{named[0] if named else config.model_type}."
        )
    for name, neutral in _LOGIT_MATHS.items():
        value = getattr(config.get_text_config(), name, None)
        if value not in neutral:
            raise StartupError(
                f"Model {place.location} is not supported yet: it changes its logits by "
                f"{name}={value}."
            )


def _refuse_incomplete(report: Any, place: ModelSource) -> None:
    # transformers would go on with random values in their place.
    wrong: list[tuple[str, list[str]]] = [
        ("lacks {} weights that its configuration asks for", sorted(report["missing_keys"])),
        (
            "has {} weights of another shape than its configuration asks for",
            sorted(key for key, *_ in report["mismatched_keys"]),
        ),
    ]
    for what, names in wrong:
        if names:
            raise StartupError(
                f"Model {place.location} {what.format(len(names))}, for example {names[0]}."
            )


def _facts(model: Any, place: ModelSource, tokenizer: Any | None, max_rank: int) -> ModelFacts:
    config = model.config.get_text_config()
    context_length = getattr(config, "max_position_embeddings", None)
    if not isinstance(context_length, int):
        raise StartupError(f"Model {place.location} states no max_position_embeddings.")
    switches = _length_with_other_rotations(config, place)
    if switches is not None and switches < context_length:
        log.warning(
            "Rows of %s may have %d tokens, not %d: with longer ones it rotates otherwise, for "
            "whoever shares the pass as well",
            place.location,
            switches,
            context_length,
        )
        context_length = switches
    ends: set[int] = set()
    for holder in (model.generation_config, config, tokenizer):
        found: int | list[int] | None = getattr(holder, "eos_token_id", None)
        if found is not None:
            ends.update([found] if isinstance(found, int) else found)
    return ModelFacts(
        architecture=type(model).__name__,
        # The embedding may be padded beyond the head or the other way round; ids must fit both.
        vocab_size=min(
            model.get_input_embeddings().weight.shape[0],
            model.get_output_embeddings().weight.shape[0],
        ),
        context_length=context_length,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        eos_token_ids=tuple(sorted(ends)),
        max_rank=max_rank,
        has_tokenizer=tokenizer is not None,
    )


def _length_with_other_rotations(config: Any, place: ModelSource) -> int | None:
    """Longest row with which the rotations are still those of shorter ones; None if all have it.

    Transformers chooses "longrope"'s table in each pass, by the longest row that is in it: one
    tenant's row would change another's numbers. "dynamic" grows its table too, but only beyond
    ``max_position_embeddings``, which no row may be longer than; the length that it was trained
    with plays no part in it.
    """
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_kind_of_layer = cast(
        "list[dict[str, Any]]", [value for value in parameters.values() if isinstance(value, dict)]
    )
    lengths: list[int] = []
    for rope in (parameters, *by_kind_of_layer):
        if rope.get("rope_type", rope.get("type")) != "longrope":
            continue
        length = rope.get("original_max_position_embeddings")
        if not isinstance(length, int) or length < 1:
            raise StartupError(
                f"Model {place.location} is not supported: its rotations (longrope) change with "
                "the length of rows, and it states no original_max_position_embeddings."
            )
        lengths.append(length)
    return min(lengths, default=None)
