"""Saved and read back is the same, bit for bit; anything else is told."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays_of
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask.checkpoints import folders
from twinkle_dask.errors import CheckpointCorrupt, StorageFailed
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.types import (
    AdapterState,
    Float32Array,
    LoraSpec,
    OptimizerState,
    RunState,
    StepState,
)


class Memory:
    """Files by path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def put_folder(
        self,
        path: str,
        files: Mapping[str, bytes],
        *,
        overwrite: bool = False,
        marker: str = "state.json",
    ) -> None:
        assert overwrite
        self.files |= {f"{path}/{name}": data for name, data in files.items()}

    def get(self, path: str) -> bytes:
        return self.files[path]


def example(rank: int = 2, *, gradients: bool = True) -> RunState:
    rng = np.random.default_rng(0)
    shapes = {
        "model.layers.0.mlp.up_proj.lora_A.weight": (rank, 6),
        "model.layers.0.mlp.up_proj.lora_B.weight": (10, rank),
        "lm_head.lora_A.weight": (rank, 6),
        "lm_head.lora_B.weight": (20, rank),
    }

    def some() -> dict[str, Float32Array]:
        return {
            name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
        }

    return RunState(
        adapter=AdapterState(spec=LoraSpec(rank=rank, seed=5, train_attn=False), weights=some()),
        optimizer=OptimizerState(step=7, exp_avg=some(), exp_avg_sq=some()),
        gradients=some() if gradients else None,
        steps=steps_of(some()),
    )


def steps_of(arrays: Mapping[str, Float32Array]) -> StepState:
    """An optimizer that remembers one array of each weight, and a number."""
    named = {f"{name}.momentum_buffer": array for name, array in arrays.items()}
    number = np.array(3, np.float32)
    return StepState(
        gradients=2,
        at_boundary=True,
        gradient_tokens=9.5,
        steps=4,
        schedule_steps=3,
        optimizer="SGD",
        tensors={**named, "step": number},
    )


