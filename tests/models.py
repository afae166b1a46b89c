"""Small random models with real tokenizers, written as Hugging Face folders in a second or two."""

import io
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
import tokenizers
import torch
import transformers
from PIL import Image as PilImage
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = (
    "The quick brown fox jumps over the lazy dog while the sun is shining on the river.",
    "Who are you? I am a small model, made for tests; my weights are random numbers.",
    "system user assistant hello world question answer",
)

_GGUF_NAMES = (
    ("model.layers.", "blk."),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
)

# Partly typed libraries, used through Any.
_gguf: Any = gguf
_hf: Any = transformers
_st: Any = safetensors.numpy
_torch: Any = torch


def tiny_qwen3(
    folder: Path,
    *,
    vocab_size: int = 4096,
    hidden: int = 128,
    layers: int = 4,
    tokenizer: bool = True,
    seed: int = 0,
    **config: object,
) -> Path:
    """A random Qwen3 of about 1.3 M parameters (tied head, 2048 tokens of context)."""
    settings = _settings(vocab_size, hidden, layers) | {"head_dim": hidden // 4}
    settings |= {"tie_word_embeddings": True}
    return _write(folder, _hf.Qwen3Config(**settings | config), tokenizer=tokenizer, seed=seed)


def tiny_llama(folder: Path, *, tokenizer: bool = False, seed: int = 0, **config: object) -> Path:
    """A random Llama with an untied head."""
    settings = _settings(512, 64, 2) | {"tie_word_embeddings": False}
    return _write(folder, _hf.LlamaConfig(**settings | config), tokenizer=tokenizer, seed=seed)


def tiny_mistral(folder: Path, *, tokenizer: bool = False, seed: int = 0, **config: object) -> Path:
    """A random Mistral with a sliding window of 16 tokens."""
    settings = _settings(512, 64, 2) | {"sliding_window": 16}
    return _write(folder, _hf.MistralConfig(**settings | config), tokenizer=tokenizer, seed=seed)


def tiny_gemma3(folder: Path, *, tokenizer: bool = False, seed: int = 0, **config: object) -> Path:
    """A random Gemma 3 text model: tied head, scaled embeddings, local and global layers."""
    settings = _settings(512, 64, 2) | {
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
    }
    return _write(folder, _hf.Gemma3TextConfig(**settings | config), tokenizer=tokenizer, seed=seed)


def tiny_family(folder: Path, family: str, *, seed: int = 0, **config: object) -> Path:
    """A random model of one of ``FAMILIES``: vocabulary 512, hidden 64, windows of 16 tokens."""
    name, settings = FAMILIES[family]
    return _write(folder, getattr(_hf, name)(**settings | config), tokenizer=False, seed=seed)


def tiny_seeing(
    folder: Path, family: str = "llava", *, tokenizer: bool = False, seed: int = 0, **text: object
) -> Path:
    """A random model of one of ``SEEING_FAMILIES``, around a Llama; it takes 32 by 32 pixels.

    Any image takes 16 positions (llava) or 4 (the others). Token 3 is its placeholder.
    """
    name, vision, settings, processor_name, processing = SEEING_FAMILIES[family]
    decoder: Any = _SMALL | {"model_type": "llama", "tie_word_embeddings": False} | text
    eyes = _EYES | {"model_type": vision} if vision else _EYES
    config = getattr(_hf, name)(
        text_config=decoder, vision_config=eyes, image_token_id=3, **settings
    )
    _write(
        folder,
        config,
        tokenizer=tokenizer,
        seed=seed,
        auto_class=_hf.AutoModelForImageTextToText,
        vocab_size=decoder["vocab_size"],
    )
    getattr(_hf, processor_name)(**processing).save_pretrained(folder)
    return folder


def encoded_image(seed: int, size: tuple[int, int] = (32, 32), format_: str = "PNG") -> bytes:
    """A random image as a file; ``size`` is width and height."""
    rng = np.random.default_rng(seed)
    # Large areas of one colour, which JPEG leaves as they are.
    colours = rng.integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    image = PilImage.fromarray(colours).resize(size, PilImage.Resampling.NEAREST)
    image.save(file, format_)
    return file.getvalue()


def llama_as_gguf(folder: Path, file: Path) -> None:
    """Write a ``tiny_llama`` with a tokenizer as a float32 GGUF file, as llama.cpp would."""
    config = json.loads((folder / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    writer = _gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=lambda token: vocabulary["vocab"][token])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    for name, weight in _st.load_file(folder / "model.safetensors").items():
        for ours, theirs in _GGUF_NAMES:
            name = name.replace(ours, theirs)
        if (part := name.removesuffix(".weight")[-1]) in heads and ".attn_" in name:
            # llama.cpp rotates neighbouring pairs where Transformers rotates halves.
            halves = weight.reshape(heads[part], 2, -1, weight.shape[1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(name, np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _settings(vocab_size: int, hidden: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 3 * hidden,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
        "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
    }


_SMALL = _settings(512, 64, 2)
_WITHOUT_KV = {name: value for name, value in _SMALL.items() if name != "num_key_value_heads"}
_GPT2_SIZES = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 2048}
_DELTA_NET = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ALTERNATING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

# Each with what makes it differ from the others: windows, biases, fused or shared projections,
# experts, tied and untied heads.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", _SMALL | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_5": ("Qwen3_5TextConfig", _SMALL | _DELTA_NET | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _SMALL),
    "llama": ("LlamaConfig", _SMALL | {"tie_word_embeddings": False}),
    "smollm2": ("LlamaConfig", _SMALL | {"tie_word_embeddings": True, "rope_theta": 1e5}),
    "smollm3": ("SmolLM3Config", _SMALL | {"no_rope_layers": [1, 0]}),
    "mistral": ("MistralConfig", _SMALL | {"sliding_window": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        _SMALL | _ALTERNATING | {"head_dim": 16, "query_pre_attn_scalar": 16},
    ),
    "phi3": ("Phi3Config", _SMALL | {"sliding_window": 16}),
    "olmo3": ("Olmo3Config", _SMALL | _ALTERNATING),
    "glm4": ("Glm4Config", _SMALL | {"head_dim": 16}),
    "starcoder2": ("Starcoder2Config", _SMALL | {"sliding_window": 16}),
    "gpt_neox": ("GPTNeoXConfig", _WITHOUT_KV | {"tie_word_embeddings": False}),
    "gpt2": ("GPT2Config", _GPT2_SIZES | {"bos_token_id": 2, "eos_token_id": 2}),
    "stablelm": ("StableLmConfig", _SMALL),
    "qwen3_moe": ("Qwen3MoeConfig", _SMALL | _EXPERTS | {"head_dim": 16}),
    "mixtral": ("MixtralConfig", _SMALL | {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", _SMALL | _EXPERTS | {"shared_expert_intermediate_size": 48}),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        _SMALL | _DELTA_NET | _EXPERTS | {"shared_expert_intermediate_size": 48},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        _SMALL
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 24,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
        },
    ),
}


_EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_SPLITTING = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
_SQUARE = {"height": 32, "width": 32}
# Class of the configuration, type of its vision part and what else it says; class of the image
# processor and its settings.
SEEING_FAMILIES: dict[str, tuple[str, str | None, dict[str, Any], str, dict[str, Any]]] = {
    "llava": (
        "LlavaConfig",
        "clip_vision_model",
        {"image_seq_length": 16},
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 32}, "crop_size": _SQUARE},
    ),
    "internvl": (
        "InternVLConfig",
        "internvl_vision",
        {"image_seq_length": 4},
        "GotOcr2ImageProcessorPil",
        {"size": _SQUARE, "crop_to_patches": True},
    ),
    "idefics3": (
        "Idefics3Config",
        None,
        {"scale_factor": 2},
        "Idefics3ImageProcessorPil",
        _SPLITTING,
    ),
    "smolvlm": ("SmolVLMConfig", None, {"scale_factor": 2}, "SmolVLMImageProcessorPil", _SPLITTING),
}


def _write(
    folder: Path,
    config: Any,
    *,
    tokenizer: bool,
    seed: int,
    auto_class: Any = _hf.AutoModelForCausalLM,
    vocab_size: int | None = None,
) -> Path:
    with _torch.random.fork_rng():
        _torch.manual_seed(seed)
        model = auto_class.from_config(config)
    model.generation_config = _hf.GenerationConfig(
        eos_token_id=[SPECIAL_TOKENS.index(name) for name in ("<|im_end|>", "<|endoftext|>")],
        pad_token_id=SPECIAL_TOKENS.index("<|endoftext|>"),
    )
    model.save_pretrained(folder)
    if tokenizer:
        _tokenizer(vocab_size or config.vocab_size).save_pretrained(folder)
    return folder


def _tokenizer(vocab_size: int) -> Any:
    """A byte-level BPE: any text round-trips; ids stay below ``vocab_size``."""
    byte_level: Any = tokenizers.Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer
    byte_level.train_from_iterator(
        _TEXT,
        trainer(
            vocab_size=min(vocab_size, 512),
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _hf.PreTrainedTokenizerFast(
        tokenizer_object=byte_level,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=_CHAT_TEMPLATE,
    )
