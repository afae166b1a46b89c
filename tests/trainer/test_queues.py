"""Order within a run, fairness between tenants: any interleaving, by Hypothesis."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinkle_dask.losses import loss_spec
from twinkle_dask.trainer.queues import Pick, RunQueues
from twinkle_dask.trainer.work import Work, WorkBody
from twinkle_dask.types import (
    AdamParams,
    CustomLoss,
    Datum,
    ForwardBackward,
    OptimStep,
    RunId,
    TenantId,
)

STEP = OptimStep(adam=AdamParams())
LOSS = loss_spec("cross_entropy", {})
BUDGET = 64

lengths_of_batch = st.lists(st.integers(1, 90), min_size=1, max_size=8)


def rows(lengths: Sequence[int], *, backward: bool = True) -> ForwardBackward:
    data = [
        Datum(
            tokens=np.zeros(length, np.int32),
            target_tokens=np.zeros(length, np.int64),
            loss_inputs={},
        )
        for length in lengths
    ]
    return ForwardBackward(data=tuple(data), loss=LOSS, backward=backward)


def work(work_id: str, body: WorkBody, run: str = "r", tenant: str = "t") -> Work:
    return Work(id=work_id, run=RunId(run), tenant=TenantId(tenant), body=body)


def tokens(pick: Pick) -> int:
    return sum(pick.body.length_of(row) for row in pick.rows)


bodies = st.one_of(
    st.just(STEP), st.builds(rows, lengths_of_batch, backward=st.sampled_from([True, True, False]))
)


@settings(deadline=None)
@given(data=st.data())
def test_each_row_once_and_each_run_in_order(data: st.DataObject) -> None:
    """A simulation of the engine, with restarts: no rule of the order is ever broken."""
    queues = RunQueues()
    submitted: dict[str, list[Work]] = defaultdict(list)
    done: set[str] = set()
    given_rows: dict[str, set[int]] = defaultdict(set)

    def earlier(w: Work) -> list[Work]:
        order = submitted[w.run]
        return order[: order.index(w)]

    def micro_batch() -> bool:
        picks = queues.next_batch(BUDGET)
        count = sum(len(pick.rows) for pick in picks)
        assert count == 1 or sum(map(tokens, picks)) <= BUDGET
        for pick in picks:
            for before in earlier(pick.work):
                assert before.id in done or isinstance(before.body, ForwardBackward)
            assert not given_rows[pick.work.id] & set(pick.rows)
            given_rows[pick.work.id] |= set(pick.rows)
        if len(picks) > 1 and data.draw(st.booleans(), "the pass fails"):
            for pick in picks:
                queues.restart_alone(pick.work.id)
                given_rows[pick.work.id].clear()
        for pick in picks:
            if len(given_rows[pick.work.id]) == pick.body.num_rows:
                queues.finish(pick.work.id)
                done.add(pick.work.id)
        return bool(picks)

    def barriers() -> bool:
        ready = list(queues.barriers())
        for w in ready:
            assert all(before.id in done for before in earlier(w))
            queues.finish(w.id)
            done.add(w.id)
        return bool(ready)

    for number in range(data.draw(st.integers(1, 30), "works")):
        run = data.draw(st.sampled_from("abcd"), "run")
        w = work(str(number), data.draw(bodies), run, tenant="x" if run in "ab" else "y")
        submitted[run].append(w)
        queues.add(w)
        for action in data.draw(st.lists(st.sampled_from([micro_batch, barriers]), max_size=2)):
            action()
    while micro_batch() or barriers():
        pass
    assert len(queues) == 0
    assert done == {w.id for order in submitted.values() for w in order}


@settings(deadline=None)
@given(st.lists(lengths_of_batch, min_size=2, max_size=5), st.integers(1, 20))
def test_busy_tenants_never_differ_by_more_than_a_row(
    batches: list[list[int]], num_batches: int
) -> None:
    queues = RunQueues()
    for tenant, lengths in enumerate(batches):
        enough = lengths * (20 * 90 // sum(lengths) + 1)
        queues.add(work(str(tenant), rows(enough), f"r{tenant}", f"t{tenant}"))
    served = dict.fromkeys((f"t{tenant}" for tenant in range(len(batches))), 0)
    for _ in range(num_batches):
        for pick in queues.next_batch(BUDGET):
            served[pick.work.tenant] += tokens(pick)
    assert max(served.values()) - min(served.values()) <= max(map(max, batches))


@settings(deadline=None)
@given(
    huge=st.lists(st.integers(1, 20), min_size=100, max_size=100),
    small=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    before=st.integers(0, 10),
    backward=st.booleans(),
)
def test_a_small_batch_waits_for_one_micro_batch_of_a_huge_one(
    huge: list[int], small: list[int], before: int, backward: bool
) -> None:
    """Both take turns row by row, so what is small beside the budget is in the very next one."""
    queues = RunQueues()
    queues.add(work("huge", rows(huge), "r1", "t1"))
    for _ in range(before):
        queues.next_batch(BUDGET)
    queues.add(work("small", rows(small, backward=backward), "r2", "t2"))
    got = sum(len(p.rows) for p in queues.next_batch(BUDGET) if p.work.id == "small")
    assert got == len(small)


@pytest.mark.parametrize("first", ["a", "b"])
def test_neither_idleness_nor_an_empty_machine_counts(first: str) -> None:
    """Tenant a had the machine alone while b was away; from b's coming they share evenly."""
    queues = RunQueues()
    queues.add(work("b0", rows([10]), "rb", "b"))
    queues.add(work("a0", rows([10] * 100), "ra", "a"))
    while queues.next_batch(BUDGET):
        pass
    queues.finish("a0")
    queues.finish("b0")
    for name in (first, "b" if first == "a" else "a"):
        queues.add(work(f"{name}1", rows([10] * 100), f"r{name}", name))
    served = {"a": 0, "b": 0}
    for _ in range(5):
        for pick in queues.next_batch(BUDGET):
            served[pick.work.tenant] += tokens(pick)
    # Whoever was a micro-batch ahead when the other came stays ahead by that.
    assert abs(served["a"] - served["b"]) <= BUDGET


