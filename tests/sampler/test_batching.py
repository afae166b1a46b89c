"""Many requests at once: joining, leaving, memory, failures; none of it shows in the tokens."""

from collections.abc import Sequence as Several

import numpy as np
import pytest
import torch

from tests.sampler.conftest import MakeDriver
from tests.sampler.driver import adapter, prompt, request, same
from twinkle_dask.errors import InvalidRequest, Saturated, ServiceFault, StartupError
from twinkle_dask.model.base import BaseModel
from twinkle_dask.sampler.interface import Sampler, SampleWork
from twinkle_dask.sampler.lanes import Lane
from twinkle_dask.sampler.passes import Drawn, Passes
from twinkle_dask.sampler.sequences import Job
from twinkle_dask.types import AdapterState, SampledSequence, SampleRequest, TenantId

# The base model of these tests: 2 layers, keys and values, 2 heads of 16, 4 bytes.
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4


def test_it_is_a_sampler(make: MakeDriver) -> None:
    sampler: Sampler = make().sampler
    assert not sampler.busy
    assert sampler.step() == []


def test_samples_are_distinct_and_in_order(make: MakeDriver) -> None:
    driver = make()
    result = driver.result(driver.submit(request(prompt(40), 12, num_samples=7, seed=3)))
    assert len({tuple(s.tokens.tolist()) for s in result.sequences}) == 7
    fewer = driver.result(driver.submit(request(prompt(40), 12, num_samples=3, seed=3)))
    for one, other in zip(fewer.sequences, result.sequences[:3], strict=True):
        assert same(one, other)


def test_seeds_hold_and_no_seed_is_fresh(make: MakeDriver) -> None:
    driver = make()
    asked = request(prompt(9), 20, seed=5)
    assert same(driver.sample(asked), driver.sample(asked))
    assert not same(driver.sample(asked), driver.sample(request(prompt(9), 20, seed=6)))
    fresh = request(prompt(9), 20, seed=None)
    assert not same(driver.sample(fresh), driver.sample(fresh))


def test_tokens_do_not_depend_on_companions(make: MakeDriver) -> None:
    asked = request(prompt(20), 40, seed=5, top_p=0.9)
    alone = make().sample(asked)
    driver = make()
    for i in range(6):
        other = request(prompt(3 + 9 * i, i), 5 * i + 1, top_k=3 * i - 1, temperature=0.3 * i)
        driver.submit(other)
    work_id = driver.submit(asked)
    for i in range(6):
        driver.step(4)
        driver.submit(request(prompt(2 + 3 * i, i), 9, num_samples=2))
    assert same(driver.result(work_id).sequences[0], alone)


def test_requests_join_between_steps_and_short_ones_leave_first(make: MakeDriver) -> None:
    driver = make()
    long = driver.submit(request(prompt(5), 100))
    driver.step(30)
    assert driver.sampler.num_running == 1
    short = driver.submit(request(prompt(5), 4))
    driver.step(10)
    assert driver.order == [short]
    driver.result(long)
    assert not driver.sampler.busy


def test_a_long_prompt_stalls_nobody(make: MakeDriver) -> None:
    """Between two tokens of a running sequence there is one chunk of 32 at most."""
    driver = make()
    running = driver.submit(request(prompt(5), 30), tenant="a")
    driver.step(2)
    long = driver.submit(request(prompt(1500), 1), tenant="b")
    driver.step(4)
    short = driver.submit(request(prompt(6), 1), tenant="b")
    driver.step(60)
    assert driver.order == [short, running]
    driver.result(long)


def test_one_long_prompt_and_many_short_ones_of_others(make: MakeDriver) -> None:
    """By tokens: the long prompt of 640 is done when the others have had about as many."""
    driver = make()
    long = driver.submit(request(prompt(640), 1), tenant="a")
    for i in range(60):
        driver.submit(request(prompt(16, i), 1), tenant="b")
    driver.drain()
    assert 30 <= driver.order.index(long) <= 50


