"""An adapter's first weights: PEFT's initialisation, the same on every machine."""

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import torch

from twinkle_dask.model.targets import Target
from twinkle_dask.types import AdapterState, Float32Array, LoraSpec


def init_adapter(targets: Iterable[Target], spec: LoraSpec) -> AdapterState:
    """A fresh adapter for ``targets``: A is ``kaiming_uniform_(a=sqrt(5))``, B is zero.

    Each A depends on the spec's seed, its module's path and its shape alone: not on the machine,
    nor on which other modules are adapted or in what order.
    """
    weights: dict[str, Float32Array] = {}
    for target in targets:
        path = target.module_path
        generator = torch.Generator().manual_seed(_seed(spec.seed, path))
        # kaiming_uniform_ with a = sqrt(5) is uniform within 1 / sqrt(fan_in), fan_in being D.
        bound = 1 / math.sqrt(target.in_features)
        a_RD = torch.empty(spec.rank, target.in_features)
        a_RD.uniform_(-bound, bound, generator=generator)
        weights[f"{path}.lora_A.weight"] = a_RD.numpy()
        weights[f"{path}.lora_B.weight"] = np.zeros((target.out_features, spec.rank), np.float32)
    return AdapterState(spec=spec, weights=weights)


def _seed(seed: int, module_path: str) -> int:
    digest = hashlib.sha256(f"{seed}:{module_path}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
