"""A model in one GGUF file, as llama.cpp users have it."""

from pathlib import Path
from typing import Any

import pytest
import tinker
import transformers
from tinker import types

from tests.blackbox.data import datum, random_tokens, train_one_step
from tests.models import llama_as_gguf, tiny_llama
from twinkle_dask import local_service

pytestmark = pytest.mark.timeout(120)

hf: Any = transformers


def test_a_gguf_file_is_trained_and_sampled_until_a_stop_string(tmp_path: Path) -> None:
    """The stop string needs the tokenizer that is inside the file."""
    file = tmp_path / "tiny.gguf"
    folder = tiny_llama(tmp_path / "llama", tokenizer=True)
    llama_as_gguf(folder, file)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    with (
        local_service({"tiny": str(file)}, dtype="float32") as service,
        tinker.ServiceClient(base_url=service.url, api_key=service.api_key) as client,
    ):
        run = client.create_lora_training_client("tiny", rank=4, seed=1).result()
        data = [datum(random_tokens(12, seed, 500)) for seed in range(2)]
        losses = [train_one_step(run, data) for _ in range(3)]
        assert losses[2] < losses[0]

        sampler = client.create_sampling_client(base_model="tiny").result()

        def draw(stop: list[str]) -> types.SampledSequence:
            params = types.SamplingParams(max_tokens=60, seed=1, temperature=1.0, stop=stop)
            prompt = types.ModelInput.from_ints([10, 11])
            return sampler.sample(prompt, 1, params).result().sequences[0]

        free = draw([])
        assert (len(free.tokens), free.stop_reason) == (60, "length")
        letter = next(c for c in tokenizer.decode(free.tokens) if c.isascii() and c.isalpha())
        stopped = draw([letter])
        assert stopped.stop_reason == "stop"
        assert stopped.tokens == free.tokens[: len(stopped.tokens)]
        assert letter in tokenizer.decode(stopped.tokens)
        assert letter not in tokenizer.decode(stopped.tokens[:-1])
