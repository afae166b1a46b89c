"""What happens by itself: sessions expire, delivered results and spent journal entries go."""

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import tinker

from tests.blackbox.conftest import MODEL
from tests.blackbox.data import batch, logprobs, train_one_step
from twinkle_dask import LocalService, local_service

pytestmark = pytest.mark.timeout(120)


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def blobs(service: LocalService, kind: str) -> list[Path]:
    return [path for path in service.data_dir.glob(f"blobs/{kind}/**/*") if path.is_file()]


def num_kept(service: LocalService, column: str) -> int:
    """How many operations the journal has with a ``payload`` or a ``result``."""
    query = f"SELECT count(*) FROM operations WHERE coalesce({column}, {column}_path) NOT NULL"
    with closing(sqlite3.connect(service.data_dir / "twinkle_dask.sqlite3")) as database:
        number: int = database.execute(query).fetchone()[0]
    return number


def test_what_is_no_longer_needed_goes(model_folder: Path) -> None:
    journal = {"snapshot_operations": 2, "keep_delivered_s": 0.5, "prune_interval_s": 0.5}
    limits = {"session_timeout_s": 8.0}
    with local_service(
        {MODEL: str(model_folder)}, journal=journal, limits=limits, dtype="float32"
    ) as service:
        client = tinker.ServiceClient(base_url=service.url, api_key=service.api_key)
        run = client.create_lora_training_client(MODEL, rank=2).result()
        data = batch()
        for _ in range(6):
            train_one_step(run, data)
        expected = logprobs(run.forward(data, "cross_entropy").result())
        # Results were delivered, and a snapshot contains what the journal held, but for a step that
        # is not worth one yet, and the last operation, which tells where the run's order stands.
        until(lambda: num_kept(service, "result") <= 2)
        until(lambda: num_kept(service, "payload") <= 2)
        until(lambda: len({path.parent for path in blobs(service, "snapshots")}) == 1)
        saved = run.save_state("kept").result().path
        sampler = run.save_weights_and_get_sampling_client().result()
        prompt, once = tinker.ModelInput.from_ints([1, 2, 3]), tinker.SamplingParams(max_tokens=2)
        sampler.sample(prompt, 1, once).result()
        assert len({path.parent for path in blobs(service, "checkpoints")}) == 2
        headers = {"x-api-key": service.api_key}

        def ended() -> bool:
            # The SDK's heartbeat comes every 10 s, which is too late here.
            url = f"{service.url}/api/v1/session_heartbeat"
            session = run.model_id.split(":")[0]
            time.sleep(8.5)
            beat = httpx.post(url, headers=headers, json={"session_id": session})
            return beat.status_code == 410

        until(ended, 60)
        with pytest.raises(tinker.BadRequestError, match=r"(?i)session"):
            run.forward(data, "cross_entropy").result()
        # Nothing can be asked of the run any more, so only the named checkpoint is left of it.
        until(lambda: not blobs(service, "snapshots"))
        for column in ("payload", "result"):
            until(lambda column=column: not num_kept(service, column))
        until(lambda: len({path.parent for path in blobs(service, "checkpoints")}) == 1)
        with tinker.ServiceClient(base_url=service.url, api_key=service.api_key) as second:
            resumed = second.create_training_client_from_state(saved).result()
            again = logprobs(resumed.forward(data, "cross_entropy").result())
        for one, other in zip(expected, again, strict=True):
            assert one == pytest.approx(other, abs=1e-5)
