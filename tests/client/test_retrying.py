from collections.abc import Callable

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.client.conftest import Connect, Handler
from twinkle_dask_client import RetryPolicy, ServiceFault, TryLater, Unreachable
from twinkle_dask_client.calls.base import Call
from twinkle_dask_client.calls.service import health
from twinkle_dask_client.models import Health
from twinkle_dask_client.retrying import Attempts

OK = httpx.Response(200, json={"status": "ok"})
BUSY = httpx.Response(503, json={"detail": "busy"})

Outcome = httpx.Response | Exception


def answering(*outcomes: Outcome) -> tuple[Handler, Callable[[], int]]:
    """A handler that gives these one after the other, and how many were asked for."""
    given = iter(outcomes)
    count = 0

    def answer(_: httpx.Request) -> httpx.Response:
        nonlocal count
        count += 1
        outcome = next(given)
        if isinstance(outcome, Exception):
            raise outcome
        return httpx.Response(outcome.status_code, content=outcome.content)

    return answer, lambda: count


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("slow"),
        httpx.ReadTimeout("silent"),
        httpx.ReadError("dropped"),
        httpx.RemoteProtocolError("closed without a reply"),
        httpx.Response(429),
        BUSY,
    ],
    ids=repr,
)
def test_passing_failures_are_tried_again(connect: Connect, failure: Outcome) -> None:
    answer, count = answering(failure, failure, OK)
    connect(answer).health()
    assert count() == 3


def test_attempts_end_with_the_last_error(connect: Connect) -> None:
    answer, count = answering(httpx.ConnectError("refused"), BUSY, BUSY, OK)
    with pytest.raises(TryLater, match="busy"):
        connect(answer).health()
    assert count() == 3


def test_no_reply_says_why_and_how_often(connect: Connect) -> None:
    answer, _ = answering(*[httpx.ConnectError("refused")] * 3)
    with pytest.raises(
        Unreachable, match=r"No reply from http://service.test \(3 attempts\): refused"
    ):
        connect(answer).health()


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (httpx.Response(500), ServiceFault),
        (httpx.UnsupportedProtocol("ftp"), Unreachable),
    ],
    ids=repr,
)
def test_what_time_does_not_help_is_told_at_once(
    connect: Connect, failure: Outcome, kind: type[Exception]
) -> None:
    answer, count = answering(failure, OK)
    with pytest.raises(kind):
        connect(answer).health()
    assert count() == 1


def test_what_changes_something_is_repeated_only_if_it_cannot_have_begun() -> None:
    post = Call(method="POST", path="optim_step", reply=Health)
    with pytest.raises(TryLater):
        Attempts(post, RetryPolicy()).after_reply(BUSY)
    with pytest.raises(Unreachable):
        Attempts(post, RetryPolicy()).after_error(httpx.ReadError("dropped"))
    assert Attempts(post, RetryPolicy()).after_error(httpx.ConnectError("refused")) > 0
    assert Attempts(post, RetryPolicy()).after_reply(httpx.Response(429)) is not None


def test_the_services_wish_is_the_pause() -> None:
    reply = httpx.Response(429, headers={"retry-after": "7"})
    assert Attempts(health(), RetryPolicy()).after_reply(reply) == 7.0


def test_a_wish_beyond_our_patience_is_an_error() -> None:
    reply = httpx.Response(429, headers={"retry-after": "31"})
    with pytest.raises(TryLater) as caught:
        Attempts(health(), RetryPolicy(longest_pause_s=30)).after_reply(reply)
    assert caught.value.retry_after_s == 31


def test_pauses_double_up_to_the_longest() -> None:
    policy = RetryPolicy(attempts=9, first_pause_s=1, longest_pause_s=5)
    attempts = Attempts(health(), policy, jitter=lambda: 0.0)
    assert [attempts.after_reply(BUSY) for _ in range(5)] == [1, 2, 4, 5, 5]


@given(attempt=st.integers(1, 1000), jitter=st.floats(0, 1, exclude_max=True))
def test_jitter_takes_off_a_half_at_most(attempt: int, jitter: float) -> None:
    policy = RetryPolicy(first_pause_s=0.25, longest_pause_s=30)
    full_s = policy.pause_s(attempt, 0.0)
    assert full_s / 2 <= policy.pause_s(attempt, jitter) <= full_s <= 30
