"""Adapters in the sampler: copies, eviction, and what does not fit."""

import numpy as np
import pytest

from tests.sampler.conftest import MakeDriver
from tests.sampler.driver import adapter, prompt, request, same
from twinkle_dask.errors import InvalidRequest, NotFound
from twinkle_dask.model.base import BaseModel
from twinkle_dask.types import AdapterState, LoraSpec


def test_unknown_key_is_not_found(make: MakeDriver) -> None:
    driver = make()
    assert not driver.sampler.has_adapter("a")
    driver.failure(driver.submit(request([1]), "a"), NotFound)


def test_a_snapshot_does_not_change(make: MakeDriver, base: BaseModel) -> None:
    driver, state = make(), adapter(base, 1)
    driver.sampler.add_adapter("a", state)
    before = driver.sample(request(prompt(5)), "a")
    for array in state.weights.values():
        array.setflags(write=True)
        array[:] = 3.0
    assert same(driver.sample(request(prompt(5)), "a"), before)
    driver.sampler.add_adapter("a", adapter(base, 2))  # a key names one snapshot for ever
    assert same(driver.sample(request(prompt(5)), "a"), before)


def test_weights_in_read_only_memory(make: MakeDriver, base: BaseModel) -> None:
    driver, state = make(), adapter(base, 1)
    for array in state.weights.values():
        array.setflags(write=False)
    driver.sampler.add_adapter("a", state)
    driver.sample(request(prompt(5)), "a")


def test_least_recently_used_goes_first_but_never_one_in_use(
    make: MakeDriver, base: BaseModel
) -> None:
    states = [adapter(base, i) for i in range(5)]
    driver = make(max_adapter_bytes=2 * states[0].num_bytes)
    sampler = driver.sampler

    def there() -> str:
        return "".join(key for key in "abcde" if sampler.has_adapter(key))

    sampler.add_adapter("a", states[0])
    sampler.add_adapter("b", states[1])
    driver.sample(request(prompt(5)), "a")
    sampler.add_adapter("c", states[2])
    assert there() == "ac"
    running = driver.submit(request(prompt(5), 30), "a"), driver.submit(request(prompt(5), 30), "c")
    driver.step(3)
    sampler.add_adapter("d", states[3])  # over the bound rather than failing
    assert there() == "acd"
    sampler.add_adapter("e", states[4])
    assert there() == "ace"
    for work_id in running:
        driver.result(work_id)
    sampler.add_adapter("b", states[1])
    assert there() == "be"


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "rank", "nan", "huge"])
def test_what_does_not_fit_fails_with_its_requests(
    make: MakeDriver, base: BaseModel, fault: str
) -> None:
    good = adapter(base, 1)
    weights, spec = {name: array.copy() for name, array in good.weights.items()}, good.spec
    name = next(iter(weights))
    match fault:
        case "missing":
            del weights[name]
        case "extra":
            weights["model.layers.9.mlp.up_proj.lora_A.weight"] = weights[name]
        case "shape":
            weights[name] = weights[name][:, :-1]
        case "rank":
            spec = LoraSpec(rank=7, seed=0)
        case "nan":
            weights[name][0, 0] = np.nan
        case _:
            weights[name][0, 0] = 1e30
    driver = make()
    driver.sampler.add_adapter("a", AdapterState(spec=spec, weights=weights))
    assert not driver.sampler.has_adapter("a")
    driver.failure(driver.submit(request([1]), "a"), InvalidRequest)
    driver.sampler.add_adapter("a", good)
    driver.sample(request([1]), "a")
