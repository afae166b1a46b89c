"""Bodies that no client writes: each is refused in a sentence, and nothing is the worse for it."""

import json
import math
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from worlds import CALLS, MODEL_AT, OF_NOBODY, Call, Tenant

from tests.twinkle.conftest import KEY

#: What is no JSON object at all.
NO_OBJECTS = [
    b"",
    b"null",
    b"[]",
    b"7",
    b'"text"',
    b"{",
    b"{}}",
    b"\xff\xfe\x00",
    b"[" * 10_000,
    b'{"a":' * 10_000,
    b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    b'{"adapter_name": NaN}',
    b'{"adapter_name": -Infinity}',
    b'{"adapter_name": "\\ud800"}',
    b'{"adapter_name": 1e400}',
    b"{" + b'"a":1,' * 10_000 + b'"b":2}',
]
#: What no field of a call takes, or few.
STRANGE = [
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1" + b"0" * 400,
    b"9223372036854775808",
    b"1e400",
    b"NaN",
    b"-Infinity",
    b"1.5",
    b'""',
    b'"\\u0000"',
    '"Ünï😀\u202e"'.encode(),
    b'"\\ud800"',
    b'"../../etc/passwd"',
    b'"__class__"',
    b'"' + b"x" * 5_000 + b'"',
    b"[]",
    b"[null]",
    b"{}",
    b'{"__class__": 1}',
    b"[" * 200 + b"]" * 200,
]
#: Fields of which the calls say nothing.
ARGUMENTS = {
    "forward_backward": ["temperature", "advantages", "old_logps", "gradient_accumulation_steps"],
    "set_loss": ["epsilon", "ignore_index", "reduction"],
    "set_optimizer": ["lr", "betas", "eps", "weight_decay", "params"],
    "set_lr_scheduler": ["T_max", "start_factor", "total_iters", "lr_lambda", "optimizer"],
    "set_template": ["max_length", "truncation_strategy", "model_id"],
    "set_processor": ["padding_side", "device_mesh"],
    "clip_grad_norm": ["max_grad_norm", "norm_type"],
    "step": ["optim_params"],
    "save": ["consumed_train_samples", "interval", "save_optimizer"],
    "add_adapter_to_model": ["save_dir", "gradient_accumulation_steps"],
    "completions": ["temperature", "top_p", "n", "stop", "tools", "stream_options", "logit_bias"],
    "create_session": ["metadata"],
    "sample": ["num_samples", "adapter_uri"],
    "create": ["processor_type", "class_type", "dataset_meta"],
    "call": ["function", "idx", "template_func"],
    "upload_to_hub": ["hub_token", "async_upload"],
}
#: What a client may say of samples.
SAMPLING = ["max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "logprobs", "n"]
#: Without these a sample is as long as the model allows, which is no fault but slow.
LENGTHS = {"sampling_params", "max_tokens"}
#: Inputs that are nearly some.
INPUTS: list[Any] = [
    {"input_ids": []},
    {"input_ids": [-1]},
    {"input_ids": [2**31]},
    {"input_ids": [2**70]},
    {"input_ids": [1.5]},
    {"input_ids": ["3"]},
    {"input_ids": [[3, 4], [5]]},
    {"input_ids": [3, 4], "labels": [4]},
    {"input_ids": [3, 4], "labels": [4, 2**40]},
    {"input_ids": [3, 4], "labels": "x"},
    {"input_ids": [3, 4], "position_ids": [9, 9, 9]},
    {"input_ids": [3, 4], "attention_mask": [2, "a"]},
    {"messages": []},
    {"messages": [{"role": 7, "content": {"a": []}}]},
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "file:///etc/passwd"}]}]},
    [{"input_ids": [3, 4]}, {"messages": [{"role": "user", "content": "a"}]}],
    [[]],
    "text",
    7,
]


@pytest.fixture(scope="module")
def tenant(start_service: Callable[..., Any]) -> Generator[Tenant]:
    """A tenant of a server of its own, as sessions and samplers stay behind."""
    with start_service(upload_roots=["memory://uploads"]) as service:
        settled = Tenant(service.url, KEY)
        settled.settle("main")
        yield settled
        # Nor was there a fault behind an answer, or in what goes on by itself.
        log = (service.data_dir / "server.log").read_text()
        faults = [line for line in log.splitlines() if "Traceback" in line]
        assert not faults, "\n".join(faults[:3])


def posts() -> list[tuple[str, dict[str, Any]]]:
    """Every route that takes a body, with a valid one."""
    made = [(route, call.body) for route, calls in CALLS.items() for call in calls[:1] if call.body]
    return [*made, *((route, {}) for route in sorted(OF_NOBODY) if route.startswith("POST"))]


def bodies(tenant: Tenant) -> Generator[tuple[str, bytes]]:
    for route, body in posts():
        for content in NO_OBJECTS:
            yield route, content
        valid = tenant.filled(body)
        for field in [*valid, *ARGUMENTS.get(route.rpartition("/")[2], ())]:
            for content in with_strange(valid, field):
                yield route, content
        if "sampling_params" in valid:
            for field in SAMPLING:
                for content in with_strange(valid["sampling_params"], field):
                    rest = json.dumps(valid | {"sampling_params": None})[:-1].encode()
                    # The last of two fields of one name counts.
                    yield route, rest + b', "sampling_params": ' + content + b"}"
        if "inputs" in valid:
            for inputs in INPUTS:
                yield route, json.dumps(valid | {"inputs": inputs}).encode()


def with_strange(valid: dict[str, Any], field: str) -> Generator[bytes]:
    """An object without a field, and with each strange value of it."""
    others = {name: value for name, value in valid.items() if name != field}
    if field not in LENGTHS:
        yield json.dumps(others).encode()
    head = json.dumps(others)[:-1].encode() + (b"," if others else b"")
    for value in STRANGE:
        if field not in LENGTHS or value not in (b"null", b"{}"):
            yield head + json.dumps(field).encode() + b":" + value + b"}"


def test_every_body_is_answered_in_order(tenant: Tenant) -> None:
    def send(sent: tuple[str, bytes]) -> str | None:
        route, content = sent
        try:
            answer = tenant.send(route, content)
        except requests.RequestException as error:
            return f"{route} {content[:300]!r}: {error!r}"
        in_order = answer.status_code < 500 and "Traceback" not in answer.text
        return None if in_order else f"{route} {content[:300]!r}: {answer.text[:300]}"

    with ThreadPoolExecutor(8) as pool:
        told = [problem for problem in pool.map(send, bodies(tenant)) if problem]
    assert not told, f"{len(told)}\n" + "\n".join(told[:60])
    healthy = tenant.call("GET /api/v1/twinkle/healthz/deep", Call())
    assert healthy.ok
    # The adapter that had to bear all that still learns, once it is told how.
    for tail in ("set_loss", "set_optimizer", "set_lr_scheduler", "forward_backward"):
        (call,) = CALLS[f"POST {MODEL_AT}{tail}"]
        told_last = tenant.call(f"POST {MODEL_AT}{tail}", call)
        assert told_last.ok, f"{tail}: {told_last.text}"
    (call,) = CALLS[f"POST {MODEL_AT}clip_grad_and_step"]
    assert tenant.call(f"POST {MODEL_AT}clip_grad_and_step", call).ok
    assert math.isfinite(told_last.json()["result"]["loss"])
