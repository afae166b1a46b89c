"""Promises, results and places in a run's order, as the wire has them."""

import asyncio
from typing import Any, cast

import httpx
import numpy as np
import pytest
from tinker.proto.response_conv import (
    deserialize_forward_backward_output,
    deserialize_sample_response,
)

from tests.gateway.in_memory import MODEL, InMemoryService
from tests.gateway.test_codec_proto import TARGETS, one_datum, sdk_body
from tests.gateway.test_limits import PROTO
from twinkle_dask.errors import (
    HostLost,
    InvalidRequest,
    OutOfOrder,
    QuotaExceeded,
    SessionEnded,
    TwinkleDaskError,
)
from twinkle_dask.operations.values import Done, Failed
from twinkle_dask.types import ForwardBackwardResult, TicketId

ACCEPT_PROTO = {"accept": "application/x-protobuf"}
STEP = {"adam_params": {"learning_rate": 0.1}}
JSON_BATCH = {
    "data": [
        {
            "model_input": {"chunks": [{"tokens": [1, 2]}]},
            "loss_fn_inputs": {"target_tokens": {"data": [2, 3], "dtype": "int64"}},
        }
    ],
    "loss_fn": "cross_entropy",
}


async def result_of(
    client: httpx.AsyncClient, promise: httpx.Response, headers: dict[str, str] | None = None
) -> httpx.Response:
    assert promise.status_code == 200, promise.text
    body = {"request_id": promise.json()["request_id"], "allow_metadata_only": True}
    return await client.post("/retrieve_future", json=body, headers=headers)


# ---- order


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/optim_step", {"adam_params": {"learning_rate": "x"}}),
        ("/optim_step", {"optimizer_params": {"type": "dimuon"}}),
        ("/optim_step", {}),
        ("/save_weights", {"path": 7}),
        ("/save_weights_for_sampler", {"path": "x", "kind": "inflight"}),
        ("/load_weights", {"path": "nowhere", "optimizer": True}),
        ("/save_weights_external", {"path": 7}),
        ("/forward_backward", {"forward_backward_input": {}}),
        ("/forward", {"forward_input": JSON_BATCH | {"loss_fn": "nope"}}),
    ],
)
async def test_a_refused_step_frees_its_place(
    client: httpx.AsyncClient,
    world: InMemoryService,
    run: str,
    path: str,
    body: dict[str, Any],
) -> None:
    response = await client.post(path, json={"model_id": run, "seq_id": 4} | body)
    assert response.status_code == 400
    assert world.refused == [(run, 4)]
    assert world.num_sending == 0


async def test_a_refused_batch_frees_its_place(
    client: httpx.AsyncClient, world: InMemoryService, run: str
) -> None:
    body = sdk_body(one_datum(target_tokens=TARGETS), run=run, loss_fn=cast(Any, "nope"))
    response = await client.post("/forward_backward", content=body, headers=PROTO)
    assert response.status_code == 400
    assert world.refused == [(run, 3)]