def test_one_tenant_has_one_share_however_many_runs() -> None:
    queues = RunQueues()
    for run in range(9):
        queues.add(work(f"many{run}", rows([4] * 100), f"r{run}", "many"))
    queues.add(work("one", rows([4] * 100), "r", "one"))
    served = {"many": 0, "one": 0}
    for _ in range(10):
        for pick in queues.next_batch(BUDGET):
            served[pick.work.tenant] += tokens(pick)
    assert served["many"] == served["one"]


def test_consecutive_forward_backwards_are_open_together() -> None:
    queues = RunQueues()
    for number in range(3):
        queues.add(work(str(number), rows([4, 4])))
    queues.add(work("step", STEP))
    queues.add(work("after", rows([4])))
    assert [pick.work.id for pick in queues.next_batch(BUDGET)] == ["0", "1", "2"]
    assert not queues.next_batch(BUDGET)
    for number in (2, 0, 1):
        assert not list(queues.barriers())
        queues.finish(str(number))
    assert [w.id for w in queues.barriers()] == ["step"]
    queues.finish("step")
    assert [pick.work.id for pick in queues.next_batch(BUDGET)] == ["after"]


def test_longest_rows_go_first_and_a_row_over_the_budget_goes_alone() -> None:
    queues = RunQueues()
    queues.add(work("0", rows([3, 200, 5])))
    assert queues.next_batch(BUDGET)[0].rows == (1,)
    assert queues.next_batch(BUDGET)[0].rows == (2, 0)


def test_works_that_learn_share_a_bound_of_memory_as_well() -> None:
    queues = RunQueues()
    for i in range(5):
        queues.add(work(f"w{i}", rows([1], backward=i != 3), "r", "t"))
    got: list[list[str]] = []
    while picks := queues.next_batch(BUDGET, bytes_of=lambda _: 10, most_bytes=25):
        got.append([pick.work.id for pick in picks])
    assert got == [["w0", "w1"], ["w2", "w3", "w4"]]


def test_a_single_work_may_exceed_the_bound_of_memory() -> None:
    queues = RunQueues()
    queues.add(work("w", rows([1, 1]), "r", "t"))
    (pick,) = queues.next_batch(BUDGET, bytes_of=lambda _: 10, most_bytes=5)
    assert pick.rows == (0, 1)


def test_cancel_takes_everything_out_and_leaves_others() -> None:
    queues = RunQueues()
    queues.add(work("open", rows([40, 40]), "r1"))
    queues.add(work("step", STEP, "r1"))
    queues.add(work("other", rows([40]), "r2"))
    queues.next_batch(BUDGET)
    assert [w.id for w in queues.cancel(RunId("r1"))] == ["open", "step"]
    assert queues.cancel(RunId("r1")) == []
    assert [pick.work.id for pick in queues.next_batch(BUDGET)] == ["other"]
    queues.finish("other")
    assert len(queues) == 0
    assert not queues.has_rows


def test_misuse_is_refused() -> None:
    queues = RunQueues()
    queues.add(work("0", STEP))
    queues.add(work("1", STEP))
    with pytest.raises(ValueError, match="queued already"):
        queues.add(work("1", STEP))
    with pytest.raises(ValueError, match="has not come"):
        queues.finish("1")


def test_short_data_of_a_custom_loss_count_for_more() -> None:
    """Their loss is evaluated one by one, which takes its time for a single token too."""
    loss = CustomLoss(id="l", name="l", ranks={"logprobs": 1}, graph="{}")
    queues = RunQueues()
    queues.add(work("custom", replace(rows([1] * 100), loss=loss), run="a", tenant="a"))
    queues.add(work("other", rows([64] * 4), run="b", tenant="b"))
    picks = queues.next_batch(512)
    assert {pick.work.id: len(pick.rows) for pick in picks} == {"custom": 4, "other": 4}
