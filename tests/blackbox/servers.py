"""Servers that a test may start wrongly, stop early, or kill."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

COMMAND = (sys.executable, "-m", "twinkle_dask.cli")


@dataclass
class Server:
    """A running ``twinkle-dask serve``."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid


@contextmanager
def serve(
    *arguments: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    before_exec: Callable[[], None] | None = None,
) -> Generator[Server]:
    """Start a server and wait for its READY line, which must be all it prints."""
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [*COMMAND, "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **(environment or {})},
            preexec_fn=before_exec,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline().decode()
        assert line.startswith("READY http://"), log.read_text()
        yield Server(process=process, url=line.split()[1], log=log)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(15)
        process.stdout.close()


def run(*arguments: str, timeout_s: float = 50.0) -> "subprocess.CompletedProcess[str]":
    """A command that is expected to end by itself."""
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )


def family(pid: int) -> list[psutil.Process]:
    """A process and everything it started."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def gone(processes: list[psutil.Process], timeout_s: float) -> bool:
    """Whether all of them end in time."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def process(*arguments: str, log: Path) -> Generator["subprocess.Popen[bytes]"]:
    """A program that is ended with the block."""
    with log.open("ab") as output:
        running = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        yield running
    finally:
        running.terminate()
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


@contextmanager
def a_cluster(folder: Path) -> Generator[str]:
    """A scheduler and two workers, as an operator starts them; gives the address.

    They write their logs into ``folder``: scheduler.log, worker-one.log, worker-two.log.
    """
    address = f"tcp://127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        stack.enter_context(
            process(
                *("distributed.cli.dask_scheduler", "--host", "127.0.0.1"),
                *("--port", address.rsplit(":", 1)[1], "--no-dashboard"),
                log=folder / "scheduler.log",
            )
        )
        for name in ("one", "two"):
            stack.enter_context(
                process(
                    *("distributed.cli.dask_worker", address, "--host", "127.0.0.1"),
                    *("--resources", "GPU=1", "--nthreads", "1", "--memory-limit", "0"),
                    *("--name", name, "--no-dashboard", "--local-directory", str(folder)),
                    log=folder / f"worker-{name}.log",
                )
            )
        yield address
