"""Clients in environments of their own: where they are, and how a test runs one."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

CLIENTS = Path(__file__).parents[1] / "clients"

# Nothing listens there: what a client would ask of the world outside fails at once.
_NOWHERE = "http://127.0.0.1:9"


def python_of(client: str) -> Path:
    """The interpreter of one of the environments that ``tests/clients/<client>.txt`` describe."""
    python = Path(sys.prefix) / "clients" / client / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{python} is missing: run `make clients` (`make test` does).")
    return python


def run_client(
    client: str,
    arguments: Sequence[str],
    *,
    url: str,
    api_key: str,
    folder: Path,
    timeout_s: float = 50.0,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What the program wrote to standard output; all that it wrote if it fails.

    Its whole setting is the address, the key and ``folder``, its home and working directory.
    """
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    done = subprocess.run(
        [str(python_of(client)), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd=folder,
        env={
            **kept,
            "HOME": str(folder),
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "1",
            "https_proxy": _NOWHERE,
            "TINKER_BASE_URL": url,
            "TINKER_API_KEY": api_key,
            **(environment or {}),
        },
    )
    assert done.returncode == 0, f"{arguments}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout
