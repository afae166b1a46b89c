"""Any number of runs in little memory: they leave and come back as they were, and all get on."""

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.trainer.driver import ADAM, Driver, batch, expect
from tests.trainer.test_numerics import same
from twinkle_dask.errors import HostLost, InvalidRequest, NotFound
from twinkle_dask.model.base import BaseModel
from twinkle_dask.trainer.engine import Trainer, TrainerConfig
from twinkle_dask.trainer.optimizer import Moments
from twinkle_dask.trainer.paging import Pager, PagingConfig
from twinkle_dask.trainer.run import Buffers
from twinkle_dask.trainer.work import CreateRun, ExportState, LoadState, Outcome, WorkBody
from twinkle_dask.types import LoraSpec, OptimStep, RunId, RunState

SPEC = LoraSpec(rank=2, seed=1)
PATIENCE_S = 20.0


class Limited(Driver):
    """A driver whose trainer may have to wait for its files."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        super().__init__(trainer)
        self.folder = folder
        self._moved = threading.Event()
        self._submitted: set[str] = set()
        trainer.on_moved(self._moved.set)

    def submit(self, run: str, body: WorkBody, tenant: str = "tenant") -> str:
        work_id = super().submit(run, body, tenant)
        self._submitted.add(work_id)
        return work_id

    def until(self, done: Callable[[], bool]) -> None:
        """Step until something holds; waits while there is nothing to step for."""
        while not done():
            self._moved.clear()
            if self.trainer.busy:
                self.take()
            else:
                assert self._moved.wait(PATIENCE_S), "nothing moves any more"

    def forget(self, works: set[str]) -> None:
        """Work that was cancelled; nothing will come of it."""
        self._submitted -= works

    def drain(self) -> dict[str, Outcome]:
        self.until(lambda: self._submitted <= self.outcomes.keys())
        return super().drain()

    def settle(self) -> None:
        """Step as long as something moves within a moment."""
        while self.trainer.busy or self._moved.wait(0.2):
            self._moved.clear()
            self.take()

    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


def full_bytes(base: BaseModel, spec: LoraSpec = SPEC) -> int:
    """What a run counts while it works, on a float32 base."""
    return 28 * sum(
        spec.rank * (target.in_features + target.out_features) for target in base.targets(spec)
    )


@contextmanager
def limited(
    base: BaseModel, folder: Path, runs: float, tokens_per_micro_batch: int = 64
) -> Generator[Limited]:
    """A trainer with room for so many runs that work."""
    folder.mkdir()
    paging = PagingConfig(folder=folder, device_bytes=int(runs * full_bytes(base)))
    trainer = Trainer(base, config(tokens_per_micro_batch), paging)
    try:
        yield Limited(trainer, folder)
    finally:
        trainer.close()
        assert not folder.exists()


def config(tokens_per_micro_batch: int = 64) -> TrainerConfig:
    return TrainerConfig(tokens_per_micro_batch=tokens_per_micro_batch, lanes=1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Of the trainer's own folder; ``limited`` makes it."""
    return tmp_path / "runs"


def unlimited(base: BaseModel) -> Driver:
    return Driver(Trainer(base, config()))


def same_run(actual: RunState, expected: RunState) -> None:
    """Weights, moments, step count and gradients, bit for bit."""
    same(actual, expected)
    for one, other in (
        (actual.adapter.weights, expected.adapter.weights),
        (actual.gradients or {}, expected.gradients or {}),
    ):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].tobytes() == other[name].tobytes()


# The pager by itself.


