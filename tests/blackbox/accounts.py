"""Tenants of a test's own, and the two command lines."""

import os
import subprocess
import sys
from pathlib import Path

from tests.blackbox.servers import run
from twinkle_dask import LocalService


def create_key(service: LocalService, *options: str) -> str:
    """A key made beside the running server, as an operator does."""
    made = run("keys", "create", *options, "--data-dir", str(service.data_dir))
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def tinker_cli(
    service: LocalService, key: str | None, home: Path, *arguments: str, told: str = ""
) -> "subprocess.CompletedProcess[str]":
    """A command of the ``tinker`` CLI; without a key it takes the stored one."""
    environment = {name: text for name, text in os.environ.items() if name != "TINKER_API_KEY"}
    environment |= {"HOME": str(home), "TINKER_BASE_URL": service.url, "TINKER_TELEMETRY": "0"}
    if key is not None:
        environment["TINKER_API_KEY"] = key
    return subprocess.run(
        [sys.executable, "-m", "tinker.cli", *arguments],
        capture_output=True,
        text=True,
        input=told,
        env=environment,
        cwd=home,
        timeout=50,
        check=False,
    )
