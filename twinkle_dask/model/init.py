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
        generator = torch.Generator().manual_seed(_seed(spec.seed, target.module_path))
        # kaiming_uniform_ with a = sqrt(5) is uniform within 1 / sqrt(fan_in), fan_in being D; also
        # for experts, whose As lie one below another.
        bound = 1 / math.sqrt(target.in_features)
        (name_of_a, shape_of_a), (name_of_b, shape_of_b) = target.shapes(spec.rank).items()
        a_RD = torch.empty(shape_of_a).uniform_(-bound, bound, generator=generator)
        weights[name_of_a] = a_RD.numpy()
        weights[name_of_b] = np.zeros(shape_of_b, np.float32)
    return AdapterState(spec=spec, weights=weights)


def _seed(seed: int, module_path: str) -> int:
    digest = hashlib.sha256(f"{seed}:{module_path}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