@pytest.mark.parametrize(
    ("failure", "status", "refused"),
    [
        (InvalidRequest("no"), 400, True),
        (OutOfOrder("late", 9), 400, True),
        (SessionEnded("over"), 400, True),
        (QuotaExceeded("busy"), 429, False),  # the client repeats these under the same number
        (HostLost("gone"), 500, False),
        (RuntimeError("?"), 500, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
async def test_only_what_is_final_frees_a_place(
    client: httpx.AsyncClient,
    world: InMemoryService,
    run: str,
    failure: Exception,
    status: int,
    refused: bool,
) -> None:
    world.failure = failure
    response = await client.post("/optim_step", json={"model_id": run, "seq_id": 4} | STEP)
    assert response.status_code == status
    assert world.refused == ([(run, 4)] if refused else [])


async def test_a_repeated_step_gives_the_same_promise(client: httpx.AsyncClient, run: str) -> None:
    body = {"model_id": run, "seq_id": 1} | STEP
    promises = [(await client.post("/optim_step", json=body)).json() for _ in range(2)]
    assert promises[0] == promises[1]
    assert isinstance(promises[0]["request_id"], str)


# ---- results


async def test_logprobs_come_as_protobuf_or_json(client: httpx.AsyncClient, run: str) -> None:
    body = sdk_body(one_datum(target_tokens=TARGETS), run=run)
    promise = await client.post("/forward_backward", content=body, headers=PROTO)
    for _ in range(2):  # an answer may get lost, so it can be had again
        response = await result_of(client, promise, ACCEPT_PROTO)
        assert response.headers["content-type"] == "application/x-protobuf"
        output = deserialize_forward_backward_output(response.content)
        assert output.metrics == {"loss:sum": 1.0}
        assert output.loss_fn_outputs[0]["logprobs"].tolist() == [-0.5, -0.5]
    both = {"accept": "application/x-protobuf, application/json"}  # SDK 0.20
    assert (await result_of(client, promise, both)).headers["content-type"] in both["accept"]
    old = (await result_of(client, promise)).json()
    assert old["loss_fn_outputs"][0]["logprobs"]["data"] == [-0.5, -0.5]


async def test_old_json_batches(
    client: httpx.AsyncClient, world: InMemoryService, run: str
) -> None:
    for path, key, backward in [
        ("/forward", "forward_input", False),
        ("/forward_backward", "forward_backward_input", True),
    ]:
        promise = await client.post(path, json={"model_id": run, "seq_id": None, key: JSON_BATCH})
        assert promise.status_code == 200, promise.text
        assert world.called("forward_backward")["batch"].backward is backward


async def test_samples(client: httpx.AsyncClient, sampler: str) -> None:
    body = {
        "sampling_session_id": sampler,
        "seq_id": 10**18,
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        "sampling_params": {"max_tokens": 4},
        "prompt_logprobs": True,
    }
    promise = await client.post("/asample", json=body)
    assert len(set(promise.json()["sample_sequence_ids"])) == 2
    sample = deserialize_sample_response((await result_of(client, promise, ACCEPT_PROTO)).content)
    assert [s.tokens for s in sample.sequences] == [[7, 8], [7, 8]]
    assert sample.prompt_logprobs == [None, -1.0]
    assert (await result_of(client, promise)).json()["type"] == "sample"


async def test_metrics_of_a_step_are_numbers(client: httpx.AsyncClient, run: str) -> None:
    promise = await client.post("/optim_step", json={"model_id": run, "seq_id": 1} | STEP)
    assert (await result_of(client, promise)).json()["metrics"] == {"grad_norm:mean": 1.5}


async def test_weights_go_out_and_come_back(
    client: httpx.AsyncClient, world: InMemoryService, run: str
) -> None:
    session = run.split(":")[0]
    save = {"model_id": run, "seq_id": 1, "path": "ck1", "ttl_seconds": 3600}
    saved = (await result_of(client, await client.post("/save_weights", json=save))).json()
    path = f"tinker://{run}/weights/ck1"
    assert saved["path"] == path
    named = {"model_id": run, "seq_id": 2, "path": "s1", "kind": "snapshot"}
    named = await client.post("/save_weights_for_sampler", json=named)
    assert (await result_of(client, named)).json()["path"] == f"tinker://{run}/sampler_weights/s1"
    unnamed = {"model_id": run, "seq_id": 3, "sampling_session_seq_id": 5}
    unnamed = await client.post("/save_weights_for_sampler", json=unnamed)
    body = (await result_of(client, unnamed)).json()
    assert body == body | {"path": None, "sampling_session_id": f"{session}:sample:5"}

    into = {"model_id": run, "seq_id": 4, "path": path, "optimizer": True}
    await result_of(client, await client.post("/load_weights", json=into))
    assert world.called("load_state")["with_optimizer"] is True
    anew = {"session_id": session, "model_seq_id": 1, "path": path, "optimizer": False}
    loaded = (await result_of(client, await client.post("/load_weights", json=anew))).json()
    assert loaded["model_id"] == f"{session}:train:1"
    neither = await client.post("/load_weights", json={"path": path, "optimizer": False})
    assert neither.status_code == 400

    info = await client.post("/weights_info", json={"tinker_path": path})
    assert info.json()["base_model"] == MODEL
    missing = await client.post("/weights_info", json={"tinker_path": path + "x"})
    assert missing.status_code == 404


# ---- polls


async def test_a_poll_is_held_then_told_to_come_again(client: httpx.AsyncClient) -> None:
    response = await client.post("/retrieve_future", json={"request_id": "held"})
    assert response.status_code == 408
    assert response.json()["queue_state"] == "paused_capacity"
    assert response.json()["queue_state_reason"] == "busy"


async def test_unknown_tickets_are_not_found(client: httpx.AsyncClient) -> None:
    response = await client.post("/retrieve_future", json={"request_id": "none"})
    assert response.status_code == 404


@pytest.mark.parametrize(
    ("error", "category"),
    [(InvalidRequest("no"), "user"), (HostLost("gone", "abc"), "server")],
)
async def test_a_failed_result_is_no_failed_poll(
    client: httpx.AsyncClient, world: InMemoryService, error: TwinkleDaskError, category: str
) -> None:
    world.outcomes[TicketId("f")] = Failed(error=error)
    response = await client.post("/retrieve_future", json={"request_id": "f"}, headers=ACCEPT_PROTO)
    assert response.status_code == 200
    assert response.json()["category"] == category
    assert error.message in response.json()["error"]


async def test_cancelling_is_passed_on(client: httpx.AsyncClient, world: InMemoryService) -> None:
    assert (await client.post("/cancel_future", json={"request_id": "r"})).status_code == 200
    assert world.called("cancel") == {"ticket": "r"}


async def test_many_results_are_polled_for_at_once(
    client: httpx.AsyncClient, world: InMemoryService, sampler: str
) -> None:
    sample = {
        "sampling_session_id": sampler,
        "prompt": {"chunks": [{"tokens": [1]}]},
        "sampling_params": {},
    }
    promise = await client.post("/asample", json=sample)
    ticket = promise.json()["request_id"]
    target = {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 3}
    body: dict[str, Any] = {
        "target": target,
        "prev_cursor": 0,
        "retrieved_request_ids": ["a", "b"],
    }
    answer = (await client.post("/retrieve_futures", json=body)).json()
    assert answer["completions"] == [
        {"state": "finished", "request_id": ticket, "response_payload_uncompressed_size": 16}
    ]
    assert world.called("completions")["clone"] == (sampler, 3)
    assert world.called("completions")["retrieved"] == ("a", "b")
    body["prev_cursor"] = answer["cursor"]
    idle = (await client.post("/retrieve_futures", json=body | {"timeout": 0.0})).json()
    assert idle == {"completions": [], "cursor": answer["cursor"]}
    body["target"] = target | {"sampling_session_id": "none"}
    assert (await client.post("/retrieve_futures", json=body)).status_code == 404


async def test_copies_of_a_client_are_numbered(client: httpx.AsyncClient, sampler: str) -> None:
    body = {"sampling_session_id": sampler, "type": "join_sampling_session"}
    joined = [(await client.post("/join_sampling_session", json=body)).json() for _ in range(2)]
    assert [one["client_counter"] for one in joined] == [1, 2]


async def test_the_size_of_a_large_result_comes_first(
    client: httpx.AsyncClient, world: InMemoryService
) -> None:
    scores = np.zeros(2**18 + 1, np.float32)  # one more than a mebibyte
    result = ForwardBackwardResult(logprobs=(scores,), metrics={"loss:sum": 0.0})
    world.outcomes[TicketId("large")] = Done(result=result)
    body = {"request_id": "large", "allow_metadata_only": True}
    told = await client.post("/retrieve_future", json=body, headers=ACCEPT_PROTO)
    assert told.json() == {"status": "complete_metadata", "response_payload_size": scores.nbytes}
    for more in ({"allow_metadata_only": False}, {}):
        whole = await client.post(
            "/retrieve_future", json={"request_id": "large", **more}, headers=ACCEPT_PROTO
        )
        assert len(whole.content) > scores.nbytes


# ---- sessions and records


async def test_a_session_is_opened_once_per_idempotency_key(client: httpx.AsyncClient) -> None:
    ids = [
        (await client.post("/create_session", json={}, headers={"x-idempotency-key": key})).json()
        for key in ("a", "a", "b")
    ]
    assert ids[0] == ids[1] != ids[2]


async def test_the_heartbeat_of_a_finished_session_is_gone(
    client: httpx.AsyncClient, run: str
) -> None:
    session = run.split(":")[0]
    beat = {"session_id": session, "type": "session_heartbeat"}
    assert (await client.post("/session_heartbeat", json=beat)).status_code == 200
    end = {"reason": {"type": "success"}, "detail": None}
    assert (await client.post(f"/sessions/{session}/finish", json=end)).status_code == 200
    assert (await client.post("/session_heartbeat", json=beat)).status_code == 410
    late = {
        "session_id": session,
        "model_seq_id": 1,
        "base_model": MODEL,
        "lora_config": {"rank": 8},
    }
    assert (await client.post("/create_model", json=late)).status_code == 400


async def test_telemetry_is_accepted_whatever_it_is(client: httpx.AsyncClient) -> None:
    for content in (b'{"events": []}', b"", b"{"):
        response = await client.post("/telemetry", content=content)
        assert (response.status_code, response.json()) == (200, {"status": "accepted"})


async def test_flags(client: httpx.AsyncClient) -> None:
    config = (await client.post("/client/config", json={"sdk_version": "0.38.0"})).json()
    assert config == {
        "pjwt_auth_enabled": True,
        "parallel_fwdbwd_chunks": True,
        "proto_compress_fwdbwd": False,
        "sample_use_retrieve_futures": False,
        "custom_loss_server_side": True,
        "sample_join_sampling_session": True,
    }
    dynamic = (await client.post("/client/dynamic_config", json={})).json()
    assert dynamic["sample_cancel_enabled"] is True


async def test_records(client: httpx.AsyncClient, world: InMemoryService, run: str) -> None:
    await client.post("/save_weights", json={"model_id": run, "path": "ck1"})
    runs = (await client.get("/training_runs", params={"access_scope": "owned"})).json()
    assert runs["cursor"] == {"offset": 0, "limit": 20, "total_count": 1}
    one = (await client.get(f"/training_runs/{run}")).json()
    assert one == runs["training_runs"][0]
    assert one["last_checkpoint"]["checkpoint_id"] == "weights/ck1"
    assert one["last_request_time"].endswith("Z")
    of_run = (await client.get(f"/training_runs/{run}/checkpoints")).json()["checkpoints"]
    everywhere = (await client.get("/checkpoints", params={"limit": 1000})).json()["checkpoints"]
    assert of_run == everywhere
    assert [c["tinker_path"] for c in of_run] == [f"tinker://{run}/weights/ck1"]

    at = f"/training_runs/{run}/checkpoints/weights/ck1"
    assert (await client.put(f"{at}/ttl", json={"ttl_seconds": None})).status_code == 200
    assert world.called("set_checkpoint_ttl")["ttl_s"] is None
    assert (await client.put(f"{at}/ttl", json={})).status_code == 400
    assert (await client.delete(at)).status_code == 200
    assert (await client.delete(at)).status_code == 404
    assert (await client.delete(at.replace("/weights/", "/other/"))).status_code == 400

    session = run.split(":")[0]
    assert (await client.get("/sessions")).json() == {"sessions": [session]}
    detail = (await client.get(f"/sessions/{session}")).json()
    assert detail["training_run_ids"] == [run]
    assert detail["user_metadata"] == {"n": "1", "s": "x"}  # clients read only strings
    assert (await client.get("/training_runs", params={"limit": 0})).status_code == 422
    assert (await client.get("/sessions", params={"access_scope": "all"})).status_code == 422


async def test_the_request_id_is_made_or_taken(client: httpx.AsyncClient) -> None:
    given = await client.get("/healthz", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    for bad in ("a b", "x" * 65, "<script>"):
        made = await client.get("/healthz", headers={"x-request-id": bad})
        assert made.headers["x-request-id"] != bad


async def test_a_hundred_polls_wait_side_by_side(client: httpx.AsyncClient) -> None:
    held = [client.post("/retrieve_future", json={"request_id": "held"}) for _ in range(100)]
    answers = await asyncio.gather(*held)
    assert {answer.status_code for answer in answers} == {408}
