"""Runs, samplers and data sets over one session; replies are shaped with httpx's MockTransport."""

import asyncio
import io
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from twinkle_dask_client import (
    AsyncService,
    BadReply,
    Conflict,
    Feature,
    InvalidRequest,
    Lora,
    RetryPolicy,
    SamplingParams,
    Service,
    SessionLost,
    Unreachable,
)
from twinkle_dask_client.inputs import plain

Answer = Callable[[httpx.Request], httpx.Response]
ADDRESS = "twinkle://s1-main/weights/first"


class Wire:
    """Answers by path, and remembers what was asked."""

    def __init__(self, **answers: Any) -> None:
        self.heard: list[tuple[str, Any, str | None]] = []
        self._answers = {
            "create_session": {"session_id": "s1"},
            "add_adapter_to_model": {"status": "ok", "adapter_name": "s1-main"},
            "finish": {},
            **answers,
        }

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        name = request.url.path.rsplit("/", 1)[-1]
        self.heard.append((name, body, request.headers.get("x-twinkle-session-id")))
        answer = self._answers[name]
        if callable(answer):
            answer = answer(request)
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    @property
    def paths(self) -> list[str]:
        return [name for name, _, _ in self.heard]


def connected(
    wire: Wire, *, heartbeat_s: float = 60.0, metadata: dict[str, str] | None = None
) -> Service:
    return Service(
        "http://service.test",
        api_key="tml-key",
        transport=httpx.MockTransport(wire),
        retry=RetryPolicy(attempts=3, first_pause_s=0.001),
        heartbeat_s=heartbeat_s,
        metadata=metadata,
    )


def failing(first: httpx.Response | Exception, then: Any) -> Answer:
    left: list[Any] = [first, then]

    def answer(_: httpx.Request) -> httpx.Response:
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome if isinstance(outcome, httpx.Response) else httpx.Response(200, json=outcome)

    return answer


FORWARDED = {"result": {"loss": 1.5, "logps": [[-1.0, None]]}}


def test_one_session_is_opened_when_it_is_needed_and_ended() -> None:
    wire = Wire(forward_backward={"result": {"loss": 2.0, "logps": [[-0.5]]}})
    with connected(wire, metadata={"team": "blue"}) as service:
        assert wire.paths == []
        run = service.create_run("org/model", name="main", lora=Lora(rank=4))
        assert run.id == "s1-main"
        out = run.forward_backward([Feature.of([1, 2], [3])], advantages=np.float32(0.5))
        assert (out.loss, out.logprobs) == (2.0, ((-0.5,),))
    assert wire.paths == ["create_session", "add_adapter_to_model", "forward_backward", "finish"]
    assert wire.heard[0][1] == {"metadata": {"team": "blue"}}
    config = json.loads(wire.heard[1][1]["config"])
    assert (config["r"], config["target_modules"]) == (4, "all-linear")
    _, body, session = wire.heard[2]
    assert session == "s1"
    assert body["inputs"] == [{"input_ids": [1, 2, 3], "labels": [-100, 3, -100]}]
    assert body["advantages"] == 0.5


@pytest.mark.parametrize(
    "passing", [httpx.ConnectError("refused"), httpx.Response(429, json={"detail": "busy"})]
)
def test_a_gradient_is_sent_again_if_nobody_can_have_begun_it(passing: Any) -> None:
    wire = Wire(forward_backward=failing(passing, FORWARDED))
    with connected(wire) as service:
        run = service.create_run("m")
        assert run.forward_backward([Feature(input_ids=[1])]).loss == 1.5


@pytest.mark.parametrize(
    "unclear", [httpx.ReadError("dropped"), httpx.ReadTimeout("silent")], ids=repr
)
def test_a_gradient_is_never_sent_twice(unclear: Exception) -> None:
    wire = Wire(forward_backward=failing(unclear, FORWARDED))
    with connected(wire) as service:
        run = service.create_run("m")
        with pytest.raises(Unreachable):
            run.forward_backward([Feature(input_ids=[1])])
    assert Counter(wire.paths)["forward_backward"] == 1


def test_what_only_reads_is_sent_again() -> None:
    wire = Wire(forward_only=failing(httpx.ReadError("dropped"), FORWARDED))
    with connected(wire) as service:
        out = service.create_run("m").forward([Feature(input_ids=[1, 2])])
    assert out.loss == 1.5


def test_a_name_that_is_taken_is_a_conflict() -> None:
    wire = Wire(add_adapter_to_model=httpx.Response(409, json={"detail": "there already"}))
    with connected(wire) as service, pytest.raises(Conflict, match="there already"):
        service.create_run("m")


def test_a_lost_session_is_told_by_the_next_call() -> None:
    heard = threading.Event()

    def gone(_: httpx.Request) -> httpx.Response:
        heard.set()
        return httpx.Response(404, json={"detail": "Unknown session"})

    wire = Wire(session_heartbeat=gone, forward_only=FORWARDED)
    with connected(wire, heartbeat_s=0.01) as service:
        run = service.create_run("m")
        assert heard.wait(10)

        def until_it_is_told() -> None:
            while True:
                run.forward([Feature(input_ids=[1])])

        with pytest.raises(SessionLost, match="Unknown session"):
            until_it_is_told()
    assert "finish" not in wire.paths


def test_heartbeats_go_on_through_what_passes() -> None:
    twice = threading.Semaphore(0)

    def busy(_: httpx.Request) -> httpx.Response:
        twice.release()
        return httpx.Response(500, json={"detail": "passing"})

    wire = Wire(session_heartbeat=busy, forward_only=FORWARDED)
    with connected(wire, heartbeat_s=0.01) as service:
        run = service.create_run("m")
        assert twice.acquire(timeout=10)
        assert twice.acquire(timeout=10)
        assert run.forward([Feature(input_ids=[1])]).loss == 1.5


def test_the_async_twins() -> None:
    wire = Wire(
        forward_backward=FORWARDED,
        sample={"samples": [{"sequences": [{"stop_reason": "stop", "tokens": [5]}]}]},
        session_heartbeat={},
    )

    async def use() -> None:
        async with AsyncService(
            "http://service.test",
            api_key="tml-key",
            heartbeat_s=60.0,
            transport=httpx.MockTransport(wire),
        ) as service:
            run = await service.create_run("m", name="main")
            assert (await run.forward_backward([Feature(input_ids=[1])])).loss == 1.5
            sampler = service.sampler("m", checkpoint=ADDRESS)
            (sample,) = await sampler.sample([Feature(input_ids=[1])], SamplingParams(max_tokens=1))
            assert sample.sequences[0].tokens == (5,)

    asyncio.run(use())
    assert wire.heard[3][1]["adapter_uri"] == ADDRESS
    assert wire.paths[-1] == "finish"


def test_a_stream_gives_its_text() -> None:
    lines = b'{"delta": "a", "finish_reason": null}\n{"delta": "b", "finish_reason": "stop"}\n'
    wire = Wire(sample_stream=httpx.Response(200, content=lines))
    with connected(wire) as service:
        assert list(service.sampler("m").stream(Feature(input_ids=[1]))) == ["a", "b"]


def test_a_stream_that_is_refused() -> None:
    wire = Wire(sample_stream=httpx.Response(400, json={"detail": "one input"}))
    with connected(wire) as service, pytest.raises(InvalidRequest, match="one input"):
        list(service.sampler("m").stream(Feature(input_ids=[1])))


def test_batches_end_where_the_rows_end() -> None:
    rows = iter([[{"a": 1}], [{"a": 2}]])

    def call(request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)["function"]
        if asked == "__len__":
            return httpx.Response(200, json={"result": 2})
        if asked == "__next__":
            row = next(rows, None)
            return httpx.Response(410) if row is None else httpx.Response(200, json={"result": row})
        return httpx.Response(200, json={"result": "ok"})

    wire = Wire(create={"processor_id": "pid:1"}, call=call)
    with connected(wire) as service:
        data = service.dataset(rows=[{"a": 1}, {"a": 2}])
        assert list(data.batches(1)) == [[{"a": 1}], [{"a": 2}]]
        with pytest.raises(ValueError, match="either path or rows"):
            service.dataset("a.jsonl", rows=[])
    meta = json.loads(wire.heard[1][1]["dataset_meta"])
    assert meta["data"] == [{"a": 1}, {"a": 2}]


def archive(*names: str) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 3
            tar.addfile(entry, io.BytesIO(b"abc"))
    return held.getvalue()


def served(content: bytes) -> Answer:
    return lambda _request: httpx.Response(200, content=content)


def test_a_download_is_whole_or_not_there(tmp_path: Path) -> None:
    names = ["adapter_config.json", "adapter_model.safetensors"]
    wire = Wire(archive=served(archive(*names)))
    with connected(wire) as service:
        files = service.download(ADDRESS, tmp_path / "to")
        assert [file.name for file in files] == names
        assert (tmp_path / "to" / names[0]).read_bytes() == b"abc"
        with pytest.raises(FileExistsError):
            service.download(ADDRESS, tmp_path / "to")
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == names


@pytest.mark.parametrize("content", [b"no archive", archive("../escaped")])
def test_an_archive_cannot_write_elsewhere(tmp_path: Path, content: bytes) -> None:
    wire = Wire(archive=served(content))
    with connected(wire) as service, pytest.raises(BadReply, match="cannot be read"):
        service.download(ADDRESS, tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []
    assert not (tmp_path / "escaped").exists()


def test_an_address_must_be_one() -> None:
    with connected(Wire()) as service, pytest.raises(ValueError, match="no twinkle://"):
        service.delete_checkpoint("weights/first")


def test_arrays_travel_as_lists() -> None:
    value = {"a": np.arange(2), "b": [np.float32(1.5)], "c": (Feature(input_ids=[1]),)}
    assert plain(value) == {"a": [0, 1], "b": [1.5], "c": [{"input_ids": [1]}]}


@pytest.mark.parametrize(
    ("prompt", "answer", "labels"),
    [
        ([1, 2], [3, 4], [-100, 3, 4, -100]),
        ([1, 2], [], [-100, -100]),
        ([], [3, 4], [4, -100]),
    ],
)
def test_labels_are_what_follows(prompt: list[int], answer: list[int], labels: list[int]) -> None:
    assert Feature.of(prompt, answer).labels == labels
