"""A whole service for a notebook, a script or a test, gone when the ``with`` block ends.

The service runs as a child process, not in this one: Dask starts workers by importing the main
module again, which a notebook or an unguarded script would not survive. The child's standard input
is a pipe that we hold, and the child stops when it closes, so that nothing is left behind even
when this process is killed.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from twinkle_dask.errors import StartupError

_STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalService:
    """A running service.

    Attributes:
        url: Base URL for the SDK, for example ``TINKER_BASE_URL``.
        api_key: The first tenant's key.
        data_dir: Where its runs and checkpoints lie.
        pid: Process id of the server.
    """

    url: str
    api_key: str
    data_dir: Path
    pid: int


@contextmanager
def local_service(
    models: Mapping[str, str],
    *,
    data_dir: Path | str | None = None,
    log_file: Path | str | None = None,
    start_timeout_s: float = 900.0,
    python: Path | str = sys.executable,
    **settings: Any,
) -> Generator[LocalService]:
    """Start a service, wait until it answers, and stop it at the end of the block.

    Args:
        models: Served name to source (Hugging Face folder, GGUF file or folder, hub id).
        data_dir: Kept if given; else a temporary folder that is removed.
        log_file: Where the server's log goes; by default into the data folder.
        start_timeout_s: Longest wait for the model.
        python: An interpreter that has the server, where this one does not.
        **settings: Anything else that ``twinkle-dask serve --config`` takes, for example
            ``dtype="float32"`` or ``api_keys=["tml-..."]``.

    Raises:
        StartupError: The server ended before it was ready; carries what it printed.
    """
    with ExitStack() as stack:
        if data_dir is None:
            holder = tempfile.TemporaryDirectory(prefix="twinkle-dask-", ignore_cleanup_errors=True)
            data_dir = stack.enter_context(holder)
        folder = Path(data_dir)
        folder.mkdir(parents=True, exist_ok=True)
        keys = list(settings.pop("api_keys", ())) or [f"tml-{secrets.token_hex(16)}"]
        config: dict[str, Any] = {
            "models": dict(models),
            "port": 0,
            "data_dir": str(folder),
            "api_keys": keys,
            "start_timeout_s": start_timeout_s,
            **settings,
        }
        # JSON is YAML; the file holds a key, so only we may read it.
        config_file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "config.yaml"
        config_file.touch(mode=0o600)
        config_file.write_text(json.dumps(config))
        log_path = Path(log_file) if log_file else folder / "server.log"
        log = stack.enter_context(log_path.open("ab"))
        child = subprocess.Popen(
            [
                str(python),
                "-m",
                "twinkle_dask.cli",
                "serve",
                "--config",
                str(config_file),
                "--until-stdin-closes",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={k: v for k, v in os.environ.items() if not k.startswith("TWINKLE_DASK_")},
        )
        stack.callback(_stop, child)
        url = _wait_ready(child, start_timeout_s)
        if url is None:
            child.wait(_STOP_TIMEOUT_S)
            told = "\n".join(log_path.read_text(errors="replace").splitlines()[-20:])
            raise StartupError(f"The service ended with exit code {child.returncode}:\n{told}")
        yield LocalService(url=url, api_key=keys[0], data_dir=folder, pid=child.pid)


def _wait_ready(child: "subprocess.Popen[bytes]", timeout_s: float) -> str | None:
    """The URL from the server's READY line; None if the server ended instead."""
    assert child.stdout is not None
    # A blocking read has no timeout of its own, so a timer ends the child, which ends the read.
    timer = threading.Timer(timeout_s, child.terminate)
    timer.start()
    try:
        return _ready_line(child.stdout)
    finally:
        timer.cancel()
        timer.join()


def _ready_line(output: IO[bytes]) -> str | None:
    for line in output:
        words = line.decode().split()
        if len(words) == 2 and words[0] == "READY":
            return words[1]
    return None


def _stop(child: "subprocess.Popen[bytes]") -> None:
    if child.stdin is not None:
        child.stdin.close()
    child.terminate()
    try:
        child.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    if child.stdout is not None:
        child.stdout.close()
