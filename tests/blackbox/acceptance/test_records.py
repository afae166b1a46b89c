"""What is told of sessions, runs, events and usage: items 60, 93 and 94."""

import json
import re
import urllib.request
import warnings
from collections import Counter
from collections.abc import Generator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from tests.blackbox.accounts import create_key, tinker_cli
from tests.blackbox.conftest import KEY, MODEL, OTHER_KEY
from tests.blackbox.data import datum, random_tokens, train_one_step
from tests.blackbox.wire import Wire
from twinkle_dask import LocalService

pytestmark = pytest.mark.timeout(120)

DATA = [datum(random_tokens(11, seed)) for seed in range(3)]  # 30 tokens go in
PROMPT = types.ModelInput.from_ints(random_tokens(7, 1))
OWN, OTHERS = "owned", "accessible"


@pytest.fixture
def rest(service: LocalService) -> tinker.RestClient:
    return tinker.RestClient(base_url=service.url, api_key=KEY)


class Work:
    """What one session of a tenant of its own has done: two steps, samples, two checkpoints."""

    def __init__(self, service: LocalService) -> None:
        self.service = service
        self.key = create_key(service, "carol")
        self.rest = tinker.RestClient(base_url=service.url, api_key=self.key)
        self.admin = tinker.AdminClient(base_url=service.url, api_key=self.key)
        with tinker.ServiceClient(
            base_url=service.url,
            api_key=self.key,
            project_id="paper",
            user_metadata={"stage": "one"},
            display_name="Nightly Run",
        ) as client:
            self.session = client.holder.get_session_id()
            run = client.create_lora_training_client(MODEL, rank=4).result()
            run.forward(DATA, "cross_entropy").result()
            train_one_step(run, DATA)
            self.run = run.model_id
            self.saved = run.save_state("ck", ttl_seconds=7200).result().path
            sampler = run.save_weights_and_get_sampling_client().result()
            params = types.SamplingParams(max_tokens=3, temperature=0, stop=[])
            sampler.sample(PROMPT, 2, params).result()
            run.save_weights_for_sampler("s").result()


@pytest.fixture(scope="module")
def done(service: LocalService) -> Work:
    return Work(service)


# ---- 60


def test_60_runs_are_listed_newest_first_page_by_page(
    client: tinker.ServiceClient, rest: tinker.RestClient
) -> None:
    """A tenant's list grows with every test, so only its front is known."""
    before = rest.list_training_runs(limit=1).result().cursor.total_count
    made = [
        client.create_lora_training_client(MODEL, rank=1 + i, user_metadata={"number": str(i)})
        .result()
        .model_id
        for i in range(3)
    ]
    pages = [rest.list_training_runs(limit=2, offset=offset).result() for offset in (0, 2)]
    listed = [listed for page in pages for listed in page.training_runs]
    assert [one.training_run_id for one in listed[:3]] == made[::-1]
    assert [one.lora_rank for one in listed[:3]] == [3, 2, 1]
    assert listed[0].user_metadata == {"number": "2"}
    assert listed[0].base_model == MODEL
    assert listed[0].is_lora
    assert pages[1].cursor.model_dump() == {
        "offset": 2,
        "limit": 2,
        "total_count": before + 3,
    }
    beyond = rest.list_training_runs(limit=2, offset=before + 3).result()
    assert beyond.training_runs == []


def test_60_runs_are_listed_by_project(done: Work) -> None:
    found = done.rest.list_training_runs(project_id="paper").result()
    assert [run.training_run_id for run in found.training_runs] == [done.run]
    assert found.cursor.total_count == 1
    none = done.rest.list_training_runs(project_id="other").result()
    assert (none.training_runs, none.cursor.total_count) == ([], 0)


