"""Every example of the Twinkle client runs to its end, in its short mode."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.twinkle.conftest import MODEL
from twinkle_dask.local import LocalService

EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/*/with_twinkle.py"))
SHOWN = {
    "dpo": "margin",
    "embedding": "InfoNCE loss",
    "rollout": "sampled tokens with their logprobs",
    "sample": "Four at once",
    "self_cognition": "After",
    "short_math_grpo": "mean reward",
}


def test_there_are_the_examples_that_are_tested() -> None:
    assert {path.parent.name for path in EXAMPLES} == set(SHOWN)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.parent.name)
def test_an_example_shows_its_result(
    service: LocalService, model_folder: Path, script: Path
) -> None:
    command = [sys.executable, str(script), "--quick", "--model", MODEL]
    command += ["--url", service.url, "--key", service.api_key]
    if script.parent.name == "rollout":
        command += ["--tokenizer", str(model_folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=110, env=os.environ | {"COLUMNS": "100"}
    )
    assert done.returncode == 0, done.stderr
    assert SHOWN[script.parent.name] in done.stdout
