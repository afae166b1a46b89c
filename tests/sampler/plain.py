"""The same model in plain transformers: no cache, no batch, adapters merged into the weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from twinkle_dask.types import AdapterState, Float32Array

_hf: Any = transformers


class PlainModel:
    def __init__(self, folder: Path) -> None:
        self._model: Any = _hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.eval()

    def logprobs(self, tokens: Sequence[int], state: AdapterState | None = None) -> Float32Array:
        """Log softmax at every position, float32 (N, V)."""
        with torch.no_grad():
            weights = dict(self._model.named_parameters())
            head = self._model.get_output_embeddings().weight
            for path, delta in ({} if state is None else deltas(state)).items():
                if path == "lm_head":
                    head = head + delta
                else:
                    weights[f"{path}.weight"] = weights[f"{path}.weight"] + delta
            body = {k.removeprefix("model."): v for k, v in weights.items() if k[:6] == "model."}
            ids = torch.tensor([list(tokens)])
            output: Any = torch.func.functional_call(self._model.model, body, (ids,))
            logprobs: Any = torch.log_softmax(output.last_hidden_state[0] @ head.T, dim=-1)
            return np.array(logprobs.numpy())

    def of_tokens(
        self, prompt: Sequence[int], tokens: Sequence[int], state: AdapterState | None = None
    ) -> Float32Array:
        """Logprobs of ``tokens`` after ``prompt``."""
        whole = [*prompt, *tokens]
        logprobs_NV = self.logprobs(whole, state)
        places = np.arange(len(prompt) - 1, len(whole) - 1)
        return logprobs_NV[places, np.array(tokens)]

    def greedy(
        self, prompt: Sequence[int], num_tokens: int, state: AdapterState | None = None
    ) -> list[int]:
        """The likeliest token, again and again."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logprobs(tokens, state)[-1].argmax()))
        return tokens[len(prompt) :]

    def generate(
        self, prompt: Sequence[int], num_tokens: int, repetition_penalty: float = 1.0
    ) -> list[int]:
        """What ``transformers`` itself generates greedily, up to the end of sequence."""
        ids = torch.tensor([list(prompt)])
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            repetition_penalty=repetition_penalty,
        )
        return out[0, len(prompt) :].tolist()


def deltas(state: AdapterState) -> dict[str, Tensor]:
    """What an adapter adds to each weight: ``alpha / rank * B @ A``."""
    scale, end = state.spec.alpha / state.spec.rank, ".lora_A.weight"
    return {
        (path := name.removesuffix(end)): scale
        * torch.tensor(state.weights[f"{path}.lora_B.weight"])
        @ torch.tensor(a)
        for name, a in state.weights.items()
        if name.endswith(end)
    }
