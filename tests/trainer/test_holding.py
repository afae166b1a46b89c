"""Work of a run that is held keeps its place, and only what has begun goes on."""

from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.test_queues import BUDGET, STEP, rows, work
from twinkle_dask.trainer.queues import RunQueues
from twinkle_dask.types import RunId

R = RunId("r")


def picked(queues: RunQueues, budget: int = BUDGET) -> list[str]:
    return [pick.work.id for pick in queues.next_batch(budget)]


def test_nothing_of_a_held_run_begins() -> None:
    queues = RunQueues()
    queues.add(work("1", rows([5])))
    queues.hold(R)
    queues.add(work("2", rows([5])))
    queues.add(work("3", STEP))
    queues.add(work("4", rows([5]), run="other"))
    assert picked(queues) == ["4"]
    assert not queues.has_rows
    assert not queues.begun(R)
    queues.release(R)
    assert picked(queues) == ["1", "2"]
    assert queues.begun(R)


def test_a_barrier_of_a_held_run_waits() -> None:
    queues = RunQueues()
    queues.hold(R)
    queues.add(work("1", STEP))
    assert list(queues.barriers()) == []
    front = queues.front(R)
    assert front is not None
    assert front.id == "1"
    queues.release(R)
    assert [w.id for w in queues.barriers()] == ["1"]
    queues.finish("1")
    assert queues.front(R) is None


def test_what_has_begun_goes_on_and_a_restart_does_not() -> None:
    queues = RunQueues()
    queues.add(work("1", rows([BUDGET, BUDGET])))
    queues.add(work("2", rows([1])))
    assert picked(queues) == ["1"]
    queues.hold(R)
    assert picked(queues) == ["1"]
    assert not queues.has_rows
    queues.restart_alone("1")
    assert not queues.has_rows
    assert not queues.begun(R)
    queues.release(R)
    assert picked(queues) == ["1"]
    queues.hold(R)
    queues.finish("1")
    assert not queues.has_rows
    queues.release(R)
    assert picked(queues) == ["2"]


@given(
    moves=st.lists(
        st.tuples(
            st.sampled_from(["hold", "release", "take", "add", "cancel"]), st.sampled_from("abc")
        )
    )
)
def test_every_row_comes_out_once_however_often_its_run_was_held(
    moves: list[tuple[str, str]],
) -> None:
    queues = RunQueues()
    held: set[str] = set()
    left: dict[str, str] = {}
    for number, (move, run) in enumerate(moves):
        match move:
            case "hold":
                queues.hold(RunId(run))
                held.add(run)
            case "release":
                queues.release(RunId(run))
                held.discard(run)
            case "add":
                queues.add(work(str(number), rows([3]), run=run, tenant=f"of {run}"))
                left[str(number)] = run
            case "cancel":
                gone = {w.id for w in queues.cancel(RunId(run))}
                assert gone == {work_id for work_id, of in left.items() if of == run}
                left = {work_id: of for work_id, of in left.items() if of != run}
            case _:
                for work_id in picked(queues):
                    assert left.pop(work_id) not in held
                    queues.finish(work_id)
    for run in "abc":
        queues.release(RunId(run))
    while queues.has_rows:
        for work_id in picked(queues):
            del left[work_id]
            queues.finish(work_id)
    assert not left
    assert len(queues) == 0
