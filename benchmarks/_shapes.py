"""Random models of the shapes of the Qwen3 family, made where they are used and saved nowhere."""

from typing import Any

import torch
import transformers

from twinkle_dask.types import ModelFacts

# Partly typed, used through Any.
_hf: Any = transformers

# Hidden size, layers, heads, key and value heads, size of a head, feed-forward, vocabulary, tied.
_SHAPES = {
    "tiny": (128, 4, 4, 2, 32, 384, 4096, True),
    "0.6B": (1024, 28, 16, 8, 128, 3072, 151936, True),
    "1.7B": (2048, 28, 16, 8, 128, 6144, 151936, True),
    "4B": (2560, 36, 32, 8, 128, 9728, 151936, True),
    "8B": (4096, 36, 32, 8, 128, 12288, 151936, False),
}
SHAPES = tuple(_SHAPES)


def random_model(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A ``transformers`` causal language model; the same weights each time on one device."""
    hidden, layers, heads, kv_heads, head, feed_forward, vocab, tied = _SHAPES[shape]
    config = _hf.Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        intermediate_size=feed_forward,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    with torch.device(device):
        model = _hf.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


def facts_of(model: Any) -> ModelFacts:
    """What loading would say of such a model."""
    return ModelFacts(
        architecture=type(model).__name__,
        vocab_size=model.config.vocab_size,
        context_length=model.config.max_position_embeddings,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        eos_token_ids=(),
        max_rank=256,
        has_tokenizer=False,
    )
