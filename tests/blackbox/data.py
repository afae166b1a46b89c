"""Batches for the official SDK, and the same numbers computed in plain PyTorch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tinker
from tinker import types


def datum(tokens: Sequence[int], **inputs: Any) -> types.Datum:
    """Next-token targets over ``tokens``; further loss inputs as lists or arrays."""
    length = len(tokens) - 1
    loss_inputs: dict[str, Any] = {
        "target_tokens": types.TensorData.from_numpy(np.asarray(tokens[1:], np.int64))
    }
    inputs.setdefault("weights", np.ones(length, np.float32))
    for name, values in inputs.items():
        if values is not None:
            array = np.asarray(values)
            kind = np.int64 if array.dtype.kind == "i" else np.float32
            loss_inputs[name] = types.TensorData.from_numpy(array.astype(kind))
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens[:-1])), loss_fn_inputs=loss_inputs
    )


def random_tokens(length: int, seed: int, vocab_size: int = 4096) -> list[int]:
    """Reproducible tokens that avoid the special ones."""
    return np.random.default_rng(seed).integers(10, vocab_size, length).tolist()


def batch(num: int = 2, length: int = 12, seed: int = 0) -> list[types.Datum]:
    """``num`` random data of different lengths."""
    return [datum(random_tokens(length + i, seed * 1000 + i)) for i in range(num)]


def logprobs(output: types.ForwardBackwardOutput) -> list[np.ndarray]:
    """Per datum."""
    return [np.asarray(out["logprobs"].tolist(), np.float32) for out in output.loss_fn_outputs]


def train_one_step(
    client: tinker.TrainingClient, data: list[types.Datum], lr: float = 1e-2
) -> float:
    """A forward_backward and an optim_step, pipelined; gives the loss."""
    forward = client.forward_backward(data, "cross_entropy")
    step = client.optim_step(types.AdamParams(learning_rate=lr))
    loss = forward.result().metrics["loss:sum"]
    step.result()
    return loss
