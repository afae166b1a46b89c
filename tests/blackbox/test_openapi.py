"""Schemathesis asks a real service whatever its OpenAPI document allows, and what it does not.

No answer may be our fault (5xx), and each must have a status, a type and a form that the document
names; no route may forget the key. Requests are made from the document: bounds and what is beside
them, wrong types, missing and surplus fields, any text; the same ones in every run. For more:

    SCHEMATHESIS="--max-examples 1000 --seed 7" pytest tests/blackbox/test_openapi.py --timeout=0
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.blackbox.conftest import KEY, MODEL
from tests.blackbox.data import datum, random_tokens
from tests.blackbox.wire import Wire
from twinkle_dask import LocalService, local_service

MORE = os.environ.get("SCHEMATHESIS", "--max-examples 2 --seed 1")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "ignored_auth",
    "unsupported_method",
)


@pytest.fixture(scope="module")
def own(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Generator[LocalService]:
    """A service of its own: here sessions are finished and runs are led astray."""
    folder = tmp_path_factory.mktemp("openapi")
    with local_service(
        {MODEL: str(model_folder)}, api_keys=[KEY], dtype="float32", data_dir=folder
    ) as service:
        yield service


def furnished(wire: Wire) -> dict[str, dict[str, str]]:
    """What requests may be about: values for fields of bodies and for segments of paths."""
    session = wire.post("create_session", {}).json()["session_id"]
    model = {"base_model": MODEL, "lora_config": {"rank": 4}}
    made = {"session_id": session, "model_seq_id": 0, **model}
    run = wire.result(wire.promise("create_model", made))["model_id"]
    batch = wire.forward_backward(run, 1, [datum(random_tokens(9, 1))])
    saved = wire.promise("save_weights", {"model_id": run, "seq_id": 2, "path": "kept"})
    path = wire.result(saved)["path"]
    sampled = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL}
    sampler = wire.post("create_sampling_session", sampled).json()["sampling_session_id"]
    fields = {
        "model_id": run,
        "session_id": session,
        "sampling_session_id": sampler,
        "request_id": batch,
        "base_model": MODEL,
        "model_path": path,
        "tinker_path": path,
    }
    segments = {
        "run": run,
        "session": session,
        "sampler": sampler,
        "kind": "weights",
        "name": "kept",
    }
    return {"fields": fields, "segments": segments}


@pytest.mark.timeout(300)
def test_every_answer_is_as_the_document_says(own: LocalService, tmp_path: Path) -> None:
    with Wire(own.url, KEY) as wire:
        world = furnished(wire)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run"),
            f"{own.url}/api/v1/openapi.json",
            *("--header", f"x-api-key: {KEY}", "--checks", ",".join(CHECKS)),
            *("--phases", "examples,coverage,fuzzing", "--generation-database", "none"),
            # It would take the key from itself.
            *("--exclude-path-regex", "/auth/apikey/me$"),
            *("--continue-on-failure", "--suppress-health-check", "all", "--request-timeout", "60"),
            *("--no-color", "--warnings", "off", *MORE.split()),
        ],
        env=os.environ
        | {
            "SCHEMATHESIS_HOOKS": "tests.blackbox.openapi_hooks",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TWINKLE_DASK_TEST_WORLD": json.dumps(world),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    asked = re.search(r"(\d+) generated", done.stdout)
    assert asked is not None
    assert int(asked[1]) > 1000
