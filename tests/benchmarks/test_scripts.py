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


def test_profile_is_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "profile.txt"
    run("engine.py", "--quick", "--profile", str(file))
    text = file.read_text()
    for kind in ("base products: head", "LoRA products", "attention", "optimizer"):
        assert kind in text


def test_capacity_counts_registered_runs() -> None:
    results = measured("capacity.py", "--quick")["results"]
    assert results["runs"] == 20
    # Rank 8 on every linear of the tiny model and on its head; weights and two moments.
    assert results["memory"]["kept_mb"] == pytest.approx(20 * 111_616 * 12 / 2**20, abs=0.1)


def test_sharing_measures_a_small_tenant_beside_a_large_one() -> None:
    (result,) = measured("sharing.py", "--quick")["results"]
    assert result["alone_ms"]["n"] == result["beside_ms"]["n"] == 3
    assert result["bound_ms"] == pytest.approx(
        3 * result["alone_ms"]["p95"] + result["micro_batch_ms"], abs=0.1
    )
