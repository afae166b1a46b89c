"""Who carries what, for 1, 2 and N workers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask.cluster.commands import Role
from twinkle_dask.cluster.placement import num_workers_needed, plan
from twinkle_dask.config import ModelConfig
from twinkle_dask.errors import StartupError


def roles(models: dict[str, ModelConfig], workers: int) -> list[tuple[str, Role]]:
    return [(slot.source, slot.role) for slot in plan(models, workers)]


ONE = {"a": ModelConfig(source="x")}


def test_one_two_and_five_workers() -> None:
    assert roles(ONE, 1) == [("x", Role.BOTH)]
    assert roles(ONE, 2) == [("x", Role.TRAINER), ("x", Role.SAMPLER)]
    assert [role for _, role in roles(ONE, 5)] == [Role.TRAINER] * 2 + [Role.SAMPLER] * 3


def test_names_of_one_source_share_a_host() -> None:
    assert roles({"a": ModelConfig(source="x"), "b": ModelConfig(source="x")}, 1) == [
        ("x", Role.BOTH)
    ]


def test_configured_numbers_are_kept() -> None:
    models = {"a": ModelConfig(source="x", trainers=1, samplers=2), "b": ModelConfig(source="y")}
    assert roles(models, 4) == [
        ("x", Role.TRAINER),
        ("x", Role.SAMPLER),
        ("x", Role.SAMPLER),
        ("y", Role.BOTH),
    ]
    with pytest.raises(StartupError, match="at least 4"):
        plan(models, 3)


def test_names_of_one_source_must_agree() -> None:
    models = {"a": ModelConfig(source="x", trainers=1, samplers=1), "b": ModelConfig(source="x")}
    with pytest.raises(StartupError, match="'b'"):
        plan(models, 4)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=4))
def test_the_workers_that_are_needed_are_the_fewest_that_do(hosts: list[tuple[int, int]]) -> None:
    models = {
        str(i): ModelConfig(source=f"s{i}", trainers=t, samplers=s if t else 0)
        for i, (t, s) in enumerate(hosts)
    }
    needed = num_workers_needed(models)
    assert len(plan(models, needed)) == needed
    with pytest.raises(StartupError, match=f"at least {needed}"):
        plan(models, needed - 1)


@given(st.integers(1, 4), st.integers(0, 12))
def test_every_source_can_train_and_sample_or_the_start_is_refused(
    num_sources: int, workers: int
) -> None:
    models = {str(i): ModelConfig(source=f"s{i}") for i in range(num_sources)}
    if workers < num_sources:
        with pytest.raises(StartupError, match="dask worker"):
            plan(models, workers)
        return
    slots = plan(models, workers)
    assert len(slots) == workers
    assert len(set(slots)) == workers
    for source in {f"s{i}" for i in range(num_sources)}:
        mine = {slot.role for slot in slots if slot.source == source}
        assert mine in ({Role.BOTH}, {Role.TRAINER, Role.SAMPLER})
