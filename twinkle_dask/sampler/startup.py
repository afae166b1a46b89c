"""What the engine must learn about a base model and a machine before it serves anything."""

import os
from typing import Any, cast

import torch
from transformers import DynamicCache

from twinkle_dask.errors import CannotSample
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.lora import BatchPlan
from twinkle_dask.sampler.kv_cache import KvLayout, SlotCache
from twinkle_dask.sampler.masks import DecodeMasks
from twinkle_dask.sampler.passes import chunk_hidden, decode_hidden

_GIB = 2**30


def default_kv_bytes(device: torch.device) -> int:
    """Memory for keys and values where none is configured.

    A third of what a GPU has free once the weights are loaded, since a trainer may want the rest;
    an eighth of a computer's memory, at most 8 GiB.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free // 3
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return _GIB
    return min(8 * _GIB, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)


def text_config(base: BaseModel) -> Any:
    """The Transformers configuration of the decoder."""
    # BaseModel shows no configuration; how layers attend is told nowhere else.
    return cast("Any", base)._model.config.get_text_config()


def kv_layout(base: BaseModel) -> KvLayout:
    """The shapes of a token's keys and values, found by running one.

    Raises:
        CannotSample: The model keeps something other than keys and values for each layer.
    """
    cache: Any = DynamicCache()
    token_BL = torch.zeros((1, 1), dtype=torch.int64, device=base.device)
    try:
        with torch.no_grad():
            base.hidden(token_BL, BatchPlan(), cache=cache)
        shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers]
    except Exception as error:
        raise CannotSample(
            "This model cannot be sampled with the torch engine: it keeps more than keys and "
            f"values between tokens ({type(error).__name__}: {error})."
        ) from error
    return KvLayout(
        keys=tuple((keys[1], keys[3]) for keys, _ in shapes),
        values=tuple((values[1], values[3]) for _, values in shapes),
        dtype=base.dtype,
        device=base.device,
    )


def check_decoding(base: BaseModel, layout: KvLayout, masks: DecodeMasks) -> None:
    """Compare prefill in two chunks and decoding of unequal rows with a plain pass.

    Takes milliseconds, and catches architectures that would give wrong tokens in silence.

    Raises:
        CannotSample: They differ.
    """
    vocab_size = base.facts.vocab_size
    tokens = [[(7 * i + row) % vocab_size for i in range(8)] for row in range(2)]
    plan, cache = BatchPlan(), SlotCache(layout, slots=2, capacity=16)
    with torch.no_grad():
        expected_BLD = base.hidden(torch.tensor(tokens, device=base.device), plan)
        for past in (0, 2):
            chunk_hidden(base, plan, cache, [row[past : past + 2] for row in tokens], past)
        # From here the first row is two tokens ahead of the second.
        for past in (4, 5):
            first = slice(0, 1)
            decode_hidden(
                base, plan, cache, masks, first, tokens=[tokens[0][past]], positions=[past]
            )
        got_B1D = decode_hidden(
            base,
            plan,
            cache,
            masks,
            slice(0, 2),
            tokens=[tokens[0][6], tokens[1][4]],
            positions=[6, 4],
        )
    expected_BD = torch.stack((expected_BLD[0, 6], expected_BLD[1, 4]))
    if not bool((got_B1D[:, 0] - expected_BD).abs().max() <= 0.02 * expected_BD.abs().max()):
        raise CannotSample(
            "This model cannot be sampled with the torch engine: token by token it computes "
            "something else than all at once."
        )
