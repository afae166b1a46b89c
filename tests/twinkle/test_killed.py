"""Nothing acknowledged is lost, whatever is killed, and nothing is done twice behind the client."""

import json
import os
import re
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from adapters import BATCH, lora, step
from twinkle.dataset import DatasetMeta
from twinkle_client import init_twinkle_client
from twinkle_client.dataloader import DataLoader
from twinkle_client.dataset import Dataset
from twinkle_client.manager import TwinkleClient
from twinkle_client.model import MultiLoraTransformersModel
from twinkle_client.sampler import vLLMSampler

from tests.twinkle.conftest import KEY, MODEL
from twinkle_dask.local import LocalService

# Starts with model loading, twice, on busy cores.
pytestmark = pytest.mark.timeout(240)

#: After a loss all runs are computed anew at the same time: with passes of their own each is so to
#: the bit, else to the rounding of sums in another order.
SETTINGS = {"journal": {"snapshot_operations": 5}, "engine": {"deterministic": True}}
#: Takes the tiny model a good part of a second, so that a kill comes in between.
LONG = [
    {"input_ids": [3 + (i * j) % 200 for j in range(400)], "labels": [5] * 400} for i in range(16)
]
NAMES = {"model_name": "Ada", "model_author": "Lab"}
#: What an adapter is trained by; every part of it leaves something behind for the next.
STORY: list[Callable[[MultiLoraTransformersModel], Any]] = [
    lambda model: model.forward_backward(inputs=BATCH).result,
    lambda model: model.clip_grad_and_step(),
    lambda model: model.forward_backward(inputs=[BATCH[1]]).result,
    lambda model: model.clip_grad_and_step(),
    lambda model: model.forward_backward(inputs=[BATCH[0]]).result,
    lambda model: model.forward(inputs=BATCH).result,
    lambda model: model.calculate_loss().result,
    lambda model: model.backward(),
    lambda model: model.clip_grad_norm().result,
    lambda model: model.step(),
    lambda model: told(model),
    lambda model: model.zero_grad(),
    lambda model: model.lr_step(),
    *[
        lambda model: model.forward_backward(inputs=BATCH).result,
        lambda model: model.clip_grad_and_step(),
    ]
    * 4,
    lambda model: told(model),
    lambda model: model.get_train_configs().result,
    lambda model: model.get_state_dict().result,
]
#: Before ``backward``: half a window's gradient, a batch that waits with its loss, full metrics.
HALF = 7
HALF_MADE = ("half-made", "half-begun")


def told(model: MultiLoraTransformersModel) -> dict[str, Any]:
    """What the metrics say, without what depends on the clock."""
    values = dict(model.calculate_metric().result)
    return {name: values[name] for name in values if name not in ("total time elapse", "speed")}


def prepared(name: str, start: str | None = None) -> MultiLoraTransformersModel:
    """An adapter with all settings made; equal to all others that begin at ``start``."""
    model = MultiLoraTransformersModel(MODEL)
    model.add_adapter_to_model(name, lora(), gradient_accumulation_steps=2)
    model.set_template("Template")
    model.set_loss("CrossEntropyLoss", reduction="mean")
    model.set_optimizer("AdamW", lr=1e-2)
    model.set_lr_scheduler("CosineWarmupScheduler", num_warmup_steps=2, num_training_steps=20)
    if start is not None:
        model.load(start)
    return model


def played(model: MultiLoraTransformersModel, story: Any = STORY) -> list[Any]:
    return [act(model) for act in story]


def counted(model: MultiLoraTransformersModel) -> tuple[int, int]:
    """Optimizer steps, and backward passes since then, as ``get_train_configs`` tells them."""
    text = model.get_train_configs().result
    steps, passes = re.findall(r"(?:steps taken|passes since then): (\d+)", text)
    return int(steps), int(passes)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def workers(service: LocalService) -> list[psutil.Process]:
    """The service's processes, those with most memory last: the host, which has the model."""
    children = psutil.Process(service.pid).children(recursive=True)
    return sorted(children, key=lambda child: child.memory_info().rss)


def kill_host(service: LocalService) -> None:
    workers(service)[-1].kill()


def kill_cpu_worker(service: LocalService) -> None:
    """Whoever has more memory than a bare Python, and is not the host."""
    (killed,) = (one for one in workers(service)[:-1] if one.memory_info().rss > 60 * 2**20)
    killed.kill()


def eventually(what: Callable[[], bool], timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def run(client: TwinkleClient, name: str) -> str:
    return f"{client._session_id}-{name}"


def headers(client: TwinkleClient) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}", "X-Twinkle-Session-Id": client._session_id}


