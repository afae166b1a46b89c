"""Named float32 arrays as safetensors bytes, and the checks that they are an adapter's.

Shapes: R rank, D in, E out. ``where`` names the file in messages.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from twinkle_dask.errors import CheckpointCorrupt
from twinkle_dask.types import Float32Array

_A = ".lora_A.weight"
_B = ".lora_B.weight"

# Its functions are typed with bare arrays.
_safetensors: Any = safetensors.numpy


def encode(
    arrays: Mapping[str, Float32Array], *, prefix: str = "", framework: str | None = None
) -> bytes:
    """Arrays as the bytes of a safetensors file.

    Args:
        arrays: Of any memory layout; converted to float32 if they are not.
        prefix: Put before every name.
        framework: Written as the file's ``format``; some readers refuse a file without ``pt``.
    """
    # safetensors reads the memory as it lies: a strided view would be written as other numbers.
    solid = {
        prefix + name: np.asarray(array, dtype="<f4", order="C") for name, array in arrays.items()
    }
    return _safetensors.save(solid, None if framework is None else {"format": framework})


def decode(data: bytes, where: str) -> dict[str, Float32Array]:
    """The arrays of a safetensors file.

    Raises:
        CheckpointCorrupt: It is no such file, or holds anything but float32.
    """
    try:
        arrays: dict[str, Float32Array] = _safetensors.load(data)
    # A dtype that numpy lacks (bfloat16) is a KeyError there.
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointCorrupt(f"{where} is no readable safetensors file.") from error
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise CheckpointCorrupt(f"{where}: {name} is {array.dtype} where float32 belongs.")
    return arrays


def split(
    arrays: Mapping[str, Float32Array], prefixes: tuple[str, ...], where: str
) -> list[dict[str, Float32Array]]:
    """The arrays under each prefix, without it.

    Raises:
        CheckpointCorrupt: A name has none of the prefixes.
    """
    parts: dict[str, dict[str, Float32Array]] = {prefix: {} for prefix in prefixes}
    for name, array in arrays.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            raise CheckpointCorrupt(f"{where} holds an unexpected array {name}.")
        parts[prefix][name.removeprefix(prefix)] = array
    return list(parts.values())


def check_pairs(weights: Mapping[str, Float32Array], rank: int, where: str) -> None:
    """Every module must have an A_RD and a B_ER of ``rank``, and there must be nothing else.

    Of routed experts R is the rank times their number.

    Raises:
        CheckpointCorrupt: Names what is wrong.
    """
    for name, array in weights.items():
        if name.endswith(_A):
            other, inner = name.removesuffix(_A) + _B, array.shape[:1]
        elif name.endswith(_B):
            other, inner = name.removesuffix(_B) + _A, array.shape[1:]
        else:
            raise CheckpointCorrupt(f"{where} holds an unexpected array {name}.")
        if other not in weights:
            raise CheckpointCorrupt(f"{where} holds {name} without {other}.")
        stacked = ".experts." in name and bool(inner) and inner[0] % max(rank, 1) == 0
        if array.ndim != 2 or not (stacked or inner == (rank,)):
            raise CheckpointCorrupt(
                f"{where}: {name} has the shape {array.shape}, which is not of rank {rank}."
            )


def check_same(
    arrays: Mapping[str, Float32Array], weights: Mapping[str, Float32Array], where: str
) -> None:
    """``arrays`` must have the weights' names and shapes.

    Raises:
        CheckpointCorrupt: Names the first difference.
    """
    if different := sorted(arrays.keys() ^ weights.keys()):
        raise CheckpointCorrupt(f"{where} and the adapter differ in {different[0]}.")
    for name, array in arrays.items():
        if array.shape != weights[name].shape:
            raise CheckpointCorrupt(
                f"{where}: {name} has the shape {array.shape}, its weight {weights[name].shape}."
            )


def check_belongs(
    arrays: Mapping[str, Float32Array], weights: Mapping[str, Float32Array], where: str
) -> None:
    """Every array must be a single number, or named after a weight and a word behind it.

    Raises:
        CheckpointCorrupt: Names one that is not.
    """
    for name, array in arrays.items():
        weight, _, _ = name.rpartition(".")
        if weight not in weights if weight else array.shape != ():
            raise CheckpointCorrupt(f"{where} holds an unexpected array {name}.")
