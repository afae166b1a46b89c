"""Items 89 and 90: SDK 0.16.1 (JSON) and 0.25.0 (Protobuf) go through a whole session.

Each runs ``tests/clients/older_sdk.py`` once, in its own environment; the tests look at what it
got.
"""

import json
import math
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import tinker

from tests.blackbox.conftest import KEY, MODEL
from tests.blackbox.other_clients import CLIENTS, python_of, run_client
from twinkle_dask import LocalService

Told = dict[str, Any]


def walked(version: str, service: LocalService, folder: Path) -> Told:
    script = str(CLIENTS / "older_sdk.py")
    output = run_client(
        f"tinker-{version}", [script, MODEL], url=service.url, api_key=KEY, folder=folder
    )
    told: Told = json.loads(output.splitlines()[-1])
    assert told["version"] == version
    return told


@pytest.fixture(scope="module", autouse=True)
def an_export(service: LocalService) -> str:
    """Something in their tenant's lists that they have no word for."""
    with tinker.ServiceClient(base_url=service.url, api_key=KEY) as client:
        run = client.create_lora_training_client(MODEL, rank=4).result()
        return run.save_weights_external("export").result().path


@pytest.fixture(scope="module")
def oldest(service: LocalService, tmp_path_factory: pytest.TempPathFactory) -> Told:
    return walked("0.16.1", service, tmp_path_factory.mktemp("tinker-0.16.1"))


@pytest.fixture(scope="module")
def older(service: LocalService, tmp_path_factory: pytest.TempPathFactory) -> Told:
    return walked("0.25.0", service, tmp_path_factory.mktemp("tinker-0.25.0"))


def close(expected: object) -> Any:
    return pytest.approx(expected, rel=1e-4, abs=1e-4)  # pyright: ignore[reportUnknownMemberType]


def test_a_missing_environment_names_its_make_target() -> None:
    with pytest.raises(FileNotFoundError, match="make clients"):
        python_of("tinker-0.0.0")


@pytest.mark.parametrize("told", ["oldest", "older"])
def test_90_lists_leave_out_what_they_cannot_read(
    told: str, an_export: str, request: pytest.FixtureRequest
) -> None:
    listed = request.getfixturevalue(told)["all_listed"]
    assert listed
    assert an_export not in listed


# ---- what they ask for


def test_89_the_oldest_sdk_asks_as_it_always_did(oldest: Told) -> None:
    asked = set(oldest["requests"])
    assert "POST /api/v1/forward" in asked
    assert "POST /api/v1/load_weights" in asked
    assert not {"POST /api/v1/client/config", "POST /api/v1/auth/token"} & asked


def test_90_the_older_sdk_loads_after_it_created(older: Told) -> None:
    asked = set(older["requests"])
    assert "POST /api/v1/forward" not in asked
    assert {"POST /api/v1/create_model", "POST /api/v1/load_weights"} <= asked


# ---- what they get


def check_training(told: Told) -> None:
    assert told["info"] == {"model": MODEL, "rank": 4}
    flat = [lp for each in told["first_logprobs"] for lp in each]
    assert told["first_loss"] == close(-math.fsum(flat))
    assert told["losses"][0] == close(told["first_loss"])  # forward left no gradient behind
    assert told["losses"] == sorted(told["losses"], reverse=True)
    assert told["losses"][-1] < 0.8 * told["losses"][0]
    assert told["loss_with_defaults"] < told["losses"][-1]
    assert told["optim_metrics"]["grad_norm:mean"] > 0


def test_89_the_oldest_sdk_trains(oldest: Told) -> None:
    check_training(oldest)


def test_90_the_older_sdk_trains(older: Told) -> None:
    check_training(older)


def check_custom_loss(told: Told) -> None:
    # The custom loss is the negative sum of the logprobs, which is what cross_entropy minimizes.
    assert told["custom_metrics"]["custom"] == close(told["first_loss"])
    assert told["custom_loss_after"] == close(told["losses"][1])


def test_89_the_oldest_sdk_brings_its_own_loss(oldest: Told) -> None:
    check_custom_loss(oldest)


