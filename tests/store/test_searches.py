"""Searches for sessions, sums of storage, and what others may see of runs."""

from dataclasses import replace

import pytest

from tests.store.samples import ANN, BOB, at, checkpoint, run, session
from twinkle_dask.store.records import CheckpointKind, SessionState
from twinkle_dask.store.searches import SessionPlace, SessionQuery, StateQuery, Stored
from twinkle_dask.store.store import Store
from twinkle_dask.types import RunId, SessionId, TenantId

FINISHED = StateQuery(state=SessionState.FINISHED, reasons=("success",))


async def some(store: Store) -> None:
    """Three sessions of Ann (s0 is the oldest) and one of Bob."""
    metadata = {"color": "red", 'od"d.key': "x", "number": 3}
    for number, (name, project) in enumerate(
        [("Nightly run 100%", "p"), ("nightly", None), (None, "q")]
    ):
        one = session(f"s{number}", created_at=at(number))
        one = replace(one, display_name=name, project_id=project, user_metadata=metadata)
        await store.sessions.add(one)
        metadata = {"color": "blue"}
    await store.sessions.end(
        SessionId("s1"), SessionState.FINISHED, reason="success", detail=None, when=at(9)
    )
    await store.sessions.add(session("b0", tenant=BOB, created_at=at(9)))


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (SessionQuery(), ["s2", "s1", "s0"]),
        (SessionQuery(session=SessionId("s1")), ["s1"]),
        (SessionQuery(session=SessionId("b0")), []),
        (SessionQuery(name_words=("RUN", "night")), ["s0"]),
        (SessionQuery(name_words=("100%",)), ["s0"]),
        (SessionQuery(name_words=("%",)), ["s0"]),
        (SessionQuery(session=SessionId("s2"), name_words=("run",)), ["s2", "s0"]),
        (SessionQuery(projects=("p", "q")), ["s2", "s0"]),
        (SessionQuery(projects=()), []),
        (SessionQuery(metadata={"color": "blue"}), ["s2", "s1"]),
        (SessionQuery(metadata={"color": "red", 'od"d.key': "x"}), ["s0"]),
        (SessionQuery(metadata={"number": "3"}), ["s0"]),
        (SessionQuery(metadata={"color": "red", "none": "x"}), []),
        (SessionQuery(states=(StateQuery(state=SessionState.ACTIVE),)), ["s2", "s0"]),
        (SessionQuery(states=(FINISHED,)), ["s1"]),
        (SessionQuery(states=(replace(FINISHED, reasons=("errored",)),)), []),
        (SessionQuery(states=()), []),
        (SessionQuery(after=SessionPlace(at(1), SessionId("s1"))), ["s0"]),
        (SessionQuery(after=SessionPlace(at(1), SessionId("s0"))), ["s1", "s0"]),
    ],
)
async def test_sessions_are_found(store: Store, query: SessionQuery, found: list[str]) -> None:
    await some(store)
    assert [one.id for one in await store.searches.sessions(ANN, query, 10)] == found


async def test_named_checkpoints_that_are_alive_are_summed(store: Store) -> None:
    await some(store)
    for number in (0, 2):
        await store.runs.add(run(session=f"s{number}"))
        await store.checkpoints.add(checkpoint("a", run=f"s{number}:train:0"))
    await store.checkpoints.add(checkpoint("b", run="s2:train:0"))
    await store.checkpoints.add(checkpoint("old", run="s2:train:0", expires_at=at(0)))
    await store.checkpoints.add(checkpoint(None, run="s2:train:0", kind=CheckpointKind.SAMPLER))
    one, two = (Stored(num_checkpoints=n, num_bytes=n * 2**40) for n in (1, 2))
    sessions = [SessionId(f"s{number}") for number in range(3)]
    assert await store.searches.stored_by_session(sessions) == {"s0": one, "s2": two}
    assert await store.searches.stored_by_project(ANN, None) == {"p": one, "q": two}
    assert await store.searches.stored_by_project(ANN, "q") == {"q": two}
    assert await store.searches.stored_by_project(BOB, None) == {}


async def test_others_see_runs_with_a_published_checkpoint(store: Store) -> None:
    await some(store)
    runs = [replace(run(seq, session="s0"), created_at=at(seq)) for seq in range(3)]
    for one in runs:
        await store.runs.add(one)
    shown = checkpoint("shown", run="s0:train:1")
    await store.checkpoints.add(replace(shown, public=True, created_at=at(1)))
    await store.checkpoints.add(checkpoint("hidden", run="s0:train:1", created_at=at(2)))
    expired = checkpoint("gone", run="s0:train:2", expires_at=at(0))
    await store.checkpoints.add(replace(expired, public=True))

    async def listed(tenant: TenantId, *, project: str | None = None, all_: bool) -> list[str]:
        found, total = await store.sharing.runs(tenant, 10, 0, project=project, accessible=all_)
        assert total == len(found)
        return [one.id for one in found]

    assert await listed(BOB, all_=True) == ["s0:train:1"]
    assert await listed(BOB, all_=False) == []
    assert await listed(BOB, project="p", all_=True) == []
    assert len(await listed(ANN, all_=True)) == 3
    assert len(await listed(ANN, project="p", all_=True)) == 3
    assert await listed(ANN, project="q", all_=True) == []
    page, total = await store.sharing.runs(ANN, 1, 1, project=None, accessible=False)
    assert ([one.id for one in page], total) == (["s0:train:1"], 3)

    assert await store.sharing.run(BOB, RunId("s0:train:1")) is not None
    assert await store.sharing.run(BOB, RunId("s0:train:2")) is None
    latest = await store.sharing.latest_published([one.id for one in runs])
    assert [(key, found.name) for key, found in latest.items()] == [
        (("s0:train:1", CheckpointKind.TRAINING), "shown")
    ]
