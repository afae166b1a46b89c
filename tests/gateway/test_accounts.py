"""Events, usage, searches and traces, as the wire has them."""

from datetime import date
from typing import Any

import httpx
import pytest

from tests.gateway.in_memory import MODEL, NOW, InMemoryService
from twinkle_dask.lifecycle import SessionState
from twinkle_dask.store.searches import SessionPlace, SessionQuery, StateQuery


async def test_events(client: httpx.AsyncClient, world: InMemoryService) -> None:
    params = {"event_type": "organizations", "day": "2026-11-22"}
    entries = (await client.get("/audit", params=params)).json()["entries"]
    assert world.called("audit") == {"day": date(2026, 11, 22), "family": "keys"}
    assert entries == [
        {
            "timestamp": "2026-11-23T12:00:00Z",
            "event": "checkpoint_deleted",
            "event_details": {"path": "s0:train:0/weights/a", "actor": "laptop"},
            "model_id": "s0:train:0",
            "tinker_path": "tinker://s0:train:0/weights/a",
        }
    ]
    await client.get("/audit")
    assert world.called("audit") == {"day": None, "family": None}
    assert (await client.get("/audit", params={"event_type": "teams"})).json() == {"entries": []}
    for wrong in ({"event_type": "x"}, {"day": "yesterday"}):
        assert (await client.get("/audit", params=wrong)).status_code == 422


async def test_usage(client: httpx.AsyncClient) -> None:
    window = {"starting_on": "2026-11-23T00:00:00Z", "ending_before": "2026-11-24T00:00:00Z"}
    used = (await client.get("/billing/usage/events", params=window)).json()
    assert [event["event_info"] for event in used["data"]] == [
        {"type": "training", "token_count": 3},
        {"type": "sampling_prefill", "cached": False, "token_count": 3},
        {"type": "sampling_sample", "token_count": 3},
        {"type": "checkpoint", "count": 3},
    ]
    first = used["data"][0]
    assert first["bucket_end"] == "2026-11-23T13:00:00Z"
    assert (first["base_model"], first["user_name"]) == (MODEL, "laptop")
    assert first["estimated_cost_usd"] is None
    stored = (await client.get("/billing/usage/checkpoints/current")).json()
    assert stored["data"][0]["size_gigabytes"] == 0.5


SUCCESS = {"type": "client_finished", "reasons": ["success"]}


@pytest.mark.parametrize(
    ("body", "query"),
    [
        ({}, SessionQuery()),
        ({"session_id": "s", "display_name": "a  b"}, {"session": "s", "name_words": ("a", "b")}),
        ({"project_ids": ["p"], "user_metadata": {"k": "v"}}, {"projects": ("p",)}),
        ({"owner": {"type": "accessible"}}, SessionQuery()),
        ({"owner": {"type": "user", "owner_urns": ["tml:user:t", "x"]}}, SessionQuery()),
        ({"owner": {"type": "user", "owner_urns": ["tml:user:u"]}}, {"projects": ()}),
        (
            {"statuses": [{"type": "active"}, {"type": "failed"}, SUCCESS]},
            {
                "states": (
                    StateQuery(state=SessionState.ACTIVE),
                    StateQuery(state=SessionState.FINISHED, reasons=("success",)),
                )
            },
        ),
        ({"statuses": [{"type": "cancelled"}]}, {"states": ()}),
        (
            {"cursor": {"last_created_at": "2026-11-23T12:00:00Z", "last_session_id": "s9"}},
            {"after": SessionPlace(NOW, "s9")},  # pyright: ignore[reportArgumentType]
        ),
    ],
    ids=str,
)
async def test_searches(
    client: httpx.AsyncClient,
    world: InMemoryService,
    body: dict[str, Any],
    query: SessionQuery | dict[str, Any],
) -> None:
    answer = await client.post("/sessions/search", json=body)
    assert answer.status_code == 200, answer.text
    asked = world.called("search_sessions")
    assert asked["limit"] == 50
    if isinstance(query, dict):
        query = SessionQuery(**query, metadata=body.get("user_metadata", {}))
    assert asked["query"] == query
    assert answer.json()["next_cursor"] == {
        "last_created_at": "2026-11-23T12:00:00Z",
        "last_session_id": "s0",
    }


@pytest.mark.parametrize(
    "body",
    [
        {"limit": 0},
        {"limit": 201},
        {"display_name": ""},
        {"statuses": []},
        {"statuses": [{"type": "x"}]},
        {"owner": {"type": "x"}},
        {"cursor": {"last_created_at": "2026-11-23T12:00:00", "last_session_id": "s"}},
        {"cursor": {"last_created_at": "0001-01-01T00:00:00+01:00", "last_session_id": "s"}},
        {"tags": ["x"]},
    ],
    ids=str,
)
async def test_searches_for_something_else_are_refused(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    assert (await client.post("/sessions/search", json=body)).status_code == 400


async def test_a_trace_is_fetched_without_a_key(client: httpx.AsyncClient, run: str) -> None:
    session = run.split(":")[0]
    export = (await client.get(f"/sessions/{session}/trace_export")).json()
    assert export["status"] == "ready"
    plain = {"x-api-key": ""}
    assert (await client.get(export["url"], headers=plain)).json() == {}
    other = export["url"].replace(f"/{session}?", "/other?")
    assert (await client.get(other, headers=plain)).status_code == 403
    assert (await client.get("/sessions/none/trace_export")).status_code == 404


async def test_a_session_moves_to_a_project(
    client: httpx.AsyncClient, world: InMemoryService, run: str
) -> None:
    at = f"/sessions/{run.split(':')[0]}/project"
    assert (await client.put(at, json={"project_id": "p"})).status_code == 200
    assert world.called("assign_project")["project"] == "p"
    for wrong in ({}, {"project_id": ""}, {"project_id": None}):
        assert (await client.put(at, json=wrong)).status_code == 400
