"""One tenant's things do not exist for another: no route tells them from what never existed."""

import string
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import requests
from worlds import CALLS, NEVER_DONE, OF_NOBODY, Call, Tenant

from tests.twinkle.conftest import KEY, OTHER_KEY

#: A call for each slot of each route.
ATTACKS = [
    (route, call, slot) for route, calls in CALLS.items() for call in calls for slot in call.slots
]


@pytest.fixture(scope="module")
def tenants(
    start_service: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Generator[tuple[Tenant, Tenant]]:
    """The one whose things are asked for, and the one who asks."""
    uploads: Path = tmp_path_factory.mktemp("uploads")
    with start_service(upload_roots=[str(uploads)]) as service:
        victim, stranger = Tenant(service.url, KEY), Tenant(service.url, OTHER_KEY)
        victim.settle("first")
        stranger.settle("other")
        victim.wait_for_uploads()
        yield victim, stranger


def test_every_route_is_looked_at(tenants: tuple[Tenant, Tenant]) -> None:
    """A new route is added to the calls, or to those that name nothing of a tenant's."""
    assert tenants[0].routes() == set(CALLS) | OF_NOBODY


def test_the_things_of_others_are_as_if_they_never_were(tenants: tuple[Tenant, Tenant]) -> None:
    victim, stranger = tenants
    told: list[str] = []
    for route, call, slot in ATTACKS:
        known, unknown = victim.has[slot], never(victim.has, slot)
        theirs = stranger.call(route, call, **{slot: known})
        nobodys = stranger.call(route, call, **{slot: unknown})
        what = f"{route} {call.body or ''} with {slot}"
        if theirs.status_code not in (400, 403, 404):
            told.append(f"{what}: {theirs.status_code} {theirs.text[:200]}")
        elif words(theirs, known) != words(nobodys, unknown):
            told.append(f"{what}: {words(theirs, known)} is not {words(nobodys, unknown)}")
    assert not told, "\n".join(told)


def test_another_tenants_whole_world_is_nobodys(tenants: tuple[Tenant, Tenant]) -> None:
    """Session, adapter and address all the first tenant's, as who has seen its traffic would."""
    victim, stranger = tenants
    unknown = {slot: never(victim.has, slot) for slot in victim.has}
    for route, calls in CALLS.items():
        for call in calls:
            theirs = stranger.call(route, call, **victim.has)
            nobodys = stranger.call(route, call, **unknown)
            assert theirs.status_code in (400, 403, 404), f"{route}: {theirs.text}"
            assert theirs.status_code == nobodys.status_code, f"{route}: {theirs.text}"


def test_lists_have_ones_own(tenants: tuple[Tenant, Tenant]) -> None:
    victim, stranger = tenants
    for route in OF_NOBODY - {"POST /api/v1/twinkle/create_session"}:
        answer = stranger.call(route, Call())
        assert answer.ok
        for slot, known in victim.has.items():
            assert known not in answer.text, f"{route} tells of the other's {slot}."


def test_the_calls_are_valid(tenants: tuple[Tenant, Tenant]) -> None:
    """Last, as it removes things: what was refused above works for whom it belongs to.

    So nothing was refused for another reason, and no attack has harmed anything.
    """
    victim, _ = tenants
    for route, calls in CALLS.items():
        for call in calls:
            answer = victim.call(route, call)
            if route in NEVER_DONE:
                assert 400 <= answer.status_code < 500
            else:
                assert answer.ok, f"{route} {call}: {answer.status_code} {answer.text}"


def never(has: dict[str, str], slot: str) -> str:
    """What has the form of a thing that a tenant has, and has never been."""
    known = has[slot]
    if has["run"] in known:
        return known.replace(has["run"], _changed(has["run"]))
    return _changed(known)


def _changed(known: str) -> str:
    # A digit stays a digit, for ids have a form.
    last = "1" if known[-1] == "0" else "0" if known[-1] in string.hexdigits else "x"
    return known[:-1] + last


def words(answer: requests.Response, named: str) -> tuple[int, str, str | None]:
    """An answer without what was named in it, or the run of the address that was."""
    text = answer.text.replace(named, "NAMED")
    if named.startswith("twinkle://"):
        text = text.replace(named.split("/")[2], "NAMED")
    return answer.status_code, text, answer.headers.get("content-type")
