"""Checkpoint folders: writing a run's state whole, reading it back only if it is whole.

    adapter_config.json, adapter_model.safetensors   what PEFT, vLLM and others load
    optimizer.safetensors                            exp_avg.<name>, exp_avg_sq.<name>
    steps.safetensors                                memory of another optimizer: <name>.<its word>
    gradients.safetensors                            accumulated, not yet spent (snapshots)
    state.json                                       the rest, and the digests of the files above

All arrays are float32, little-endian, and come back bit for bit.
"""

import json
from collections.abc import Mapping
from typing import Protocol

from twinkle_dask.checkpoints.peft_config import own_name, peft_config, peft_name
from twinkle_dask.checkpoints.state_file import STATE_FILE, StateFile, parse_state, state_file
from twinkle_dask.checkpoints.tensors import (
    check_belongs,
    check_pairs,
    check_same,
    decode,
    encode,
    split,
)
from twinkle_dask.types import AdapterState, Float32Array, OptimizerState, RunState

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_OPTIMIZER_FILE = "optimizer.safetensors"
_STEPS_FILE = "steps.safetensors"
_GRADIENTS_FILE = "gradients.safetensors"

_PEFT_PREFIX = "base_model.model."
_EXP_AVG = "exp_avg."
_EXP_AVG_SQ = "exp_avg_sq."


class Blobs(Protocol):
    """What is needed of ``store.BlobStore``."""

    def put_folder(
        self,
        path: str,
        files: Mapping[str, bytes],
        *,
        overwrite: bool = False,
        marker: str = STATE_FILE,
    ) -> None:
        """Write a folder as one thing."""
        ...

    def get(self, path: str) -> bytes:
        """Read one file."""
        ...


def write_state(blobs: Blobs, path: str, state: RunState, *, base_model: str) -> int:
    """Write a run's state as a new folder; what of it is None is left out.

    All or nothing. Writing to the same path again replaces the folder, so that a request whose
    answer was lost may be repeated.

    Args:
        blobs: Where to.
        path: The folder.
        state: Weights, and optimizer and gradients as far as they are wanted.
        base_model: The name under which the base model is served; PEFT shows it to users.

    Returns:
        Bytes of all files.

    Raises:
        StorageFailed: Nothing was written, for example because the disk is full.
    """
    files = adapter_files(state.adapter, base_model)
    if state.optimizer is not None:
        files[_OPTIMIZER_FILE] = encode(_moments(state.optimizer))
    if state.steps is not None and state.steps.optimizer is not None:
        files[_STEPS_FILE] = encode(state.steps.tensors)
    if state.gradients is not None:
        files[_GRADIENTS_FILE] = encode(state.gradients)
    # Last, as the mark of a whole folder where a store cannot rename.
    files[STATE_FILE] = _json(state_file(state, base_model, files).model_dump())
    blobs.put_folder(path, files, overwrite=True)
    return sum(len(data) for data in files.values())


def adapter_files(adapter: AdapterState, base_model: str) -> dict[str, bytes]:
    """An adapter as the files that PEFT, vLLM and others load."""
    weights = {peft_name(name): array for name, array in adapter.weights.items()}
    return {
        CONFIG_FILE: _json(peft_config(adapter, base_model)),
        ADAPTER_FILE: encode(weights, prefix=_PEFT_PREFIX, framework="pt"),
    }


def read_state(blobs: Blobs, path: str) -> RunState:
    """Read everything that the folder holds.

    Raises:
        StorageFailed: A file is missing or cannot be read.
        CheckpointCorrupt: A file does not hold what ``state.json`` says.
    """
    state = _read_state_file(blobs, path)
    adapter = _read_adapter(blobs, path, state)
    optimizer = None
    if state.optimizer_step is not None:
        moments = _read(blobs, path, _OPTIMIZER_FILE, state)
        where = f"{path}/{_OPTIMIZER_FILE}"
        exp_avg, exp_avg_sq = split(moments, (_EXP_AVG, _EXP_AVG_SQ), where)
        if state.optimizer_step > 0 or moments:  # one that never stepped may have no moments yet
            check_same(exp_avg, adapter.weights, where)
            check_same(exp_avg_sq, adapter.weights, where)
        optimizer = OptimizerState(
            step=state.optimizer_step, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq
        )
    steps = None
    if state.steps is not None:
        has_memory = state.steps.optimizer is not None
        memory = _read(blobs, path, _STEPS_FILE, state) if has_memory else {}
        check_belongs(memory, adapter.weights, f"{path}/{_STEPS_FILE}")
        steps = state.steps.state(memory)
    gradients = None
    if _GRADIENTS_FILE in state.files:
        gradients = _read(blobs, path, _GRADIENTS_FILE, state)
        check_same(gradients, adapter.weights, f"{path}/{_GRADIENTS_FILE}")
    return RunState(adapter=adapter, optimizer=optimizer, gradients=gradients, steps=steps)


def read_adapter(blobs: Blobs, path: str) -> AdapterState:
    """Read the weights alone; raises like ``read_state``."""
    return _read_adapter(blobs, path, _read_state_file(blobs, path))


def _read_state_file(blobs: Blobs, path: str) -> StateFile:
    return parse_state(blobs.get(f"{path}/{STATE_FILE}"), f"{path}/{STATE_FILE}")


def _read_adapter(blobs: Blobs, path: str, state: StateFile) -> AdapterState:
    where = f"{path}/{ADAPTER_FILE}"
    (theirs,) = split(_read(blobs, path, ADAPTER_FILE, state), (_PEFT_PREFIX,), where)
    weights = {own_name(name): array for name, array in theirs.items()}
    check_pairs(weights, state.spec.rank, where)
    return AdapterState(spec=state.spec, weights=weights)


def _read(blobs: Blobs, path: str, name: str, state: StateFile) -> dict[str, Float32Array]:
    where = f"{path}/{name}"
    data = blobs.get(where)
    state.check_digest(name, data, where)
    return decode(data, where)


def _moments(optimizer: OptimizerState) -> dict[str, Float32Array]:
    first = {f"{_EXP_AVG}{name}": array for name, array in optimizer.exp_avg.items()}
    second = {f"{_EXP_AVG_SQ}{name}": array for name, array in optimizer.exp_avg_sq.items()}
    return first | second


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
