"""The demo, cut short: a real language model through the whole way, twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(400)  # a model of 135 M parameters, loaded twice, on busy cores
def test_smollm2_trains_samples_stops_and_resumes(tmp_path: Path) -> None:
    script = str(ROOT / "examples/self_cognition/run.py")
    ended = subprocess.run(
        [sys.executable, script, "--steps", "6", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=390,
        check=False,
    )
    # 1 says that six steps did not teach the name, which they are not expected to.
    assert ended.returncode in {0, 1}, ended.stderr
    log = json.loads((tmp_path / "log.json").read_text())
    assert "Berlin" in log["before"]["What is the capital of Germany?"]
    assert len(log["losses"]) == 6
    assert log["losses"][-1] < log["losses"][0]
    # The resumed step starts from the trained weights, not from the fresh ones.
    assert log["loss_after_resume"] < log["losses"][0] * 0.9
    assert log["checkpoint"].startswith("tinker://")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