def test_60_a_published_checkpoint_shows_its_run_to_others(
    client: tinker.ServiceClient, rest: tinker.RestClient, service: LocalService
) -> None:
    run = client.create_lora_training_client(
        MODEL, rank=4, user_metadata={"secret": "plan"}
    ).result()
    shown, hidden = (run.save_state(name).result().path for name in ("shown", "hidden"))
    other = tinker.RestClient(base_url=service.url, api_key=OTHER_KEY)
    with pytest.raises(tinker.NotFoundError):
        other.get_training_run(run.model_id, access_scope=OTHERS).result()
    rest.publish_checkpoint_from_tinker_path(shown).result()
    seen = other.get_training_run_by_tinker_path(shown, access_scope=OTHERS).result()
    assert (seen.base_model, seen.lora_rank) == (MODEL, 4)
    assert seen.last_checkpoint is not None
    assert seen.last_checkpoint.tinker_path == shown != hidden
    assert seen.user_metadata == {}
    assert KEY[-4:] not in seen.model_owner
    listed = other.list_training_runs(limit=1000, access_scope=OTHERS).result().training_runs
    assert run.model_id in {one.training_run_id for one in listed}
    own = other.list_training_runs(limit=1000, access_scope=OWN).result().training_runs
    assert run.model_id not in {one.training_run_id for one in own}
    for attempt in (
        lambda: other.get_training_run(run.model_id, access_scope=OWN).result(),
        lambda: other.get_session(run.model_id.split(":")[0], access_scope=OTHERS).result(),
    ):
        with pytest.raises(tinker.NotFoundError):
            attempt()
    rest.unpublish_checkpoint_from_tinker_path(shown).result()
    with pytest.raises(tinker.NotFoundError):
        other.get_training_run(run.model_id, access_scope=OTHERS).result()


def test_60_checkpoints_of_an_unknown_run_are_not_found(rest: tinker.RestClient) -> None:
    for find in (rest.list_checkpoints, rest.get_training_run):
        with pytest.raises(tinker.NotFoundError):
            find("nowhere:train:0").result()


# ---- 93: sessions


def test_93_sessions_are_listed_and_told(done: Work) -> None:
    assert done.rest.list_sessions().result().sessions == [done.session]
    assert done.rest.list_sessions(offset=1, access_scope=OTHERS).result().sessions == []
    told = done.rest.get_session(done.session).result()
    assert told.training_run_ids == [done.run]
    assert told.sampler_ids == [f"{done.session}:sample:0"]
    assert (told.display_name, told.user_metadata) == ("Nightly Run", {"stage": "one"})


def search(rest: tinker.RestClient, **query: Any) -> types.SessionSearchResponse:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is experimental
        found = rest.search_sessions(  # pyright: ignore[reportDeprecated]
            types.SessionSearchRequest(**query)
        )
        return found.result()


def test_93_sessions_are_searched(done: Work) -> None:
    (found,) = search(done.rest).sessions
    assert found.session_id == done.session
    assert found.owner == "tml:user:carol"
    assert found.project_id == "paper"
    assert found.status is not None
    assert found.status.type == "client_finished"
    assert found.checkpoints_count == 2
    assert found.checkpoint_storage_bytes
    finished = {"type": "client_finished", "reasons": ["success", "errored"]}
    finding: tuple[dict[str, Any], ...] = (
        {"session_id": done.session},
        {"display_name": "run NIGHT"},
        {"user_metadata": {"stage": "one"}},
        {"project_ids": ["paper", "x"]},
        {"statuses": [{"type": "active"}, finished]},
        {"owner": {"type": "user", "owner_urns": [found.owner]}},
        {"owner": {"type": "accessible"}},
    )
    for query in finding:
        assert [one.session_id for one in search(done.rest, **query).sessions] == [done.session]
    missing: tuple[dict[str, Any], ...] = (
        {"session_id": "x"},
        {"display_name": "daily"},
        {"user_metadata": {"stage": "two"}},
        {"project_ids": []},
        {"statuses": [{"type": "active"}, {"type": "failed"}, {"type": "cancelled"}]},
        {"owner": {"type": "user", "owner_urns": ["tml:user:local"]}},
    )
    for query in missing:
        assert search(done.rest, **query).sessions == []


def test_93_a_search_goes_on_page_by_page(service: LocalService, wire: Wire) -> None:
    rest = tinker.RestClient(base_url=service.url, api_key=KEY)
    body = {"display_name": "paged"}
    made = [wire.post("create_session", body).json()["session_id"] for _ in range(5)]
    listed: list[str] = []
    page = search(rest, display_name="paged", limit=2)
    while True:
        listed += [one.session_id for one in page.sessions]
        if page.next_cursor is None:
            break
        page = search(rest, display_name="paged", limit=2, cursor=page.next_cursor)
    assert listed == made[::-1]


