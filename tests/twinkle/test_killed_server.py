"""Saves and uploads when the whole server is killed; see also ``test_killed.py``."""

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
from adapters import lora, step
from twinkle_client import init_twinkle_client
from twinkle_client.model import MultiLoraTransformersModel

from tests.blackbox.servers import free_port
from tests.twinkle.conftest import KEY, MODEL
from twinkle_dask.local import LocalService

pytestmark = pytest.mark.timeout(240)


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


def prepared() -> MultiLoraTransformersModel:
    model = MultiLoraTransformersModel(MODEL)
    model.add_adapter_to_model("main", lora())
    model.set_loss("CrossEntropyLoss")
    model.set_optimizer("AdamW", lr=1e-2)
    return model


def test_a_save_that_is_cut_off_leaves_nothing_half(start: Callable[[], Any]) -> None:
    """A checkpoint is listed and can be loaded, or it is not listed."""
    with start() as service:
        client = init_twinkle_client(base_url=service.url, api_key=KEY)
        model = prepared()
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
        model = prepared()
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
