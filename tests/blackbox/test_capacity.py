"""Any number of runs on a server that has room for few of them."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.blackbox.conftest import MODEL
from tests.blackbox.data import batch, logprobs, train_one_step
from tests.blackbox.wire import Wire
from twinkle_dask import LocalService, local_service
from twinkle_dask.errors import StartupError

# Two servers; and a poll is held for 25 s.
pytestmark = pytest.mark.timeout(240)

NUM_RUNS = 30
# What a run of rank 4 counts while it trains on one thread, rounded up.
RUN_BYTES = 1_600_000


@contextmanager
def a_server(model_folder: Path, **engine: Any) -> Generator[LocalService]:
    with local_service(
        {MODEL: str(model_folder)},
        dtype="float32",
        engine={"deterministic": True, "threads": 1, **engine},
    ) as service:
        yield service


def files(scratch: Path) -> list[Path]:
    """Of runs that are not in memory."""
    return list(scratch.glob("**/twinkle-runs-*/*"))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the workers of an embedded cluster have their folders."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("DASK_TEMPORARY_DIRECTORY", str(folder))
    return folder


def train_all(service: LocalService, scratch: Path) -> tuple[list[np.ndarray], int]:
    """Two steps of each run, all of them in flight at once.

    Gives the logprobs that each run ends with, and how many were not in memory then.
    """
    with tinker.ServiceClient(base_url=service.url, api_key=service.api_key) as client:
        runs = [
            client.create_lora_training_client(MODEL, rank=4, seed=number).result()
            for number in range(NUM_RUNS)
        ]
        pending: list[Any] = []
        for step in range(2):
            for number, run in enumerate(runs):
                pending.append(run.forward_backward(batch(seed=number + step), "cross_entropy"))
                pending.append(run.optim_step(types.AdamParams(learning_rate=1e-2)))
        for future in pending:
            future.result()
        ends = [run.forward(batch(seed=99), "cross_entropy") for run in runs]
        found = [np.concatenate(logprobs(end.result())) for end in ends]
        return found, len(files(scratch))


def test_little_memory_changes_nothing(model_folder: Path, scratch: Path) -> None:
    """Thirty runs, each trained twice, where three fit; bit for bit as where all fit."""
    with a_server(model_folder) as service:
        expected, away = train_all(service, scratch)
        assert away == 0
    with a_server(model_folder, adapter_bytes=3 * RUN_BYTES) as service:
        actual, away = train_all(service, scratch)
        assert away > NUM_RUNS // 2
    assert not files(scratch)
    for one, other in zip(actual, expected, strict=True):
        assert one.tobytes() == other.tobytes()


def test_who_waits_for_room_is_told_and_then_gets_it(model_folder: Path, scratch: Path) -> None:
    """An idle run cannot leave, since its disk fails; whoever wants its place waits for that."""
    with (
        a_server(model_folder, adapter_bytes=RUN_BYTES) as service,
        tinker.ServiceClient(base_url=service.url, api_key=service.api_key) as client,
        Wire(service.url, service.api_key) as wire,
    ):
        run = client.create_lora_training_client(MODEL, rank=4, seed=1).result()
        train_one_step(run, batch())
        (folder,) = scratch.glob("**/twinkle-runs-*")
        folder.rmdir()
        waiting = client.create_lora_training_client(MODEL, rank=4, seed=2)
        session = wire.post(
            "create_session", {"tags": [], "sdk_version": "0.38.0", "user_metadata": {}}
        ).json()["session_id"]
        request = wire.promise(
            "create_model",
            {
                "session_id": session,
                "model_seq_id": 0,
                "base_model": MODEL,
                "lora_config": {"rank": 4, "seed": 3},
            },
        )
        # Those who are there go on meanwhile.
        train_one_step(run, batch())
        answer = wire.post("retrieve_future", {"request_id": request})
        assert answer.status_code == 408
        assert answer.json()["queue_state"] == "paused_capacity"
        assert "engine.adapter_bytes" in answer.json()["queue_state_reason"]
        train_one_step(run, batch())
        folder.mkdir()
        assert "model_id" in wire.result(request)
        train_one_step(waiting.result(), batch())
        train_one_step(run, batch())


def test_a_run_whose_file_is_damaged_is_set_up_again(model_folder: Path, scratch: Path) -> None:
    """From the journal, without anybody noticing."""
    with (
        a_server(model_folder, adapter_bytes=RUN_BYTES) as service,
        tinker.ServiceClient(base_url=service.url, api_key=service.api_key) as client,
    ):
        first, second = (
            client.create_lora_training_client(MODEL, rank=4, seed=1).result() for _ in range(2)
        )
        for run in (first, second):
            train_one_step(run, batch())
        (file,) = files(scratch)
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
        assert train_one_step(first, batch()) == train_one_step(second, batch())


def test_a_run_that_would_not_fit_alone_is_refused(model_folder: Path) -> None:
    with (
        a_server(model_folder, adapter_bytes=RUN_BYTES) as service,
        tinker.ServiceClient(base_url=service.url, api_key=service.api_key) as client,
    ):
        with pytest.raises(tinker.RequestFailedError, match=r"engine\.adapter_bytes"):
            client.create_lora_training_client(MODEL, rank=8).result()
        run = client.create_lora_training_client(MODEL, rank=4).result()
        train_one_step(run, batch())


def test_a_bound_that_means_nothing_here_is_refused(model_folder: Path) -> None:
    with (
        pytest.raises(StartupError, match="adapter_host_bytes is for hosts with a GPU"),
        a_server(model_folder, adapter_host_bytes=10**9),
    ):
        pass