def test_93_a_session_moves_to_another_project(
    service: LocalService, rest: tinker.RestClient, wire: Wire
) -> None:
    session = wire.post("create_session", {}).json()["session_id"]
    assert search(rest, session_id=session).sessions[0].project_id == ""
    rest.assign_session_project(session, "moved").result()
    (found,) = search(rest, session_id=session).sessions
    assert found.project_id == "moved"
    other = tinker.RestClient(base_url=service.url, api_key=OTHER_KEY)
    with pytest.raises(tinker.NotFoundError):
        other.assign_session_project(session, "theirs").result()
    with pytest.raises(tinker.BadRequestError):
        rest.assign_session_project(session, "").result()


# ---- 93: events and usage


def test_93_events_are_told(done: Work) -> None:
    entries = done.admin.get_audit_log().result().entries
    events = [entry.event for entry in entries]
    expected = ["session_created", "checkpoint_created", "checkpoint_created", "session_finished"]
    assert [event for event in events if event in expected] == expected[::-1]
    first = next(entry for entry in entries if entry.event == "checkpoint_created")
    assert first.event_details["actor"] == "carol"
    assert (first.model_id, first.tinker_path) == (
        done.run,
        done.saved.replace("weights/ck", "sampler_weights/s"),
    )
    checkpoints = done.admin.get_audit_log("checkpoints").result().entries
    assert {entry.event for entry in checkpoints} == {"checkpoint_created"}
    assert done.admin.get_audit_log("teams").result().entries == []
    assert done.admin.get_audit_log(day=date(2020, 1, 1)).result().entries == []
    times = [entry.timestamp for entry in entries]
    assert times == sorted(times, reverse=True)


def window() -> tuple[str, str]:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return f"{hour - timedelta(hours=1):%FT%TZ}", f"{hour + timedelta(hours=2):%FT%TZ}"


def amounts(admin: tinker.AdminClient) -> Counter[str]:
    found = Counter[str]()
    for event in admin.get_billing_usage(*window()).result().data:
        info = event.event_info
        found[info.type] += info.count if info.type == "checkpoint" else info.token_count  # type: ignore[union-attr]
    return found


def test_93_usage_is_counted(done: Work) -> None:
    assert amounts(done.admin) == {
        "training": 60,  # forward and forward_backward
        "sampling_prefill": 7,
        "sampling_sample": 6,
        "checkpoint": 2,
    }
    used = done.admin.get_billing_usage(*window()).result()
    assert {event.session_id for event in used.data} == {done.session}
    assert {event.project_id for event in used.data} == {"paper"}
    assert {event.base_model for event in used.data} == {MODEL}
    assert {(event.user_id, event.user_name) for event in used.data} == {
        ("tml:user:carol", "carol")
    }
    assert used.sessions[done.session].user_metadata == {"stage": "one"}
    assert {event.estimated_cost_usd for event in used.data} == {None}


def test_93_a_repeated_request_is_counted_once(service: LocalService) -> None:
    key = create_key(service, "dave")
    admin = tinker.AdminClient(base_url=service.url, api_key=key)
    with Wire(service.url, key) as wire:
        session = wire.post("create_session", {}).json()["session_id"]
        create = {"session_id": session, "model_seq_id": 0, "base_model": MODEL}
        wire.result(wire.promise("create_model", create | {"lora_config": {"rank": 4}}))
        run = f"{session}:train:0"
        tickets = {wire.forward_backward(run, 1, DATA) for _ in range(3)}
        assert len(tickets) == 1
        wire.metrics(tickets.pop())
        assert "error" in wire.result(wire.forward_backward(run, 2, [_without_a_value()]))
    assert amounts(admin) == {"training": 30}


def _without_a_value() -> types.Datum:
    """Fails when it is computed: the ratio overflows."""
    tokens = random_tokens(5, 9)
    return datum(tokens, weights=[float("3e38")] * 4)


@pytest.mark.parametrize(
    ("start", "end", "why"),
    [
        ("2026-01-01T00:30:00Z", "2026-01-02T00:00:00Z", "hour"),
        ("2026-01-01T00:00:00", "2026-01-02T00:00:00Z", "zone"),
        ("2026-01-01T00:00:00Z", "2026-01-16T00:00:00Z", "14 days"),
        ("2026-01-02T00:00:00Z", "2026-01-01T00:00:00Z", "14 days"),
        ("2999-01-01T00:00:00Z", "2999-01-02T00:00:00Z", "future"),
    ],
)
def test_93_other_windows_are_refused(
    service: LocalService, start: str, end: str, why: str
) -> None:
    admin = tinker.AdminClient(base_url=service.url, api_key=KEY)
    with pytest.raises(tinker.BadRequestError, match=why):
        admin.get_billing_usage(start, end).result()


