"""What every failure promises, whatever its class; and what of it travels between processes."""

import pickle
from collections.abc import Iterator

import pytest

from twinkle_dask import errors, packing
from twinkle_dask.cluster.commands import Failure


def leaves(cls: type[errors.TwinkleDaskError]) -> Iterator[type[errors.TwinkleDaskError]]:
    if not (children := cls.__subclasses__()):
        yield cls
    for child in children:
        yield from leaves(child)


OURS = [leaf for leaf in leaves(errors.TwinkleDaskError) if leaf.__module__ == errors.__name__]
FAULTS = [leaf for leaf in OURS if issubclass(leaf, errors.ServiceFault)]
CAPACITY = [leaf for leaf in OURS if issubclass(leaf, errors.CapacityError)]
each = pytest.mark.parametrize("leaf", OURS, ids=lambda leaf: leaf.__name__)


@each
def test_a_failure_reads_as_its_message_and_pickles(leaf: type[errors.TwinkleDaskError]) -> None:
    error = leaf("What happened.")
    again = pickle.loads(pickle.dumps(error))
    assert str(error) == error.message == str(again) == "What happened."
    assert (type(again), again.args, vars(again)) == (leaf, error.args, vars(error))


def test_fields_pickle() -> None:
    filled = (
        errors.OutOfOrder("late", 7),
        errors.Saturated("full", 2.5),
        errors.HostLost("gone", "abc"),
    )
    for error in filled:
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), vars(again)) == (error.message, vars(error))


@each
def test_a_failure_travels_packed(leaf: type[errors.TwinkleDaskError]) -> None:
    failure: Failure = packing.unpack(packing.pack(Failure.of(leaf("What happened."))))
    assert (type(failure.error()), str(failure.error())) == (leaf, "What happened.")


@pytest.mark.parametrize("leaf", [*FAULTS, errors.ServiceFault], ids=lambda leaf: leaf.__name__)
def test_a_fault_keeps_its_incident_on_the_way(leaf: type[errors.ServiceFault]) -> None:
    incident = errors.new_incident()
    error = packing.unpack(packing.pack(Failure.of(leaf("Ours.", incident)))).error()
    assert (type(error), error.incident) == (leaf, incident)


@pytest.mark.parametrize("leaf", CAPACITY, ids=lambda leaf: leaf.__name__)
def test_when_to_come_back_is_told_on_the_way(leaf: type[errors.CapacityError]) -> None:
    error = packing.unpack(packing.pack(Failure.of(leaf("Later.", 7.5)))).error()
    assert (type(error), error.retry_after_s) == (leaf, 7.5)


def test_a_class_that_is_not_known_here_is_our_fault() -> None:
    error = Failure(kind="FromTheFuture", message="m", incident="i").error()
    assert (type(error), str(error)) == (errors.ServiceFault, "m")
