"""The ``tinker`` command as a person starts it: models, runs, and what it says when refused.

Its other commands stand with what they work on: ``auth`` in test_auth, ``billing`` and ``session``
in test_records, ``checkpoint`` in test_sharing.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import tinker

from tests.blackbox.accounts import tinker_cli
from tests.blackbox.conftest import ALIAS, KEY, MODEL, OTHER_KEY
from twinkle_dask import LocalService

pytestmark = pytest.mark.timeout(120)  # each command starts a program


@pytest.fixture
def command(service: LocalService, tmp_path: Path) -> Any:
    """Runs one with a tenant's key; gives what it printed and how it ended."""

    def run(*arguments: str, key: str = KEY) -> tuple[str, int]:
        ended = tinker_cli(service, key, tmp_path, *arguments)
        return ended.stdout + ended.stderr, ended.returncode

    return run


@pytest.fixture
def run(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return client.create_lora_training_client(MODEL, rank=5).result()


def test_cli_tells_its_version(command: Any) -> None:
    told, status = command("version")
    assert importlib.metadata.version("tinker") in told
    assert status == 0


def test_13_cli_lists_the_models(command: Any) -> None:
    told, status = command("--format", "json", "model", "list")
    assert {model["model_name"] for model in json.loads(told)["models"]} == {MODEL, ALIAS}
    assert status == 0
    found, _ = command("model", "list", "ALIAS")
    assert ALIAS in found
    missing, status = command("model", "list", "nothing-like-it")
    assert "No model name contains 'nothing-like-it' for organization" in missing
    assert status == 1


def test_60_cli_lists_runs(command: Any, run: tinker.TrainingClient) -> None:
    run.save_state("ck").result()
    told, status = command("--format", "json", "run", "list", "--limit", "1")
    (listed,) = json.loads(told)["runs"]
    assert listed["training_run_id"] == run.model_id
    assert (listed["base_model"], listed["lora_rank"]) == (MODEL, 5)
    assert status == 0
    table, _ = command("run", "list", "--limit", "0", "--columns", "model,lora,status,checkpoint")
    assert "weights/ck" in table
    assert "Rank 5" in table
    others, _ = command("--format", "json", "run", "list", "--limit", "0", key=OTHER_KEY)
    assert run.model_id not in others


def test_60_cli_describes_a_run(command: Any, run: tinker.TrainingClient) -> None:
    told, status = command("--format", "json", "run", "info", run.model_id)
    assert json.loads(told)["training_run_id"] == run.model_id
    assert status == 0
    for_other, status = command("run", "info", run.model_id, key=OTHER_KEY)
    assert "not found" in for_other.lower()
    assert status == 1


def test_03_cli_refuses_a_wrong_key(command: Any) -> None:
    told, status = command("auth", "status", key="tml-nobody-knows-it")
    assert "Credentials available: yes" in told
    assert "Tinker accessible: no" in told
    assert status == 1
    told, status = command("run", "list", key="tml-nobody-knows-it")
    assert "This API key is not known here" in told
    assert status == 1