def streamed(
    service: LocalService, client: TwinkleClient, kill: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """A stream of many samples; ``kill`` is called once it has begun."""
    body = {
        "inputs": [{"input_ids": [5, 6, 7]}],
        "sampling_params": {"max_tokens": 500, "seed": 4, "stop": [4095], "num_samples": 8},
    }
    url = f"{service.url}/api/v1/sampler/{MODEL}/twinkle/sample_stream"
    lines: list[dict[str, Any]] = []
    with requests.post(url, json=body, headers=headers(client), stream=True, timeout=60) as answer:
        for line in answer.iter_lines(chunk_size=1):
            lines.append(json.loads(line))
            if kill is not None and len(lines) == 3:
                kill()
    return lines


def drawn(lines: list[dict[str, Any]]) -> dict[int, tuple[list[int], str]]:
    """Tokens and text of each sample."""
    samples: dict[int, tuple[list[int], str]] = {}
    for line in lines:
        tokens, text = samples.get(line["index"], ([], ""))
        samples[line["index"]] = (tokens + line["tokens"], text + line["delta"])
    return samples


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Any]) -> Generator[LocalService]:
    with start_service(**SETTINGS) as running:
        yield running


@pytest.fixture(scope="module")
def threads() -> Generator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_a_host_that_is_killed_between_and_during_calls_does_not_show(
    service: LocalService, client: TwinkleClient, threads: ThreadPoolExecutor
) -> None:
    start = prepared("start").save("start").twinkle_path
    undisturbed, disturbed = prepared("undisturbed", start), prepared("disturbed", start)
    others = [prepared(name, start) for name in ("gradient", "stepping", "saving")]
    for model in others:
        step(model)
    expected = played(undisturbed)
    answers = played(disturbed, STORY[:HALF])
    plain = streamed(service, client)

    # Calls under way are answered as if nothing had happened; so is a stream.
    gradient, stepping, saving = others
    calls: list[Future[Any]] = []

    def kill() -> None:
        calls.append(threads.submit(gradient.forward_backward, inputs=LONG))
        calls.append(threads.submit(stepping.clip_grad_and_step))
        calls.append(threads.submit(saving.save, "during", save_optimizer=True))
        time.sleep(0.05)
        kill_host(service)

    broken = streamed(service, client, kill)
    assert drawn(broken) == drawn(plain)
    done = [call.result() for call in calls]
    answers += played(disturbed, STORY[HALF:])
    assert answers == expected

    # Each was done once.
    assert counted(gradient) == (0, 2)
    assert counted(stepping) == (0, 1)  # between boundaries nothing happens
    twin = prepared("twin", start)
    step(twin)
    assert done[0].result == twin.forward_backward(inputs=LONG).result
    gradient.clip_grad_and_step()
    twin.clip_grad_and_step()
    assert gradient.get_state_dict().result == twin.get_state_dict().result
    assert [one.checkpoint_id for one in client.list_checkpoints(run(client, "saving"))] == [
        "weights/during"
    ]
    gradient.load(done[2].twinkle_path, load_optimizer=True)


def rows(number: int) -> list[dict[str, Any]]:
    return [
        {"query": f"Who, {{{{NAME}}}} {i}?", "response": "By {{AUTHOR}}."} for i in range(number)
    ]


def test_a_cpu_worker_that_is_killed_between_and_during_calls_does_not_show(
    service: LocalService, client: TwinkleClient, threads: ThreadPoolExecutor
) -> None:
    undisturbed, disturbed = (Dataset(DatasetMeta(data=rows(3000))) for _ in range(2))
    for dataset in (undisturbed, disturbed):
        mapping = threads.submit(dataset.map, "SelfCognitionProcessor", init_args=NAMES)
        if dataset is disturbed:
            time.sleep(0.02)
            kill_cpu_worker(service)
        mapping.result()
    loaders = [
        DataLoader(dataset, batch_size=700, shuffle=True, seed=3)
        for dataset in (undisturbed, disturbed)
    ]
    expected = list(loaders[0])
    iter(loaders[1])
    given = [next(loaders[1])]
    following = threads.submit(next, loaders[1])
    time.sleep(0.01)
    kill_cpu_worker(service)
    given.append(following.result())
    assert loaders[1].get_state() == {"consumed_train_samples": 1400}
    given += [next(loaders[1]) for _ in range(3)]
    assert given == expected


@pytest.fixture
def restartable(
    start_service: Callable[..., Any], tmp_path: Path
) -> Generator[tuple[LocalService, Callable[[], None]]]:
    """A service of one's own, and what kills it and starts another at the same address."""
    targets = tmp_path / "targets"
    targets.mkdir()
    settings = {
        "data_dir": tmp_path / "data",
        "port": free_port(),
        "upload_roots": [str(targets)],
        **SETTINGS,
    }
    with ExitStack() as stack:
        service = stack.enter_context(start_service(**settings))

        def restart() -> None:
            processes = workers(service)
            os.kill(service.pid, signal.SIGKILL)
            psutil.wait_procs(processes, timeout=30)
            unmake(tmp_path / "data" / "twinkle_dask.sqlite3")
            stack.enter_context(start_service(**settings))

        yield service, restart


def unmake(file: Path) -> None:
    """Have two adapters stand as they do when the server is killed while they are made."""
    database = sqlite3.connect(file)
    with database:
        database.execute("DELETE FROM run_settings WHERE run_id LIKE '%-half-%'")
        database.execute("DELETE FROM operations WHERE run_id LIKE '%-half-begun'")
        database.execute("UPDATE runs SET state = 'creating' WHERE id LIKE '%-half-begun'")
    database.close()


def lost(call: Future[Any]) -> bool:
    """Whether a call has no answer; then nobody was told that it was done, or that it was not."""
    try:
        call.result()
    except requests.ConnectionError:
        return True
    return False


def test_a_server_that_is_killed_goes_on_where_it_was(
    restartable: tuple[LocalService, Callable[[], None]],
    threads: ThreadPoolExecutor,
    tmp_path: Path,
) -> None:
    service, restart = restartable
    client = init_twinkle_client(base_url=service.url, api_key=KEY)
    start = prepared("start").save("start").twinkle_path
    undisturbed, disturbed = prepared("undisturbed", start), prepared("disturbed", start)
    gradient, stepping, saving, twin = others = [
        prepared(name, start) for name in ("gradient", "stepping", "saving", "twin")
    ]
    for model in others:
        model.forward_backward(inputs=BATCH)
    stepping.forward_backward(inputs=LONG)
    twin.forward_backward(inputs=LONG)
    expected = played(undisturbed)
    answers = played(disturbed, STORY[:HALF])
    sampler = vLLMSampler(MODEL)
    sampler.set_template("Template")
    dataset = Dataset(DatasetMeta(data=rows(10)))
    loaders = [DataLoader(dataset, batch_size=2, shuffle=True, seed=3) for _ in range(2)]
    mapping = Dataset(DatasetMeta(data=rows(3000)))
    batches = list(loaders[0])
    iter(loaders[1])
    given = [next(loaders[1]) for _ in range(2)]
    for name in HALF_MADE:
        prepared(name)
    adding = MultiLoraTransformersModel(MODEL)
    calls: list[Future[Any]] = []
    uploads: list[str] = []

    def kill() -> None:
        calls.append(threads.submit(gradient.forward_backward, inputs=LONG))
        calls.append(threads.submit(stepping.clip_grad_and_step))
        calls.append(threads.submit(saving.save, "during", save_optimizer=True))
        calls.append(threads.submit(adding.add_adapter_to_model, "adding", lora()))
        calls.append(threads.submit(mapping.map, "SelfCognitionProcessor", init_args=NAMES))
        body = {"checkpoint_dir": start, "hub_model_id": "acme/sent", "async_upload": True}
        url = f"{adding.server_url}/upload_to_hub"
        answer = requests.post(url, json=body, headers=headers(client), timeout=60)
        uploads.append(answer.json()["request_id"])
        restart()

    with pytest.raises(requests.RequestException):  # a broken answer, not one that seems whole
        streamed(service, client, kill)
    unanswered = [lost(call) for call in calls]

    # What was answered is there, to the bit, in the same session.
    answers += played(disturbed, STORY[HALF:])
    assert answers == expected
    assert given + [next(loaders[1]) for _ in range(3)] == batches
    talk = [{"messages": [{"role": "user", "content": "Hello?"}]}]
    assert sampler.sample(talk, {"max_tokens": 2})  # the template is still set
    status = f"{adding.server_url}/upload_status/{uploads[0]}"
    eventually(
        lambda: (
            requests.get(status, headers=headers(client), timeout=60).json()["status"]
            == "completed"
        )
    )
    (sent,) = (tmp_path / "targets").glob("*/acme/sent")
    assert (sent / "adapter_model.safetensors").is_file()

    # A data set is changed as a whole or not at all.
    (mapped,) = {"messages" in mapping[number] for number in (0, 1500, 2999)}
    assert mapped or unanswered[4]

    # An adapter of which nobody was told does not keep its name.
    for name in HALF_MADE:
        step(prepared(name))
    if not unanswered[3]:
        adding.forward_backward(inputs=BATCH)

    # What was not answered was done as a whole or not at all, and the client can see which.
    assert counted(gradient) in ([(0, 1), (0, 2)] if unanswered[0] else [(0, 2)])
    if counted(gradient) == (0, 1):
        gradient.forward_backward(inputs=LONG)
    gradient.clip_grad_and_step()
    assert counted(stepping) in ([(0, 2), (1, 0)] if unanswered[1] else [(1, 0)])
    if counted(stepping) == (0, 2):
        stepping.clip_grad_and_step()
    twin.clip_grad_and_step()
    assert counted(gradient) == counted(stepping) == counted(twin) == (1, 0)
    states = [model.get_state_dict().result for model in (gradient, stepping, twin)]
    assert states[0] == states[1] == states[2]
    found = [one.checkpoint_id for one in client.list_checkpoints(run(client, "saving"))]
    assert found in ([[], ["weights/during"]] if unanswered[2] else [["weights/during"]])
    if found:
        twin.load(f"twinkle://{run(client, 'saving')}/weights/during", load_optimizer=True)
    saving.save("during")
    assert len(client.list_checkpoints(run(client, "saving"))) == 1
    client.close()
