"""The examples of our own client and of the Tinker SDK run to their end, in their short mode.

Those of the Twinkle client: ``tests/twinkle/test_examples.py``.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.blackbox.conftest import KEY, MODEL
from twinkle_dask import LocalService

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("sample/with_own.py", "Four at once"),
        ("sample/with_tinker.py", "Four at once"),
        ("short_math_grpo/with_own.py", "mean reward"),
    ],
)
def test_an_example_shows_its_result(
    service: LocalService, model_folder: Path, tmp_path: Path, script: str, shown: str
) -> None:
    arguments = ["--quick", "--model", MODEL, "--url", service.url, "--key", KEY]
    if script.endswith("with_tinker.py"):
        arguments += ["--tokenizer", str(model_folder)]
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert shown in ended.stdout


@pytest.mark.timeout(300)
def test_make_example_brings_service_and_model(tmp_path: Path) -> None:
    """What ``make example RUN=sample/with_tinker.py ARGS=--quick`` runs."""
    script = str(EXAMPLES / "sample" / "with_tinker.py")
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / "with_service.py"), sys.executable, script, "--quick"],
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Paris" in ended.stdout