def assert_same_bits(a: Mapping[str, Float32Array], b: Mapping[str, Float32Array]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert b[name].dtype == np.float32
        assert b[name].shape == array.shape
        assert b[name].tobytes() == array.tobytes()


def assert_same(a: RunState, b: RunState) -> None:
    assert a.adapter.spec == b.adapter.spec
    assert_same_bits(a.adapter.weights, b.adapter.weights)
    assert (a.optimizer is None) == (b.optimizer is None)
    if a.optimizer is not None and b.optimizer is not None:
        assert a.optimizer.step == b.optimizer.step
        assert_same_bits(a.optimizer.exp_avg, b.optimizer.exp_avg)
        assert_same_bits(a.optimizer.exp_avg_sq, b.optimizer.exp_avg_sq)
    assert (a.gradients is None) == (b.gradients is None)
    assert_same_bits(a.gradients or {}, b.gradients or {})
    assert (a.steps is None) == (b.steps is None)
    if a.steps is not None and b.steps is not None:
        assert replace(a.steps, tensors={}) == replace(b.steps, tensors={})
        assert_same_bits(a.steps.tensors, b.steps.tensors)


any_float32 = st.integers(0, 2**32 - 1).map(
    lambda bits: float(np.array(bits, np.uint32).view(np.float32))
)
sizes = st.integers(0, 4)


@st.composite
def run_states(draw: st.DrawFn) -> RunState:
    """Any names and shapes, any bits, NaN and -0.0 among them, in any memory order."""
    rank = draw(st.integers(1, 4))
    path = st.from_regex(r"[a-z_]{1,8}(\.[a-z0-9_]{1,8}){0,3}", fullmatch=True)
    shapes: dict[str, tuple[int, int]] = {}
    for module in draw(st.lists(path, max_size=3, unique=True)):
        shapes[f"{module}.lora_A.weight"] = (rank, draw(sizes))
        shapes[f"{module}.lora_B.weight"] = (draw(sizes), rank)

    def some() -> dict[str, Float32Array]:
        return {
            name: np.asarray(
                draw(arrays_of.arrays(np.float32, shape, elements=any_float32)),
                order=draw(st.sampled_from(["C", "F"])),
            )
            for name, shape in shapes.items()
        }

    spec = LoraSpec(
        rank=rank,
        seed=draw(st.integers(-(2**63), 2**63)),
        alpha=draw(st.floats(0, 1e6)),
        train_attn=draw(st.booleans()),
    )
    optimizer = OptimizerState(step=draw(st.integers(0, 2**40)), exp_avg=some(), exp_avg_sq=some())
    fresh = OptimizerState(step=0, exp_avg={}, exp_avg_sq={})
    return RunState(
        adapter=AdapterState(spec=spec, weights=some()),
        optimizer=draw(st.sampled_from([None, fresh, optimizer])),
        gradients=some() if draw(st.booleans()) else None,
        steps=draw(st.sampled_from([None, StepState(steps=1), steps_of(some())])),
    )


@given(state=run_states(), base_model=st.text(max_size=20))
def test_what_is_written_is_read_back_bit_for_bit(state: RunState, base_model: str) -> None:
    memory = Memory()
    size = folders.write_state(memory, "a/b", state, base_model=base_model)
    assert size == sum(map(len, memory.files.values()))
    assert_same(folders.read_state(memory, "a/b"), state)
    adapter = folders.read_adapter(memory, "a/b")
    assert_same(RunState(adapter=adapter), RunState(adapter=state.adapter))


TENSOR_FILES = (
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "steps.safetensors",
    "gradients.safetensors",
)


@given(name=st.sampled_from(TENSOR_FILES), where=st.floats(0, 1), flip=st.integers(1, 255))
def test_any_changed_byte_is_noticed(name: str, where: float, flip: int) -> None:
    memory = Memory()
    folders.write_state(memory, "a", example(), base_model="m")
    data = bytearray(memory.files[f"a/{name}"])
    data[int(where * (len(data) - 1))] ^= flip
    memory.files[f"a/{name}"] = bytes(data)
    with pytest.raises(CheckpointCorrupt, match=name):
        folders.read_state(memory, "a")


@given(name=st.sampled_from((*TENSOR_FILES, "state.json")), share=st.floats(0, 0.99))
def test_any_half_file_is_noticed(name: str, share: float) -> None:
    memory = Memory()
    folders.write_state(memory, "a", example(), base_model="m")
    data = memory.files[f"a/{name}"]
    memory.files[f"a/{name}"] = data[: int(share * len(data))]
    with pytest.raises(CheckpointCorrupt, match=name):
        folders.read_state(memory, "a")


def edit(memory: Memory, change: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads(memory.files["a/state.json"])
    change(state)
    memory.files["a/state.json"] = json.dumps(state).encode()


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "future": (lambda s: s.update(format_version=2), "format version 2; this program reads 1"),
    "no version": (lambda s: s.pop("format_version"), "format version None"),
    "no rank": (lambda s: s["spec"].pop("rank"), r"spec\.rank"),
    "text step": (lambda s: s.update(optimizer_step="7"), "optimizer_step"),
    "past step": (lambda s: s.update(optimizer_step=-1), "optimizer_step"),
    "past count": (lambda s: s["steps"].update(gradients=-1), r"steps\.gradients"),
    "endless count": (lambda s: s["steps"].update(gradient_tokens=1e999), r"steps\.gradient_tok"),
    "lost memory": (lambda s: s["files"].pop("steps.safetensors"), "not part of"),
    "more": (lambda s: s.update(surprise=1), "surprise"),
    "other rank": (lambda s: s["spec"].update(rank=3), "not of rank 3"),
    "lost file": (lambda s: s["files"].pop("optimizer.safetensors"), "not part of"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_wrong_state_file_is_told(name: str) -> None:
    change, message = EDITS[name]
    memory = Memory()
    folders.write_state(memory, "a", example(), base_model="m")
    edit(memory, change)
    with pytest.raises(CheckpointCorrupt, match=message):
        folders.read_state(memory, "a")


def test_a_folder_of_before_there_were_steps_is_read() -> None:
    memory = Memory()
    state = replace(example(), steps=None)
    folders.write_state(memory, "a", state, base_model="m")
    edit(memory, lambda s: s.pop("steps"))
    assert_same(folders.read_state(memory, "a"), state)


def test_a_state_file_that_is_no_object_is_told() -> None:
    memory = Memory()
    folders.write_state(memory, "a", example(), base_model="m")
    memory.files["a/state.json"] = b"[1]"
    with pytest.raises(CheckpointCorrupt, match="format version None"):
        folders.read_state(memory, "a")


def without(arrays: Mapping[str, Float32Array], name: str) -> dict[str, Float32Array]:
    return {key: array for key, array in arrays.items() if key != name}


A = "lm_head.lora_A.weight"


def lone_b(state: RunState) -> RunState:
    weights = without(state.adapter.weights, A)
    return replace(state, adapter=replace(state.adapter, weights=weights))


def strange_name(state: RunState) -> RunState:
    weights = {**state.adapter.weights, "lm_head.bias": np.zeros(3, np.float32)}
    return replace(state, adapter=replace(state.adapter, weights=weights))


def flat_a(state: RunState) -> RunState:
    weights = {**state.adapter.weights, A: np.zeros(2, np.float32)}
    return replace(state, adapter=replace(state.adapter, weights=weights))


def lost_moment(state: RunState) -> RunState:
    assert state.optimizer is not None
    short = without(state.optimizer.exp_avg_sq, A)
    return replace(state, optimizer=replace(state.optimizer, exp_avg_sq=short))


def other_gradient(state: RunState) -> RunState:
    gradients = {**(state.gradients or {}), A: np.zeros((3, 3), np.float32)}
    return replace(state, gradients=gradients)


def with_memory(state: RunState, name: str, *shape: int) -> RunState:
    assert state.steps is not None
    tensors = {**state.steps.tensors, name: np.zeros(shape, np.float32)}
    return replace(state, steps=replace(state.steps, tensors=tensors))


MISFITS: list[tuple[Callable[[RunState], RunState], str]] = [
    (lone_b, "lora_B.weight without lm_head.lora_A"),
    (strange_name, r"unexpected array lm_head\.bias"),
    (flat_a, r"shape \(2,\), which is not of rank 2"),
    (lost_moment, r"optimizer.* differ in lm_head\.lora_A"),
    (lambda s: with_memory(s, "lm_head.lora_C.weight.sum", 2), r"array lm_head\.lora_C"),
    (lambda s: with_memory(s, "step", 2), "steps.* unexpected array step"),
    (other_gradient, r"gradients.* shape \(3, 3\), its weight \(2, 6\)"),
]


@pytest.mark.parametrize(("change", "message"), MISFITS)
def test_arrays_that_do_not_belong_together_are_told(
    change: Callable[[RunState], RunState], message: str
) -> None:
    memory = Memory()
    folders.write_state(memory, "a", change(example()), base_model="m")
    with pytest.raises(CheckpointCorrupt, match=message):
        folders.read_state(memory, "a")


def test_in_a_real_store_a_repeated_write_replaces(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    folders.write_state(blobs, "runs/r/weights/a", example(), base_model="m")
    again = example(rank=3, gradients=False)
    size = folders.write_state(blobs, "runs/r/weights/a", again, base_model="m")
    assert size == sum(
        len(blobs.get(f"runs/r/weights/a/{name}")) for name in blobs.names("runs/r/weights/a")
    )
    assert_same(folders.read_state(blobs, "runs/r/weights/a"), again)
    names = {path.name for path in (tmp_path / "runs/r/weights/a").iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "steps.safetensors",
        "state.json",
    }
    with pytest.raises(StorageFailed, match="does not exist"):
        folders.read_state(blobs, "runs/r/weights/b")


def test_the_gateway_may_import_this() -> None:
    code = (
        "import sys; import twinkle_dask.checkpoints.folders; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