def test_93_storage_is_told(done: Work) -> None:
    (row,) = done.admin.get_current_checkpoint_storage_usage().result().data
    assert (row.project_id, row.checkpoint_count) == ("paper", 2)
    listed = done.rest.list_user_checkpoints().result().checkpoints
    assert row.size_bytes == sum(one.size_bytes or 0 for one in listed)
    assert row.size_gigabytes == row.size_bytes / 1e9
    assert row.org_user_urn == "tml:user:carol"
    assert done.admin.get_current_checkpoint_storage_usage("other").result().data == []


def test_93_a_trace_is_exported(done: Work, service: LocalService) -> None:
    url = done.rest.export_session_trace(done.session).result()
    with urllib.request.urlopen(url) as answer:
        trace = json.loads(answer.read())
    told = trace["twinkle_dask"]
    assert told["session"]["session_id"] == done.session
    assert [run["training_run_id"] for run in told["training_runs"]] == [done.run]
    assert len(told["checkpoints"]) == 2
    kinds = Counter(one["kind"] for one in told["operations"])
    assert kinds["forward_backward"] == 2
    assert kinds["optim_step"] == kinds["sample"] == 1
    (sample,) = (one for one in told["operations"] if one["kind"] == "sample")
    assert (sample["num_samples"], sample["input_tokens"], sample["output_tokens"]) == (2, 7, 6)
    begun = [event["id"] for event in trace["traceEvents"] if event["ph"] == "b"]
    ended = [event["id"] for event in trace["traceEvents"] if event["ph"] == "e"]
    assert len(begun) == len(told["operations"])
    assert Counter(begun) == Counter(ended)
    other = tinker.RestClient(base_url=service.url, api_key=OTHER_KEY)
    with pytest.raises(tinker.NotFoundError):
        other.export_session_trace(done.session).result()


def test_93_the_command_line_shows_them(done: Work, tmp_path: Path) -> None:
    def cli(*arguments: str) -> str:
        ended = tinker_cli(done.service, done.key, tmp_path, *arguments)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert "training" in cli("billing", "usage", *window(), "--csv", "-")
    assert "paper" in cli("billing", "checkpoint-storage", "--csv", "-")
    cli("session", "export-trace", done.session, "--output", "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_93_an_account_without_anything_gets_empty_lists(service: LocalService) -> None:
    key = create_key(service, "erin")
    rest = tinker.RestClient(base_url=service.url, api_key=key)
    admin = tinker.AdminClient(base_url=service.url, api_key=key)
    assert rest.list_training_runs().result().training_runs == []
    assert rest.list_user_checkpoints().result().checkpoints == []
    assert rest.list_sessions().result().sessions == []
    assert search(rest).sessions == []
    assert admin.get_billing_usage(*window()).result().data == []
    assert admin.get_current_checkpoint_storage_usage().result().data == []
    assert [one.event for one in admin.get_audit_log().result().entries] == ["api_key_created"]


# ---- 94


@pytest.fixture
def as_carol(done: Work) -> Generator[Wire]:
    with Wire(done.service.url, done.key) as wire:
        yield wire


def test_94_every_time_has_a_zone(done: Work, as_carol: Wire) -> None:
    start, end = window()
    run = f"training_runs/{done.run}"
    answers = [
        as_carol.get(path)
        for path in (
            *("training_runs", run, f"{run}/checkpoints", "checkpoints", "audit"),
            f"billing/usage/events?starting_on={start}&ending_before={end}",
        )
    ]
    answers.append(as_carol.post("sessions/search", {"limit": 1}))
    trace = done.rest.export_session_trace(done.session).result()
    answers.append(as_carol.get(trace))
    for answer in answers:
        assert answer.status_code == 200
        times = re.findall(r'"(\d{4}-\d\d-\d\d[T ][\d:.]+[^"]*)"', answer.text)
        assert times, answer.text
        assert all(re.search(r"(Z|[+-]\d\d:\d\d)$", time) for time in times), times
    info = done.rest.get_training_run(done.run).result()
    assert info.last_request_time.tzinfo is not None
    saved = done.rest.list_checkpoints(done.run).result().checkpoints
    assert all(one.time.tzinfo is not None for one in saved)
    assert [one.expires_at and one.expires_at.tzinfo for one in saved].count(None) == 1
