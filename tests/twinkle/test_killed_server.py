"""What was answered stays done when the whole server is killed, and comes back where it was."""

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
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
from twinkle_client.model import MultiLoraTransformersModel

from tests.blackbox.servers import free_port
from tests.twinkle.conftest import KEY, MODEL
from twinkle_dask.local import LocalService

pytestmark = pytest.mark.timeout(240)

ROWS = [{"n": i} for i in range(12)]


@pytest.fixture
def start(start_service: Callable[..., Any], tmp_path: Path) -> Callable[[], Any]:
    """The same service again: one data folder and one address, so that clients just go on."""
    settings = {
        "data_dir": tmp_path / "kept",
        "port": free_port(),
        "journal": {"snapshot_operations": 3},
        "upload_roots": [str(tmp_path / "uploads")],
    }
    return lambda: start_service(**settings)


def kill(service: LocalService) -> None:
    """Kill the server, and wait until its workers have noticed."""
    children = psutil.Process(service.pid).children(recursive=True)
    os.kill(service.pid, signal.SIGKILL)
    assert not psutil.wait_procs(children, timeout=60)[1]


def prepared(name: str, path: str | None = None) -> MultiLoraTransformersModel:
    model = MultiLoraTransformersModel(MODEL)
    model.add_adapter_to_model(name, lora(), gradient_accumulation_steps=2)
    model.set_loss("CrossEntropyLoss", reduction="mean")
    model.set_optimizer("AdamW", lr=1e-2, weight_decay=0.1)
    model.set_lr_scheduler("CosineWarmupScheduler", num_warmup_steps=2, num_training_steps=20)
    if path is not None:
        model.load(path, load_optimizer=True)
    return model


def begin_split(model: MultiLoraTransformersModel) -> float:
    """One more batch by its parts: it waits for ``backward``."""
    model.forward(inputs=BATCH)
    return model.calculate_loss().result


def end_split(model: MultiLoraTransformersModel) -> None:
    model.backward()
    model.clip_grad_and_step()


def told(model: MultiLoraTransformersModel) -> dict[str, Any]:
    """The metrics of training, but for the clock's."""
    result = model.calculate_metric().result
    return {k: v for k, v in result.items() if k not in {"total time elapse", "speed"}}


def test_training_goes_on_as_if_nothing_had_happened(start: Callable[[], Any]) -> None:
    """Accumulated gradient, a batch that waits, moments, schedule, metrics, a loader's place."""
    with start() as service:
        client = init_twinkle_client(base_url=service.url, api_key=KEY)
        first = prepared("first")
        step(first, 4)
        saved = first.save("start", save_optimizer=True).twinkle_path
        undisturbed, disturbed = prepared("undisturbed", saved), prepared("disturbed", saved)
        expected = [*step(undisturbed, 3), begin_split(undisturbed)]
        end_split(undisturbed)
        expected += step(undisturbed, 3)

        loader = iter(DataLoader(Dataset(DatasetMeta(data=ROWS)), batch_size=3))
        seen = [row["n"] for _ in range(2) for row in next(loader)]
        # An odd number of batches: a gradient waits for its other half.
        losses = [*step(disturbed, 3), begin_split(disturbed)]
        kill(service)
    with start():
        end_split(disturbed)
        losses += step(disturbed, 3)
        # Exactly, since the same is computed again from the same snapshot in the same order.
        assert losses == expected
        assert told(disturbed) == told(undisturbed)
        # Not `for batch in loader`, which would begin a new epoch.
        seen += [row["n"] for _ in range(2) for row in next(loader)]
        assert seen == list(range(12))
        with pytest.raises(StopIteration):
            next(loader)
        client.close()


def test_a_save_that_is_cut_off_leaves_nothing_half(start: Callable[[], Any]) -> None:
    """A checkpoint is listed and can be loaded, or it is not listed."""
    with start() as service:
        client = init_twinkle_client(base_url=service.url, api_key=KEY)
        model = prepared("main")
        step(model, 2)
        model.save("first", save_optimizer=True)

        def save() -> None:
            with suppress(requests.RequestException):
                for number in range(10_000):
                    model.save(f"n{number}", save_optimizer=True)

        thread = threading.Thread(target=save)
        thread.start()
        time.sleep(0.3)
        kill(service)
        thread.join()
    with start():
        found = client.list_checkpoints(f"{client._session_id}-main")
        assert found
        for one in found[-3:]:
            model.resume_from_checkpoint(one.twinkle_path)
        step(model, 2)
        client.close()


def test_uploads_are_taken_up_again(start: Callable[[], Any], tmp_path: Path) -> None:
    """As they stand when a server is killed in the middle of them: made so in its database."""
    with start() as service:
        client = init_twinkle_client(base_url=service.url, api_key=KEY)
        model = prepared("main")
        body = {"checkpoint_dir": model.save("sent").twinkle_path, "hub_model_id": "acme/adapter"}
        headers = {"Authorization": f"Bearer {KEY}", "X-Twinkle-Session-Id": client._session_id}
        url = f"{model.server_url}/upload_to_hub"
        upload, to_hub = (
            requests.post(url, json=body, headers=headers).json()["request_id"] for _ in range(2)
        )
        assert ended(model, upload, headers) == ended(model, to_hub, headers) == ("completed", None)
    (folder,) = (tmp_path / "uploads").glob("*/acme/adapter")
    (folder / "adapter_model.safetensors").unlink()
    database = sqlite3.connect(tmp_path / "kept" / "twinkle_dask.sqlite3")
    with database:
        database.execute("UPDATE uploads SET state = 'running'")
        database.execute("UPDATE uploads SET target = 'hub:acme/x' WHERE id = ?", (to_hub,))
    database.close()
    with start():
        assert ended(model, upload, headers) == ("completed", None)
        assert (folder / "adapter_model.safetensors").is_file()
        state, error = ended(model, to_hub, headers)
        assert state == "failed"
        assert "start the upload again" in str(error)
        client.close()


def ended(
    model: MultiLoraTransformersModel, upload: str, headers: dict[str, str]
) -> tuple[str, str | None]:
    """How an upload ends."""
    while True:
        answer = requests.get(f"{model.server_url}/upload_status/{upload}", headers=headers)
        assert answer.status_code == 200
        if answer.json()["status"] != "running":
            return answer.json()["status"], answer.json()["error"]
        time.sleep(0.05)