@pytest.mark.parametrize("max_sequences", [4, 64])
def test_a_tenant_with_a_hundred_requests_does_not_starve_another(
    make: MakeDriver, max_sequences: int
) -> None:
    driver = make(max_sequences=max_sequences)
    many = [driver.submit(request(prompt(8, i), 50), tenant="many") for i in range(100)]
    driver.step(12)
    few = [driver.submit(request(prompt(8, i), 20), tenant="few") for i in range(2)]
    driver.step(60)
    assert set(few) <= set(driver.order)
    assert sum(work_id in driver.order for work_id in many) < 70
    for work_id, seed in zip(many, range(100), strict=True):
        if seed % 25 == 0:
            alone = make().sample(request(prompt(8, seed), 50))
            assert same(driver.result(work_id).sequences[0], alone)


def test_cancel_frees_slots_at_once_and_they_are_used_again(
    make: MakeDriver, base: BaseModel
) -> None:
    driver = make()
    driver.sampler.add_adapter("a", adapter(base, 1))
    kept = driver.submit(request(prompt(7), 40), "a")
    gone = driver.submit(request(prompt(9), 40, num_samples=3), "a")
    waiting = driver.submit(request(prompt(900), 40))
    driver.step(8)
    assert driver.sampler.num_running == 4
    taken = driver.sampler.kv_bytes
    driver.sampler.cancel(gone)
    driver.sampler.cancel(waiting)
    driver.sampler.cancel("unknown")
    assert driver.sampler.num_running == 1
    after = driver.submit(request(prompt(30), 20, num_samples=3))
    driver.drain()
    assert set(driver.outcomes) == {kept, after}
    assert driver.sampler.kv_bytes <= taken
    assert same(driver.result(kept).sequences[0], driver.sample(request(prompt(7), 40), "a"))
    fresh = make()
    expected = fresh.result(fresh.submit(request(prompt(30), 20, num_samples=3)))
    for one, other in zip(driver.result(after).sequences, expected.sequences, strict=True):
        assert same(one, other)


def test_cancel_between_the_end_and_its_delivery(make: MakeDriver) -> None:
    driver = make()
    work_id = driver.submit(request([1]), "no such adapter")
    driver.sampler.cancel(work_id)
    assert not driver.sampler.busy


def alone(make: MakeDriver, asked: SampleRequest) -> Several[SampledSequence]:
    driver = make()
    return driver.result(driver.submit(asked)).sequences


@pytest.mark.parametrize("tokens", [160, 400, 1000])
def test_within_little_memory_everything_waits_and_nothing_fails(
    make: MakeDriver, tokens: int
) -> None:
    """From room for hardly one sequence to room for several; lengths cross a lane's end."""
    bound = tokens * TOKEN_BYTES
    driver = make(max_kv_bytes=bound, lane_tokens=(32,))
    asked = [
        request(prompt(5 + 4 * (i % 5), i), 12 + 9 * (i % 4), seed=i, num_samples=1 + i % 3)
        for i in range(12)
    ]
    ids = [driver.submit(one, tenant=f"t{i % 3}") for i, one in enumerate(asked)]
    while driver.sampler.busy:
        driver.step()
        assert driver.sampler.kv_bytes <= bound
    for one, work_id in zip(asked, ids, strict=True):
        for got, expected in zip(driver.result(work_id).sequences, alone(make, one), strict=True):
            assert same(got, expected)


def test_memory_bounds_length(make: MakeDriver, caplog: pytest.LogCaptureFixture) -> None:
    driver = make(max_kv_bytes=200 * TOKEN_BYTES)
    assert driver.sampler.max_length == 96
    assert "max_kv_bytes" in caplog.text
    assert len(driver.sample(request(prompt(50), None)).tokens) == 46
    driver.failure(driver.submit(request(prompt(97))), InvalidRequest)
    with pytest.raises(StartupError, match="max_kv_bytes"):
        make(max_kv_bytes=100 * TOKEN_BYTES)


def test_more_samples_than_rows(make: MakeDriver) -> None:
    driver = make(max_sequences=4)
    asked = request(prompt(10), 6, num_samples=11)
    work_id = driver.submit(asked)
    most = 0
    while driver.sampler.busy:
        driver.step()
        most = max(most, driver.sampler.num_running)
    assert most == 4
    for got, expected in zip(driver.result(work_id).sequences, alone(make, asked), strict=True):
        assert same(got, expected)


