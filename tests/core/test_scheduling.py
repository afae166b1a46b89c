"""The order within a run, under every interleaving."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask.errors import OutOfOrder
from twinkle_dask.scheduling import RunOrder

GRACE_S = 2.0


def order() -> RunOrder[str]:
    return RunOrder(1, GRACE_S)


@given(st.permutations(range(1, 9)), st.lists(st.booleans(), min_size=8, max_size=8))
def test_any_arrival_order_starts_in_seq_order(arrivals: list[int], looks: list[bool]) -> None:
    run = order()
    started: list[int] = []
    for seq, look in zip(arrivals, looks, strict=True):
        run.add(seq, str(seq), 0.0)
        if look:
            started += [at for at, _ in run.take(0.0)]
    started += [at for at, _ in run.take(0.0)]
    assert started == list(range(1, 9))


@given(
    st.sets(st.integers(1, 12), min_size=1),
    st.sets(st.integers(1, 12)),
    st.randoms(use_true_random=False),
)
def test_gaps_never_hang_and_nothing_starts_twice(
    come: set[int], refused: set[int], random: object
) -> None:
    refused = refused - come
    run = order()
    events = [(seq, True) for seq in come] + [(seq, False) for seq in refused]
    random.shuffle(events)  # type: ignore[attr-defined]
    started: list[int] = []
    for seq, comes in events:
        if comes:
            run.add(seq, str(seq), 0.0)
        else:
            run.refuse(seq, 0.0)
        started += [at for at, _ in run.take(0.0)]
    for _ in come:
        started += [at for at, _ in run.take(GRACE_S)]
    assert started == sorted(come)
    assert run.look_again_s(GRACE_S) is None


def test_a_refused_number_is_not_waited_for() -> None:
    run = order()
    run.refuse(1, 0.0)
    run.add(2, "b", 0.0)
    assert run.take(0.0) == [(2, "b")]


def test_an_absent_number_is_waited_for_while_somebody_sends() -> None:
    run = order()
    run.add(2, "b", 0.0)
    assert run.take(GRACE_S - 0.1) == []
    assert run.take(GRACE_S + 10, sending=True) == []
    assert run.take(GRACE_S) == [(2, "b")]


def test_a_stalled_upload_does_not_hold_a_run_for_ever() -> None:
    run = order()
    run.add(2, "b", 0.0)
    assert run.take(run.patience_s - 1, sending=True) == []
    assert run.take(run.patience_s, sending=True) == [(2, "b")]


def test_every_arrival_renews_the_patience() -> None:
    run = order()
    run.add(3, "c", 0.0)
    run.add(2, "b", 1.5)
    assert run.take(GRACE_S) == []
    assert run.look_again_s(GRACE_S) == pytest.approx(1.5)
    assert run.take(1.5 + GRACE_S) == [(2, "b"), (3, "c")]


def test_too_late_is_told_with_the_number_expected() -> None:
    run = order()
    run.add(2, "b", 0.0)
    run.take(GRACE_S)
    with pytest.raises(OutOfOrder) as caught:
        run.check(1)
    assert caught.value.expected_seq == 3


def test_a_waiting_number_is_known_and_taken() -> None:
    run = order()
    run.add(2, "b", 0.0)
    assert run.knows(2)
    assert not run.knows(1)
    with pytest.raises(OutOfOrder):
        run.add(2, "again", 0.0)


def test_a_request_without_number_goes_behind_everything() -> None:
    run = order()
    run.add(3, "c", 0.0)
    run.refuse(7, 0.0)
    assert run.free_seq() == 8