@pytest.mark.parametrize("host_floats", [None, 0, 10, 1000])
@pytest.mark.parametrize(("moments", "gradient"), [(False, False), (True, False), (True, True)])
def test_what_went_out_comes_back(
    tmp_path: Path, host_floats: int | None, moments: bool, gradient: bool
) -> None:
    """Through files, or through another memory and then files; all bits, NaN among them."""

    def some(size: int, seed: int) -> torch.Tensor:
        bits = np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint32)
        return torch.from_numpy(bits.view(np.float32))  # pyright: ignore[reportUnknownMemberType]

    def bits(buffers: Buffers) -> list[bytes]:
        return [tensor.numpy().tobytes() for tensor in buffers.tensors]

    folder = tmp_path / "runs"
    folder.mkdir()
    host_bytes = None if host_floats is None else 4 * host_floats
    pager = Pager(
        PagingConfig(folder=folder, device_bytes=1, host_bytes=host_bytes), torch.device("cpu")
    )
    try:
        sizes = (0, 1, 7, 300)
        runs = [
            Buffers(
                some(size, 1),
                Moments(5, some(size, 2), some(size, 3)) if moments else None,
                some(size, 4) if gradient else None,
            )
            for size in sizes
        ]
        before = [bits(run) for run in runs]
        paged = [pager.page_out(run) for run in runs]
        for future, expected in zip(paged, before, strict=True):
            back = pager.page_in(future.result()).result()
            assert bits(back) == expected
            assert (None if back.moments is None else back.moments.step) == (5 if moments else None)
        assert not list(folder.iterdir())
    finally:
        pager.close()


def test_the_hosts_memory_takes_what_fits_and_files_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    pager = Pager(PagingConfig(folder=folder, device_bytes=1, host_bytes=800), torch.device("cpu"))
    try:
        paged = [pager.page_out(Buffers(torch.ones(100))).result() for _ in range(4)]
        assert [one.file is None for one in paged] == [False, False, True, True]
        for one in paged[1:3]:
            pager.discard(one)
        assert pager.page_in(paged[0]).result().weights.sum() == 100
        assert pager.page_in(paged[3]).result().weights.sum() == 100
    finally:
        pager.close()


# A trainer with little room.


def test_runs_leave_and_come_back_bit_for_bit(base: BaseModel, place: Path) -> None:
    """Before the first step, with moments, and with a gradient that was not spent."""
    rng = np.random.default_rng(0)
    bodies = [batch(rng) for _ in range(3)]
    free = unlimited(base)
    with limited(base, place, runs=1.5) as tight:
        for driver in (free, tight):
            for number in range(6):
                driver.create(f"r{number}", replace(SPEC, seed=number))
            for number in range(1, 6):
                driver.forward_backward(f"r{number}", bodies[0])
            for number in range(2, 6):
                driver.step(f"r{number}")
            for number in range(3, 6):
                driver.forward_backward(f"r{number}", bodies[1])
            driver.step("r5")
            driver.forward_backward("r5", bodies[2])
        assert tight.files()
        for number in range(6):
            same_run(tight.state(f"r{number}"), free.state(f"r{number}"))


_Action = tuple[int, str, int]


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    actions=st.lists(
        st.tuples(
            st.integers(0, 6),
            st.sampled_from(["train", "forward", "step", "export", "pause", "drop"]),
            st.integers(0, 3),
        ),
        max_size=40,
    ),
    room=st.sampled_from([1.0, 1.3, 2.0, 3.7]),
)
def test_what_a_run_computes_does_not_depend_on_room(
    base: BaseModel, tmp_path_factory: pytest.TempPathFactory, actions: list[_Action], room: float
) -> None:
    """Random work of seven runs of three tenants, pipelined; each against itself alone.

    Rows go alone, since the sums of a mixed pass may be rounded otherwise than those of another.
    """
    place = tmp_path_factory.mktemp("residency") / "runs"
    fresh = count()
    names = {number: f"r{number}" for number in range(7)}
    alone = Driver(Trainer(base, config(1)))
    pairs: list[tuple[str, str]] = []
    with limited(base, place, room, tokens_per_micro_batch=1) as tight:

        def submit(number: int, body: WorkBody) -> None:
            name, tenant = names[number], f"tenant{number % 3}"
            pairs.append((tight.submit(name, body, tenant), alone.submit(name, body, tenant)))

        for number in range(7):
            submit(number, CreateRun(spec=replace(SPEC, seed=number)))
        for number, action, extra in actions:
            rng = np.random.default_rng(extra)
            match action:
                case "train":
                    submit(number, batch(rng, lengths=(4, 7)[: 1 + extra % 2]))
                case "forward":
                    submit(number, batch(rng, lengths=(5,), backward=False))
                case "step":
                    submit(number, OptimStep(adam=ADAM))
                case "export":
                    submit(number, ExportState(gradients=True, optimizer=True))
                case "pause":
                    tight.drain()
                case _:
                    alone.drain()
                    gone = RunId(names[number])
                    left = set(tight.trainer.drop_run(gone))
                    tight.forget(left)
                    pairs = [pair for pair in pairs if pair[0] not in left]
                    alone.trainer.drop_run(gone)
                    names[number] = f"r{number}.{next(fresh)}"
                    submit(number, CreateRun(spec=replace(SPEC, seed=number + 10)))
        for number in range(7):
            submit(number, ExportState(gradients=True, optimizer=True))
        tight.drain()
        alone.drain()
        for actual, expected in pairs:
            equal(tight.outcomes[actual], alone.outcomes[expected])