def test_90_the_older_sdk_brings_its_own_loss(older: Told) -> None:
    check_custom_loss(older)


def check_checkpoints(told: Told) -> None:
    assert told["state"] == f"tinker://{told['run_id']}/weights/kept"
    for loaded in ("loss_resumed", "loss_from_state", "loss_loaded"):
        assert told[loaded] == close(told["loss_at_save"])
    assert told["next_resumed"] == close(told["next_straight"])


def test_89_the_oldest_sdk_saves_and_loads(oldest: Told) -> None:
    check_checkpoints(oldest)


def test_90_the_older_sdk_saves_and_loads(older: Told) -> None:
    check_checkpoints(older)


def check_sampling(told: Told) -> None:
    assert told["compute_logprobs"][0] is None
    assert told["compute_logprobs"][1:] == close(told["trained_logprobs"][0])
    assert told["prompt_logprobs"][1:] == close(told["compute_logprobs"][1:])
    assert told["base"][1:] == close(told["first_logprobs"][0])
    first, second = told["sequences"]
    assert first["tokens"] == second["tokens"] == told["ephemeral"]
    assert len(first["logprobs"]) == len(first["tokens"]) <= 5
    assert first["stop_reason"] in {"length", "stop"}


def test_89_the_oldest_sdk_samples(oldest: Told) -> None:
    check_sampling(oldest)


def test_90_the_older_sdk_samples(older: Told) -> None:
    check_sampling(older)


def check_topk(told: Told) -> None:
    assert told["topk"][0] is None
    assert [len(each) for each in told["topk"][1:]] == [2] * 13
    for (_, best), (_, next_best) in told["topk"][1:]:
        assert best >= next_best


def test_89_the_oldest_sdk_sees_alternatives_to_the_prompt(oldest: Told) -> None:
    check_topk(oldest)


def test_90_the_older_sdk_sees_alternatives_to_the_prompt(older: Told) -> None:
    check_topk(older)


def check_records(told: Told) -> None:
    assert MODEL in told["capabilities"]
    assert told["run"] == MODEL
    assert told["run_id"] in told["runs"]
    assert told["run_id"] in told["session_runs"]
    assert told["sessions"]
    saved = {told["state"], told["sampler_path"]}
    assert saved <= set(told["listed"])
    assert saved <= set(told["all_listed"])
    assert told["weights_info"]["base_model"] == MODEL
    assert told["weights_info"]["lora_rank"] == 4
    assert told["published"] is True
    assert told["state"] not in told["listed_after_delete"]
    assert told["sampler_path"] in told["listed_after_delete"]


def test_89_the_oldest_sdk_lists_and_keeps_its_checkpoints(oldest: Told) -> None:
    check_records(oldest)


def test_90_the_older_sdk_lists_and_keeps_its_checkpoints(older: Told) -> None:
    check_records(older)


def check_archive(told: Told) -> None:
    with urllib.request.urlopen(told["archive"]["url"]) as answer:  # as a person would: no key
        assert len(answer.read()) > 1000


def test_89_the_oldest_sdk_downloads_an_archive(oldest: Told) -> None:
    check_archive(oldest)


def test_90_the_older_sdk_downloads_an_archive(older: Told) -> None:
    check_archive(older)


def check_errors(told: Told) -> None:
    assert told["unknown_model"][0] == "BadRequestError"
    assert "no/such" in told["unknown_model"][1]
    assert told["unknown_checkpoint"][0] == "NotFoundError"


def test_89_the_oldest_sdk_is_told_what_is_wrong(oldest: Told) -> None:
    check_errors(oldest)


def test_90_the_older_sdk_is_told_what_is_wrong(older: Told) -> None:
    check_errors(older)


def test_89_the_oldest_sdk_unloads_a_run(oldest: Told) -> None:
    assert oldest["unloaded"]["model_id"] == oldest["run_id"]


def test_90_the_older_sdk_unloads_a_run(older: Told) -> None:
    assert older["unloaded"]["model_id"] == older["run_id"]
