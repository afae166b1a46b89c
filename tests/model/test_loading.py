"""Sources good and bad: facts, dtypes, tokenizers, and messages that an operator can act on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from tests.models import FAMILIES, llama_as_gguf, tiny_family, tiny_llama, tiny_qwen3
from twinkle_dask.errors import StartupError
from twinkle_dask.model.attention import Rows
from twinkle_dask.model.loading import choose_dtype, load_base
from twinkle_dask.model.lora import BatchPlan
from twinkle_dask.model.source import SourceKind, check_source

hf: Any = transformers
st: Any = safetensors.numpy


def load(source: Path | str) -> Any:
    return load_base(str(source), "float32", max_rank=8)


def test_facts_of_a_folder_with_a_tokenizer(tmp_path: Path) -> None:
    base = load(tiny_qwen3(tmp_path))
    assert base.facts.architecture == "Qwen3ForCausalLM"
    assert base.facts.vocab_size == 4096
    assert base.facts.context_length == 2048
    assert base.facts.num_parameters == sum(
        array.size for array in st.load_file(tmp_path / "model.safetensors").values()
    )
    assert base.facts.eos_token_ids == (0, 2)  # the generation config names two
    assert (base.facts.max_rank, base.facts.dtype) == (8, "float32")
    assert base.facts.has_tokenizer
    assert base.facts.linear_names[0] == "model.layers.0.self_attn.q_proj"
    assert base.facts.linear_names[-1] == "lm_head"
    chat = [{"role": "user", "content": "Who are you? é 漢"}]
    text = base.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = base.tokenizer.encode(text)
    assert ids[0] == base.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert base.tokenizer.decode(ids) == text


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    base = load(tiny_llama(tmp_path))
    assert base.tokenizer is None
    assert not base.facts.has_tokenizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_are_obeyed_whatever_the_file_has(tmp_path: Path, dtype: str) -> None:
    base = load_base(str(tiny_llama(tmp_path, dtype="bfloat16")), dtype, max_rank=8)
    assert base.facts.dtype == dtype
    assert base.head.weight_VD.dtype == getattr(torch, dtype)


def test_auto_picks_a_dtype_and_nonsense_is_refused() -> None:
    assert choose_dtype("auto", torch.device("cpu"), 4096) in (torch.float32, torch.bfloat16)
    assert choose_dtype("auto", torch.device("cpu"), 128) is torch.float32
    with pytest.raises(StartupError, match="float16"):
        choose_dtype("float16", torch.device("cpu"), 128)


def empty(folder: Path) -> Path:
    return folder


def missing(folder: Path) -> Path:
    return folder / "nothing" / "here"


def two_gguf(folder: Path) -> Path:
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")
    return folder


def text_file(folder: Path) -> Path:
    (folder / "model.txt").write_text("hello")
    return folder / "model.txt"


def bad_json(folder: Path) -> Path:
    (folder / "config.json").write_text("{")
    return folder


def no_type(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    return folder


def no_weights(folder: Path) -> Path:
    tiny_llama(folder)
    (folder / "model.safetensors").unlink()
    return folder


def pickled(folder: Path) -> Path:
    (no_weights(folder) / "pytorch_model.bin").write_bytes(b"\x80")
    return folder


SEEN_AT_ONCE = [
    (empty, "is no model"),
    (missing, "does not exist"),
    (two_gguf, "2 GGUF files"),
    (text_file, "is no GGUF model"),
    (bad_json, "no valid JSON"),
    (no_type, "model_type"),
    (no_weights, r"no \*\.safetensors"),
    (pickled, "pickled"),
]


@pytest.mark.parametrize(("make", "message"), SEEN_AT_ONCE, ids=lambda value: str(value))
def test_what_a_look_at_the_files_tells(make: Any, message: str, tmp_path: Path) -> None:
    source = str(make(tmp_path))
    with pytest.raises(StartupError, match=message):
        check_source(source)
    with pytest.raises(StartupError, match=message):
        load(source)


def truncated(folder: Path) -> Path:
    weights = tiny_llama(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def garbage(folder: Path) -> Path:
    (tiny_llama(folder) / "model.safetensors").write_bytes(b"\xff" * 1000)
    return folder


def lacking(folder: Path) -> Path:
    weights = st.load_file(tiny_llama(folder) / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    st.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def misshapen(folder: Path) -> Path:
    weights = st.load_file(tiny_llama(folder) / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
    st.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def encoder(folder: Path) -> Path:
    config = hf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    hf.BertForMaskedLM(config).save_pretrained(folder)
    return folder


def unknown_type(folder: Path) -> Path:
    config = tiny_llama(folder) / "config.json"
    config.write_text(json.dumps({"model_type": "from_the_future"}))
    return folder


def own_code(folder: Path) -> Path:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tiny_llama(folder) / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('ran foreign code')")
    return folder


def broken_gguf(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(b"GGUF" + b"\x01" * 100)
    return folder


def broken_tokenizer(folder: Path) -> Path:
    (tiny_llama(folder) / "tokenizer.json").write_text("{}")
    return folder


def encoder_and_decoder(folder: Path) -> Path:
    config = hf.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    hf.BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


FOUND_WHEN_LOADING = [
    (truncated, "cannot be loaded"),
    (garbage, "cannot be loaded"),
    (lacking, r"lacks 1 weights .* for example model\.layers\.1\.mlp\.up_proj\.weight"),
    (misshapen, r"1 weights of another shape .* model\.layers\.1\.mlp\.up_proj\.weight"),
    (encoder, "no causal language model but BertForMaskedLM"),
    (encoder_and_decoder, "no causal language model but BartForConditionalGeneration"),
    (unknown_type, "from_the_future"),
    (own_code, "custom code"),
    (broken_gguf, "cannot be loaded"),
    (broken_tokenizer, "tokenizer of model .* cannot be loaded"),
]


@pytest.mark.parametrize(("make", "message"), FOUND_WHEN_LOADING, ids=lambda value: str(value))
def test_what_loading_tells(make: Any, message: str, tmp_path: Path) -> None:
    source = make(tmp_path)
    check_source(str(source))
    with pytest.raises(StartupError, match=message) as caught:
        load(source)
    assert str(tmp_path) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_hub_id_that_cannot_be_had_names_the_reason() -> None:
    assert check_source("no-such-org/no-such-model").kind is SourceKind.HUB
    with pytest.raises(StartupError, match=r"no local path.*HF_HUB_OFFLINE is set"):
        load("no-such-org/no-such-model")


def test_a_hub_id_in_the_cache_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    repo = tmp_path / "models--some-org--tiny"
    snapshot = repo / "snapshots" / ("0" * 40)
    tiny_llama(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load("some-org/tiny").facts.architecture == "LlamaForCausalLM"


def test_a_gguf_file_and_its_folder(tmp_path: Path) -> None:
    """A real file of the format, written by the gguf library from a tiny Llama."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    llama = tiny_llama(tmp_path / "llama", tokenizer=True)
    llama_as_gguf(llama, folder / "tiny.gguf")
    for source in (folder, folder / "tiny.gguf"):
        found = check_source(str(source))
        assert (found.kind, found.gguf_file) == (SourceKind.GGUF, "tiny.gguf")
    base, original = load(folder), load(llama)
    tokens_BL = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(
            base.hidden(tokens_BL, BatchPlan()), original.hidden(tokens_BL, BatchPlan())
        )
    assert base.facts.dtype == "float32"
    assert base.facts.eos_token_ids == (2,)
    text = "Who are you?<|im_end|>"
    assert base.tokenizer.encode(text) == original.tokenizer.encode(text)


