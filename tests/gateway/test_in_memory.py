"""The stand-in takes what the real service takes."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gateway.in_memory import InMemoryService
from twinkle_dask.operations.audit import Audit
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.copying import Copying
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.samplers import Samplers
from twinkle_dask.operations.sampling import Sampling
from twinkle_dask.operations.searching import Searching
from twinkle_dask.operations.service import Service
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.tenants import Tenants
from twinkle_dask.operations.traces import Traces
from twinkle_dask.operations.training import Training
from twinkle_dask.operations.usage import Usage

PARTS = {
    "tenants": Tenants,
    "catalogue": Catalogue,
    "sessions": Sessions,
    "runs": Runs,
    "training": Training,
    "samplers": Samplers,
    "sampling": Sampling,
    "checkpoints": Checkpoints,
    "audit": Audit,
    "usage": Usage,
    "searching": Searching,
    "traces": Traces,
    "copying": Copying,
}
world = InMemoryService()


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("part", list(PARTS))
def test_same_parameters(part: str) -> None:
    stand_ins: SimpleNamespace = getattr(world, part)
    for name, stand_in in stand_ins.__dict__.items():
        real = getattr(PARTS[part], name)
        assert parameters(stand_in) == parameters(real), name
        assert inspect.iscoroutinefunction(stand_in) == inspect.iscoroutinefunction(real), name


@pytest.mark.parametrize("name", ["finish_session", "outcome"])
def test_same_parameters_of_the_whole(name: str) -> None:
    assert parameters(getattr(world, name)) == parameters(getattr(Service, name))
