"""Benchmarks of the engine do what they say on a small scale; no test looks at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

_ROOT = Path(__file__).parents[2]

_ASK = """
import runpy
import sys

for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, script
"""

# Each imports torch and builds a model or two, in a process of its own.
pytestmark = pytest.mark.timeout(240)


def run(script: str, *arguments: str) -> str:
    """What a script prints."""
    done = subprocess.run(
        [sys.executable, str(_ROOT / "benchmarks" / script), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(script: str, *arguments: str) -> Any:
    """The JSON in front of the table's rows."""
    content, _ = json.JSONDecoder().raw_decode(run(script, *arguments))
    return content


def test_gpu_training_agrees_with_plain_peft_on_a_processor() -> None:
    results = measured("gpu_train.py", "--quick", "--shape", "tiny", "--device", "cpu")["results"]
    assert results["numbers"]["right"]
    assert results["numbers"]["engine_error"]["gradient"] > 0  # of bfloat16
    assert set(results["tokens_per_s"]) == {"one_tenant", "eight_tenants"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_training_is_skipped_without_one() -> None:
    assert measured("gpu_train.py")["skipped"] == "no CUDA device"


def test_engine_is_compared_with_peft_and_products() -> None:
    one, eight, ragged = measured("engine.py", "--quick")["results"]
    for case in (one, eight, ragged):
        assert {"engine", "peft"} <= set(case["share"])
    assert "deterministic" in one["engine_over"]
    assert {"one_tenant", "deterministic"} <= set(eight["engine_over"])


def test_the_gateway_is_asked_in_every_way() -> None:
    results = measured("gateway.py", "--quick")["results"]
    assert set(results["small"]) == {"bare", "healthz", "get_info", "heartbeat"}
    assert results["polls"]["num"] == 20
    for encoding in ("json", "protobuf", "zstd"):
        assert results["bodies"][encoding]["lag_ms"] > 0
    assert results["samples"]["concurrent"] == 5


def test_every_script_can_be_imported_and_asked(tmp_path: Path) -> None:
    """In one process, since nearly all of the time goes into loading torch."""
    file = tmp_path / "ask.py"
    file.write_text(_ASK)
    scripts = sorted((_ROOT / "benchmarks").glob("[a-z]*.py"))
    assert scripts
    told = run(str(file), *map(str, scripts)).splitlines()
    usages = [line.split()[1] for line in told if line.startswith("usage: ")]
    assert usages == [script.name for script in scripts]