def test_a_diverged_adapter_breaks_only_its_own_requests(make: MakeDriver, base: BaseModel) -> None:
    """Its keys and values are infinite; they must not reach who shares the batch or the slot."""
    wild = adapter(base, 1)
    wild = AdapterState(
        spec=wild.spec,
        weights={n: (w * 1e12).astype(np.float32) for n, w in wild.weights.items()},
    )
    driver = make()
    driver.sampler.add_adapter("wild", wild)
    driver.sampler.add_adapter("good", adapter(base, 2))
    asked = [request(prompt(6 + i, i), 30) for i in range(4)]
    good = [driver.submit(one, "good") for one in asked]
    broken: list[str] = []
    for i in range(6):
        broken.append(driver.submit(request(prompt(20, i), 30), "wild"))
        driver.step(3)
    for work_id in broken:
        driver.failure(work_id, InvalidRequest)
    for one, work_id in zip(asked, good, strict=True):
        assert same(driver.result(work_id).sequences[0], driver.sample(one, "good"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [(torch.OutOfMemoryError("no memory"), Saturated), (RuntimeError("a bug"), ServiceFault)],
)
def test_a_failing_request_fails_alone(
    make: MakeDriver, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Saturated]
) -> None:
    """In prefill and in decoding, in company; the others do not notice."""
    prefill, decode = Passes.prefill, Passes.decode

    def bad_prefill(self: Passes, jobs: Several[Job], length: int) -> list[Drawn]:
        if any(len(job.tokens) == 13 for job in jobs):
            raise error
        return prefill(self, jobs, length)

    def bad_decode(self: Passes, lane: Lane, rows: slice) -> list[Drawn]:
        drawn = decode(self, lane, rows)
        if any(sequence.num_cached == 20 for sequence in lane.rows[rows]):
            raise error  # only after everything was computed once
        return drawn

    asked = [request(prompt(3 + i, i), 6, num_samples=2) for i in range(8)]
    expected = [alone(make, one) for one in asked]
    monkeypatch.setattr(Passes, "prefill", bad_prefill)
    monkeypatch.setattr(Passes, "decode", bad_decode)
    driver = make()
    good = [driver.submit(one) for one in asked]
    bad = [driver.submit(request(prompt(13), 5)), driver.submit(request(prompt(17), 9))]
    for work_id in bad:
        assert driver.failure(work_id, kind).message
    for work_id, sequences in zip(good, expected, strict=True):
        for got, one in zip(driver.result(work_id).sequences, sequences, strict=True):
            assert same(got, one)


def test_memory_that_is_not_there_costs_one_request(
    make: MakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine refuses what ``max_kv_bytes`` allows, in the middle of growing a lane."""
    asked = [request(prompt(4, i), 30, seed=i) for i in range(4)]
    expected = [alone(make, one) for one in asked]
    calls = 0
    reshape = Lane.reshape

    def refusing(self: Lane, slots: int, capacity: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("no memory")
        reshape(self, slots, capacity)

    monkeypatch.setattr(Lane, "reshape", refusing)
    driver = make(lane_tokens=(16,))
    ids = [driver.submit(one) for one in asked]
    driver.failure(ids[-1], Saturated)
    for work_id, sequences in zip(ids[:-1], expected[:-1], strict=True):
        assert same(driver.result(work_id).sequences[0], sequences[0])


def test_bad_requests_are_refused_and_others_go_on(make: MakeDriver) -> None:
    driver = make()
    bad = [request([]), request([1, 512]), request([-1]), request([1], 0), request(prompt(2049))]
    good = driver.submit(request(prompt(4)))
    for one in [*bad, request([1], num_samples=0)]:
        driver.failure(driver.submit(one), InvalidRequest)
    driver.result(good)


def test_an_id_in_use_is_refused(make: MakeDriver) -> None:
    driver = make()
    work = SampleWork("same", TenantId("t"), request([1]), None)
    driver.sampler.submit(work)
    with pytest.raises(ValueError, match="same"):
        driver.sampler.submit(work)
    driver.drain()
    driver.sampler.submit(work)


def test_tokens_done_counts_what_was_read_and_written(make: MakeDriver) -> None:
    driver = make()
    driver.submit(request(prompt(40), 6, num_samples=2))
    driver.submit(request(prompt(3), 1))
    driver.drain()
    assert driver.sampler.tokens_done == 40 + 12 + 3 + 1
