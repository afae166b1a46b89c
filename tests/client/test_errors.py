import inspect
import pickle

import httpx
import pytest

import twinkle_dask_client
from tests.client.conftest import Connect
from twinkle_dask_client import (
    BadReply,
    ClientError,
    Gone,
    InvalidRequest,
    NotAuthenticated,
    NotFound,
    NotPermitted,
    RequestRefused,
    ServiceFault,
    TryLater,
    errors,
)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, BadReply),
        (400, InvalidRequest),
        (401, NotAuthenticated),
        (402, RequestRefused),
        (403, NotPermitted),
        (404, NotFound),
        (410, Gone),
        (422, InvalidRequest),
        (429, TryLater),
        (500, ServiceFault),
        (503, TryLater),
        (599, ServiceFault),
    ],
)
def test_each_status_has_its_error(connect: Connect, status: int, kind: type[ClientError]) -> None:
    service = connect(lambda _: httpx.Response(status, json={"detail": "why"}), attempts=1)
    with pytest.raises(ClientError) as caught:
        service.health()
    assert type(caught.value) is kind
    assert (str(caught.value), caught.value.status) == ("why", status)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"detail": "No such run."}', "No such run."),
        (
            b'{"detail": [{"loc": ["query", "limit"], "msg": "too large", "type": "x"},'
            b' {"loc": ["body", 0], "msg": "missing"}]}',
            "query.limit: too large; body.0: missing",
        ),
        (b'{"detail": ""}', "HTTP 404 Not Found"),
        (b'{"detail": {"no": "words"}}', "HTTP 404 Not Found"),
        (b"<h1>nginx</h1>", "HTTP 404 Not Found"),
        (b"", "HTTP 404 Not Found"),
        (b"\xff\xfe", "HTTP 404 Not Found"),
    ],
)
def test_message_is_the_services_words_or_the_status(body: bytes, message: str) -> None:
    assert str(errors.error_for(httpx.Response(404, content=body))) == message


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("2", 2.0), ("0.5", 0.5), ("0", 0.0), ("-1", None), ("nan", None), ("inf", None), ("x", None)],
)
def test_retry_after(header: str, seconds: float | None) -> None:
    error = errors.error_for(httpx.Response(429, headers={"retry-after": header}))
    assert isinstance(error, TryLater)
    assert error.retry_after_s == seconds


def all_errors() -> list[type[ClientError]]:
    found = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    return [kind for kind in found if issubclass(kind, ClientError)]


@pytest.mark.parametrize("kind", all_errors())
def test_errors_are_public_and_pickle(kind: type[ClientError]) -> None:
    assert kind.__name__ in twinkle_dask_client.__all__
    error = kind("what happened", 418)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert vars(again) == vars(error)


def test_try_later_keeps_its_seconds_through_pickle() -> None:
    again = pickle.loads(pickle.dumps(TryLater("busy", 429, 3.0)))
    assert again.retry_after_s == 3.0


def test_all_is_sorted() -> None:
    assert twinkle_dask_client.__all__ == sorted(twinkle_dask_client.__all__)
