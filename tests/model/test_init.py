"""The first weights: PEFT's distribution, the same whatever else is adapted."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask.model.init import init_adapter
from twinkle_dask.model.targets import Group, Target
from twinkle_dask.types import LoraSpec


def target(path: str, in_features: int = 32, out_features: int = 48) -> Target:
    return Target(
        module_path=path, in_features=in_features, out_features=out_features, group=Group.ATTN
    )


TARGETS = [target(f"model.layers.{i}.self_attn.q_proj") for i in range(6)]


@given(order=st.permutations(TARGETS), kept=st.integers(1, 6), seed=st.integers(-(2**63), 2**63))
def test_a_module_starts_the_same_in_any_company(order: list[Target], kept: int, seed: int) -> None:
    spec = LoraSpec(rank=4, seed=seed)
    everything = init_adapter(TARGETS, spec).weights
    some = init_adapter(order[:kept], spec).weights
    assert len(some) == 2 * kept
    for name, array in some.items():
        np.testing.assert_array_equal(array, everything[name])


def test_a_is_uniform_within_the_bound_of_kaiming_and_b_is_zero() -> None:
    state = init_adapter([target("q_proj", in_features=256)], LoraSpec(rank=64, seed=3))
    a_RD = state.weights["q_proj.lora_A.weight"]
    b_ER = state.weights["q_proj.lora_B.weight"]
    assert (a_RD.shape, b_ER.shape) == ((64, 256), (48, 64))
    assert a_RD.dtype == b_ER.dtype == np.float32
    bound = 1 / math.sqrt(256)
    assert 0.99 * bound < np.abs(a_RD).max() <= bound
    np.testing.assert_allclose(a_RD.std(), bound / math.sqrt(3), rtol=0.02)
    assert not b_ER.any()


def test_the_numbers_are_fixed() -> None:
    """A seed means the same adapter on every machine and in every version."""
    weights = init_adapter([target("a", in_features=4)], LoraSpec(rank=1, seed=7)).weights
    expected = [[-0.1166735291481018, 0.2991868257522583, -0.470711886882782, -0.20322948694229126]]
    assert weights["a.lora_A.weight"].tolist() == expected


def test_seeds_and_modules_differ() -> None:
    spec, other = LoraSpec(rank=4, seed=0), LoraSpec(rank=4, seed=1)
    first = init_adapter(TARGETS[:2], spec).weights
    names = [f"{item.module_path}.lora_A.weight" for item in TARGETS[:2]]
    assert not np.array_equal(first[names[0]], first[names[1]])
    assert not np.array_equal(first[names[0]], init_adapter(TARGETS, other).weights[names[0]])