def equal(actual: Any, expected: Any) -> None:
    """Two outcomes, bit for bit."""
    if isinstance(expected, RunState):
        same_run(actual, expected)
        return
    assert type(actual) is type(expected)
    if hasattr(expected, "metrics"):
        assert actual.metrics == expected.metrics
    if hasattr(expected, "logprobs"):
        for one, other in zip(actual.logprobs, expected.logprobs, strict=True):
            assert one.tobytes() == other.tobytes()


def test_a_loaded_state_needs_room_as_well(base: BaseModel, place: Path) -> None:
    driver = unlimited(base)
    driver.create("a", SPEC)
    driver.forward_backward("a", batch(np.random.default_rng(0)))
    driver.step("a")
    saved = driver.state("a")
    with limited(base, place, runs=1) as tight:
        for number in range(4):
            tight.load(f"r{number}", saved)
        assert len(tight.files()) == 3
        for number in range(4):
            same_run(tight.state(f"r{number}"), saved)
        tight.load("r1", saved)
        same_run(tight.state("r1"), saved)


def test_a_run_that_is_too_large_alone_is_refused(base: BaseModel, place: Path) -> None:
    large = replace(SPEC, rank=8)
    driver = unlimited(base)
    driver.create("a", large)
    saved = driver.state("a")
    with limited(base, place, runs=2) as tight:
        outcome = tight.do("r", CreateRun(spec=large))
        assert isinstance(outcome, InvalidRequest)
        assert str(full_bytes(base, large)) in outcome.message
        assert str(2 * full_bytes(base)) in outcome.message
        assert "engine.adapter_bytes" in outcome.message
        read: Future[RunState] = Future()
        read.set_result(saved)
        outcome = tight.do("r", LoadState(state=read, with_optimizer=True))
        assert "engine.adapter_bytes" in str(outcome)
        assert isinstance(tight.do("r", OptimStep(adam=ADAM)), NotFound)
        assert tight.trainer.runs() == ()
        tight.create("r", SPEC)