def test_the_text_part_of_a_model_that_sees(tmp_path: Path) -> None:
    """Qwen3.5 is published so; transformers takes its decoder out of it."""
    text = FAMILIES["qwen3_5"][1] | {"tie_word_embeddings": True}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    config = hf.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    model = hf.Qwen3_5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    base = load(tmp_path)
    assert base.facts.architecture == "Qwen3_5ForCausalLM"
    tokens_BL = torch.arange(20).view(2, 10)
    with torch.no_grad():
        logits = base.head.logits(base.hidden(tokens_BL, BatchPlan()), BatchPlan())
        torch.testing.assert_close(logits, model(tokens_BL).logits, rtol=1e-5, atol=1e-5)


# Head size 16: eight frequencies. Each with the longest row that leaves them as they are.
ROTATIONS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        32,
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
            },
        },
    ),
    "dynamic": (
        "llama",
        64,
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_no_row_that_is_allowed_rotates_those_of_others(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family, longest, config = ROTATIONS[kind]
    base = load(tiny_family(tmp_path, family, **config))
    assert base.facts.context_length == longest
    lowered = longest < config["max_position_embeddings"]
    assert ("may have 32 tokens, not 128" in caplog.text) == lowered

    def logprobs(*lengths: int) -> torch.Tensor:
        """Of the first row; the others lie behind it in the same pass."""
        tokens_T = torch.cat([torch.arange(length) + 1 for length in lengths])
        rows = Rows.of(lengths, base.device)
        with torch.no_grad():
            hidden_TD = base.hidden_packed(tokens_T, rows, BatchPlan())[: lengths[0]]
            return base.head.logits(hidden_TD[None], BatchPlan())[0].log_softmax(-1)

    before = logprobs(20)
    torch.testing.assert_close(logprobs(20, longest), before, rtol=1e-5, atol=1e-5)
    logprobs(longest)
    assert torch.equal(logprobs(20), before)
    # What the bound is for: beside a longer row, a neighbour's numbers are others.
    assert (logprobs(20, 4 * longest) - before).abs().max() > 1e-3


def test_rotations_that_change_at_an_unknown_length_are_refused(tmp_path: Path) -> None:
    rope = ROTATIONS["longrope"][2]["rope_parameters"] | {"factor": 4.0, "attention_factor": 1.0}
    folder = tiny_llama(tmp_path, rope_parameters=rope)
    saved = json.loads((folder / "config.json").read_text())
    saved["rope_parameters"]["original_max_position_embeddings"] = None
    (folder / "config.json").write_text(json.dumps(saved))
    with pytest.raises(StartupError, match=r"longrope.* original_max_position_embeddings"):
        load(folder)


def test_padding_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(tiny_llama(tmp_path / "llama"))
    assert "padded" not in caplog.text
    load(tiny_family(tmp_path / "stablelm", "stablelm"))
    assert "are padded to the longest" in caplog.text
    assert "its attention cannot be exchanged" in caplog.text


def test_checking_a_source_imports_no_torch(tmp_path: Path) -> None:
    """The gateway process does it."""
    code = (
        "import sys; from twinkle_dask.model.source import check_source; "
        f"check_source({str(tiny_llama(tmp_path))!r}); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
