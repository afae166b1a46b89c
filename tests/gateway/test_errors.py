import pickle
from collections.abc import Iterator

import httpx
import pytest
import structlog

from tests.gateway.in_memory import InMemoryService
from twinkle_dask import errors
from twinkle_dask_gateway.tinker.errors import STATUS, describe, error_response
from twinkle_dask_gateway.twinkle import errors as twinkle

# The SDK repeats these for minutes, so only what passes with time may have them.
REPEATED = {408, 409, 429, 500, 502, 503, 504}


def leaves(cls: type[errors.TwinkleDaskError]) -> Iterator[type[errors.TwinkleDaskError]]:
    subclasses = cls.__subclasses__()
    if not subclasses:
        yield cls
    for subclass in subclasses:
        yield from leaves(subclass)


ours = [leaf for leaf in leaves(errors.TwinkleDaskError) if leaf.__module__ == errors.__name__]


@pytest.mark.parametrize("leaf", ours, ids=lambda leaf: leaf.__name__)
def test_every_failure_has_a_status_and_pickles(leaf: type[errors.TwinkleDaskError]) -> None:
    assert leaf in STATUS
    error = leaf("what happened")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.args, vars(again)) == (leaf, error.args, vars(error))
    response = error_response(error)
    assert response.status_code == STATUS[leaf]
    body = bytes(response.body)
    assert response.headers["content-length"] == str(len(body))
    assert b"what happened" in body
    if issubclass(leaf, errors.RequestError):
        assert response.status_code not in REPEATED


def test_the_tables_have_no_row_too_many() -> None:
    assert set(STATUS) == set(twinkle.STATUS) == set(ours)


@pytest.mark.parametrize("leaf", ours, ids=lambda leaf: leaf.__name__)
def test_the_twinkle_face_says_what_http_means(leaf: type[errors.TwinkleDaskError]) -> None:
    response = twinkle.error_response(leaf("what happened"))
    assert response.status_code == twinkle.STATUS[leaf]
    assert response.status_code != twinkle.EXHAUSTED  # its client would take it for an end
    assert b"what happened" in bytes(response.body)
    theirs = issubclass(leaf, errors.RequestError)
    assert (response.status_code < 500) == (theirs or leaf is errors.QuotaExceeded)
    assert ("retry-after" in response.headers) == issubclass(leaf, errors.CapacityError)


def test_findings_of_bodies_show_no_large_values() -> None:
    problem = {"type": "t", "loc": ("body", "x" * 100, 0), "msg": "m" * 1000}
    (short,) = twinkle.findings([{**problem, "input": "short"}])
    assert short["input"] == "short"
    assert len(str(short)) < 600
    (long,) = twinkle.findings([{**problem, "input": "x" * 1000}])
    (nested,) = twinkle.findings([{**problem, "input": {"a": 1}}])
    assert "input" not in long
    assert "input" not in nested
    assert len(twinkle.findings([problem] * 100)) == 10


def test_capacity_says_when_to_come_back() -> None:
    response = error_response(errors.Saturated("full", 2.5))
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")


def test_our_faults_carry_their_incident() -> None:
    assert b"abc123" in bytes(error_response(errors.HostLost("gone", "abc123")).body)
    assert b"incident" in bytes(error_response(errors.HostLost("gone")).body)


def test_a_fault_that_is_polled_for_twice_is_one_incident() -> None:
    fault = errors.StorageFailed("The disk is full.")
    with structlog.testing.capture_logs() as lines:
        told = {bytes(error_response(fault).body) for _ in range(2)}
    assert len(told) == len(lines) == 1
    assert lines[0]["incident"].encode() in told.pop()


def test_findings_are_few_and_short() -> None:
    problem = {"loc": ("a", 0), "msg": "Value error, " + "x" * 1000}
    text = describe([problem] * 5)
    assert text.startswith("a.0: xxx")
    assert text.endswith("(and 2 more)")
    assert len(text) < 1000


async def test_the_unexpected_is_answered_with_an_incident(
    client: httpx.AsyncClient, world: InMemoryService, run: str
) -> None:
    world.failure = RuntimeError("secret detail")
    response = await client.post("/optim_step", json={"model_id": run, "adam_params": {}})
    assert response.status_code == 500
    detail = response.json()["detail"]
    assert "incident" in detail
    assert "secret" not in detail


async def test_errors_are_whole_and_uncompressed(client: httpx.AsyncClient) -> None:
    for path in ("/get_info", "/nowhere", "/asample"):
        response = await client.post(path, json={}, headers={"accept-encoding": "gzip, zstd"})
        assert response.status_code in {400, 404}
        assert int(response.headers["content-length"]) > 0
        assert "content-encoding" not in response.headers
        assert isinstance(response.json()["detail"], str)