def test_each_lane_counts_a_gradient_of_its_own(base: BaseModel, place: Path) -> None:
    place.mkdir()
    paging = PagingConfig(folder=place, device_bytes=1)
    trainer = Trainer(base, TrainerConfig(threads=3, lanes=3), paging)
    try:
        refused = Limited(trainer, place).do("r", CreateRun(spec=SPEC))
        assert f"needs {full_bytes(base) * (28 + 2 * 4) // 28} bytes" in str(refused)
    finally:
        trainer.close()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_run_that_adapts_nothing_of_this_model_is_refused(
    base: BaseModel, place: Path, monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    """At its turn, like any other: nobody else notices."""
    nothing = replace(SPEC, train_unembed=False)
    driver = unlimited(base)
    driver.create("a", nothing)
    saved = driver.state("a")
    real = type(base).families

    def families(self: BaseModel, spec: LoraSpec) -> Any:
        if not spec.train_unembed:
            raise InvalidRequest("nothing to adapt")
        return real(self, spec)

    monkeypatch.setattr(type(base), "families", families)
    with limited(base, place, runs=1) as tight:
        tight.create("a", SPEC)
        read: Future[RunState] = Future()
        read.set_result(saved)
        body = LoadState(state=read, with_optimizer=True) if loaded else CreateRun(spec=nothing)
        outcome = tight.do("b", body)
        assert isinstance(outcome, InvalidRequest)
        assert "nothing to adapt" in outcome.message
        tight.step("a")


def test_a_run_without_work_keeps_its_buffers_alone(base: BaseModel) -> None:
    """Neither copies in the computation's dtype nor views."""
    driver = unlimited(base)
    for name in "ab":
        driver.create(name, SPEC)
    driver.forward_backward("a", batch(np.random.default_rng(0)))
    driver.step("a")
    residency: Any = driver.trainer._residency  # pyright: ignore[reportPrivateUsage]
    a, b = residency._slots["a"].run, residency._slots["b"].run
    assert a._adapter is None
    assert a._layout is b._layout
    assert a.buffers.num_bytes == 12 * a._layout.size
    assert b.buffers.num_bytes == 4 * b._layout.size


# Who waits.


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written until the event is set."""
    go = threading.Event()
    real: Any = Pager._write  # pyright: ignore[reportPrivateUsage]

    def write(*args: Any) -> None:
        assert go.wait(PATIENCE_S)
        real(*args)

    monkeypatch.setattr(Pager, "_write", write)
    yield go
    go.set()


def test_who_waits_for_room_is_named_and_then_gets_it(
    base: BaseModel, place: Path, stalled: threading.Event
) -> None:
    with limited(base, place, runs=1) as tight:
        tight.create("a", SPEC)
        created = tight.submit("b", CreateRun(spec=SPEC))
        behind = tight.submit("b", OptimStep(adam=ADAM))
        tight.settle()
        assert created not in tight.outcomes
        paused, reason = tight.trainer.paused()
        assert paused == ("b",)
        assert "engine.adapter_bytes" in reason
        assert not tight.trainer.busy
        stalled.set()
        assert tight.drain()[created] is None
        assert behind in tight.outcomes
        assert tight.trainer.paused()[0] == ()


def test_a_run_that_always_has_work_lets_others_on(base: BaseModel, place: Path) -> None:
    """Its queue is never empty, yet the others end long before it."""
    rng = np.random.default_rng(0)
    with limited(base, place, runs=1) as tight:
        for name in ("busy", "forward", "late"):
            tight.create(name, SPEC)
        for _ in range(30):
            tight.submit("busy", batch(rng, lengths=(6,)))
            tight.submit("busy", OptimStep(adam=ADAM))
            tight.submit("forward", batch(rng, lengths=(6,), backward=False))
        late = [tight.submit("late", OptimStep(adam=ADAM), "other") for _ in range(2)]
        tight.until(lambda: set(late) <= tight.outcomes.keys())
        assert len(tight.outcomes) < 50
        tight.drain()


def test_a_tenant_with_many_runs_does_not_keep_another_out(base: BaseModel, place: Path) -> None:
    rng = np.random.default_rng(0)
    with limited(base, place, runs=2) as tight:
        for number in range(20):
            tight.submit(f"many{number}", CreateRun(spec=SPEC), "many")
            tight.submit(f"many{number}", batch(rng, lengths=(6,)), "many")
        one = tight.submit("one", CreateRun(spec=SPEC), "one")
        tight.until(lambda: one in tight.outcomes)
        assert len(tight.outcomes) < 10
        tight.drain()


# What fails.


def remove(file: Path) -> None:
    file.unlink()


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("how", [remove, shorten, damage])
def test_a_run_that_cannot_be_read_back_is_lost_alone(
    base: BaseModel, place: Path, how: Callable[[Path], object]
) -> None:
    """Its work ends as on a host that is gone, so that it is set up again from the journal."""
    with limited(base, place, runs=1) as tight:
        for name in "abc":
            tight.create(name, SPEC)
        how(tight.files()[0])  # a's, which left first
        lost = [tight.submit("a", OptimStep(adam=ADAM)) for _ in range(2)]
        fine = tight.submit("b", OptimStep(adam=ADAM))
        outcomes = tight.drain()
        assert all(isinstance(outcomes[work_id], HostLost) for work_id in lost)
        assert not isinstance(outcomes[fine], Exception)
        assert isinstance(tight.do("a", OptimStep(adam=ADAM)), HostLost)
        assert set(tight.trainer.runs()) == {"b", "c"}
        tight.trainer.drop_run(RunId("a"))
        tight.create("a", SPEC)
        tight.step("a")


def test_a_full_disk_keeps_runs_in_memory(
    base: BaseModel,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Those who are there go on, others wait; all is well once there is room again."""
    real: Any = Pager._write  # pyright: ignore[reportPrivateUsage]
    full = True

    def write(*args: Any) -> None:
        if full:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(Pager, "_write", write)
    monkeypatch.setattr("twinkle_dask.trainer.residency._RETRY_S", 0.5)
    with limited(base, place, runs=1) as tight:
        tight.create("a", SPEC)
        waits = tight.submit("b", CreateRun(spec=SPEC))
        tight.settle()
        assert waits not in tight.outcomes
        here = tight.submit("a", batch(np.random.default_rng(0)))
        tight.until(lambda: here in tight.outcomes)
        paused, reason = tight.trainer.paused()
        assert paused == ("b",)
        assert "engine.adapter_bytes" in reason
        assert "No space left" in caplog.text
        full = False
        assert tight.drain()[waits] is None


def test_a_state_that_cannot_be_read_leaves_no_place_taken(base: BaseModel, place: Path) -> None:
    with limited(base, place, runs=1) as tight:
        tight.create("a", SPEC)
        broken: Future[RunState] = Future()
        load = tight.submit("b", LoadState(state=broken, with_optimizer=True))
        behind = tight.submit("b", OptimStep(adam=ADAM))
        tight.settle()
        assert not tight.trainer.busy
        broken.set_exception(InvalidRequest("half a file"))
        outcomes = tight.drain()
        assert isinstance(outcomes[load], InvalidRequest)
        assert isinstance(outcomes[behind], NotFound)
        expect(tight.do("a", ExportState(gradients=True, optimizer=True)), RunState)


def test_a_run_that_the_device_has_no_memory_for_waits(
    base: BaseModel, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it has a place by the count. Others go on, idle ones leave for it."""
    real: Any = torch.empty
    full = False

    def empty(*args: Any, **options: Any) -> torch.Tensor:
        if full:
            raise torch.OutOfMemoryError("out of memory")
        return real(*args, **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr("twinkle_dask.trainer.residency._RETRY_S", 0.5)
    with limited(base, place, runs=1.15) as tight:
        for name in "abc":
            tight.create(name, SPEC)
        tight.settle()
        assert tight.files()
        full = True
        waits = tight.submit("a", OptimStep(adam=ADAM))
        here = tight.submit("c", OptimStep(adam=ADAM))
        tight.until(lambda: here in tight.outcomes)
        tight.settle()
        assert waits not in tight.outcomes
        paused, reason = tight.trainer.paused()
        assert paused == ("a",)
        assert "no memory left" in reason
        full = False
        assert not isinstance(tight.drain()[waits], Exception)
        assert tight.trainer.paused()[0] == ()


@pytest.mark.parametrize("bounded", [False, True])
def test_all_is_forgotten_also_what_does_not_exist_yet(
    base: BaseModel, place: Path, bounded: bool
) -> None:
    """Runs that wait for a place, for their state, or for their turn."""
    place.mkdir()
    paging = PagingConfig(folder=place, device_bytes=full_bytes(base)) if bounded else None
    trainer = Trainer(base, config(), paging)
    try:
        driver = Limited(trainer, place)
        driver.create("here", SPEC)
        gone = {
            driver.submit("here", batch(np.random.default_rng(0))),
            driver.submit("unread", LoadState(state=Future(), with_optimizer=True)),
            driver.submit("next", CreateRun(spec=SPEC)),
            driver.submit("nobody", OptimStep(adam=ADAM)),
        }
        before = set(driver.outcomes)
        trainer.forget_all()
        driver.settle()
        assert set(driver.outcomes) == before
        assert not trainer.busy
        assert trainer.runs() == ()
        driver.forget(gone)
        for name in ("here", "unread", "next"):
            driver.create(name, SPEC)
    finally:
        trainer.close()


def test_dropping_runs_leaves_no_files(base: BaseModel, place: Path) -> None:
    """Wherever they are: here, on their way, or away."""
    with limited(base, place, runs=1.2) as tight:
        for number in range(8):
            tight.create(f"r{number}", SPEC)
        assert tight.files()
        for number in range(3):
            tight.submit(f"r{number}", OptimStep(adam=ADAM))
        tight.take()
        for number in range(8):
            tight.forget(set(tight.trainer.drop_run(RunId(f"r{number}"))))
        tight.settle()
        assert tight.trainer.runs() == ()
        tight.create("r", SPEC)
        tight.settle()
        assert not tight.files()
