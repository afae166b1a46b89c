"""How rows are cut into slices, and what runs where."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask.trainer.lanes import Lanes, slices


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=30), count=st.integers(1, 4))
def test_each_row_once_in_order_and_no_slice_empty(lengths: list[int], count: int) -> None:
    cut = slices(lengths, count)
    assert sorted(i for rows in cut for i in rows) == list(range(len(lengths)))
    assert all(rows and rows == sorted(rows) for rows in cut)
    assert len(cut) <= count


@given(length=st.integers(1, 100), each=st.integers(1, 8), count=st.integers(1, 4))
def test_equal_rows_are_shared_out_evenly_in_neighbours(length: int, each: int, count: int) -> None:
    cut = slices([length] * (each * count), count)
    assert [len(rows) for rows in cut] == [each] * count
    assert [i for rows in cut for i in rows] == list(range(each * count))


def test_an_uneven_batch_is_balanced() -> None:
    cut = slices([400, 10, 390, 20], 2)
    assert sorted(sum([400, 10, 390, 20][i] for i in rows) for rows in cut) == [410, 410]


def test_one_giant_row_leaves_the_others_a_slice_only_if_that_helps() -> None:
    assert slices([1000, 1], 2) == [[0, 1]]
    assert len(slices([600, 200, 200], 2)) == 2


def test_small_passes_are_not_cut() -> None:
    lanes = Lanes(threads=2, count=2, least_tokens=64)
    assert len(lanes.cut([32, 32, 32])) == 1
    assert len(lanes.cut([64, 64])) == 2
    lanes.close()


def test_calls_run_side_by_side_with_a_share_of_the_threads() -> None:
    lanes = Lanes(threads=4, count=2)
    meet = threading.Barrier(2, timeout=30)

    def call(number: int) -> tuple[int, int, str]:
        meet.wait()
        return number, torch.get_num_threads(), threading.current_thread().name

    results = lanes.run([(call, 0), (call, 1)])
    assert [number for number, _, _ in results] == [0, 1]
    assert [threads for _, threads, _ in results] == [2, 2]
    assert all(name.startswith("lane") for _, _, name in results)
    lanes.close()


def test_a_failure_is_raised_after_all_have_ended() -> None:
    lanes = Lanes(threads=2, count=2)
    ended: list[int] = []

    def fail() -> None:
        raise ValueError("made by the test")

    with pytest.raises(ValueError, match="made by the test"):
        lanes.run([(fail,), (ended.append, 1)])
    assert ended == [1]
    lanes.close()


def test_more_calls_than_lanes_share_the_threads_by_lane() -> None:
    lanes = Lanes(threads=4, count=2)
    assert lanes.run([(torch.get_num_threads,)] * 5) == [2] * 5
    lanes.close()
