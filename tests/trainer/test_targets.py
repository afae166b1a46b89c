"""Adapters of named modules, and what of a saved one a run takes over."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.models import tiny_family
from tests.trainer.conftest import MakeDriver
from tests.trainer.driver import batch
from tests.trainer.stories import compare_states, exactly
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.lora_targets import named
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.loading import load_base
from twinkle_dask.trainer.work import CreateRun
from twinkle_dask.types import LoraSpec

NAMED = LoraSpec(rank=4, seed=1, alpha=6.0, rslora=True, dropout=0.2, targets=("q_proj", "lm_head"))


def test_only_what_is_named_is_there(make: MakeDriver, base: BaseModel) -> None:
    driver = make()
    driver.create("r", NAMED)
    adapted = {name.rsplit(".lora_", 1)[0] for name in driver.state("r").adapter.weights}
    assert adapted == set(named(("q_proj", "lm_head"), base.facts.linear_names))
    assert len(adapted) == 3


def test_a_named_module_starts_as_it_would_in_company(make: MakeDriver) -> None:
    driver = make()
    driver.create("r", NAMED)
    driver.create("all", LoraSpec(rank=4, seed=1))
    everything = driver.state("all").adapter.weights
    for name, weight in driver.state("r").adapter.weights.items():
        np.testing.assert_array_equal(weight, everything[name])


def test_a_name_that_is_not_there_is_refused(make: MakeDriver) -> None:
    driver = make()
    refused = driver.do("r", CreateRun(spec=replace(NAMED, targets=("q_proj", "wq"))))
    assert isinstance(refused, InvalidRequest)
    assert "'wq'" in refused.message
    assert "down_proj" in refused.message


def test_a_run_goes_on_from_its_state(make: MakeDriver) -> None:
    body = replace(batch(np.random.default_rng(0)), dropout_seed=3)
    never = make()
    never.create("r", NAMED)
    stopped = make()
    stopped.create("r", NAMED)
    for driver in (never, stopped):
        driver.forward_backward("r", body)
        driver.step("r")
    again = make()
    again.load("r", stopped.state("r"))
    for driver in (never, again):
        driver.forward_backward("r", body)
        driver.step("r")
    compare_states(never.state("r"), again.state("r"), exactly)


def test_a_loaded_state_changes_no_dropout(make: MakeDriver) -> None:
    driver = make()
    driver.create("r", NAMED)
    driver.create("other", replace(NAMED, dropout=0.0, seed=9))
    driver.load("other", driver.state("r"))
    assert driver.state("other").adapter.spec == replace(NAMED, dropout=0.0)


@pytest.mark.parametrize(
    "other", [{"alpha": 5.0}, {"rslora": False}, {"targets": ("q_proj",)}, {"rank": 2}], ids=str
)
def test_a_state_of_another_meaning_is_refused(make: MakeDriver, other: dict[str, object]) -> None:
    driver = make()
    driver.create("r", NAMED)
    driver.create("other", replace(NAMED, **other))
    with pytest.raises(AssertionError):
        driver.load("other", driver.state("r"))


def test_routed_experts_take_no_dropout(tmp_path: Path) -> None:
    """Nor do they in PEFT; the rest of such a model does."""
    base = load_base(str(tiny_family(tmp_path, "qwen3_moe")), "float32", max_rank=8)
    spec = LoraSpec(rank=2, seed=1, dropout=0.1)
    with pytest.raises(InvalidRequest, match="routed experts take no dropout"):
        base.targets(spec)
    assert base.targets(replace(spec, targets=("q_proj",)))
    both = ("experts.gate_up_proj", "experts.down_proj")
    assert len(base.targets(replace(spec, dropout=0.0, targets=both))) == 4
    with pytest.raises(InvalidRequest, match="adapted whole: name gate_up_proj and down_proj"):
        base.targets(replace(spec, dropout=0.0, targets=both[:1]))
