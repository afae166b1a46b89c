"""What this machine has and what it lacks, for ``twinkle-dask doctor``."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

_SERVER_PACKAGES = (
    "torch",
    "transformers",
    "distributed",
    "fastapi",
    "uvicorn",
    "sqlalchemy",
    "alembic",
    "fsspec",
    "safetensors",
    "structlog",
)
_OPTIONAL_PACKAGES = {"gguf": "GGUF models", "asyncpg": "PostgreSQL", "tinker": "the official SDK"}
_MIN_DISK_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. ``fatal`` findings keep the service from starting."""

    subject: str
    good: bool
    text: str
    fatal: bool = False


def examine(data_dir: Path) -> list[Finding]:
    """Look at packages, processors, memory and the data folder. Changes nothing."""
    return [*_packages(), _processors(), _memory(), _gpus(), _folder(data_dir), _hub()]


def show(findings: list[Finding]) -> None:
    """Print the report on standard output."""
    table = Table("", "what", "found", box=None)
    for finding in findings:
        mark = "[green]ok" if finding.good else "[red]missing" if finding.fatal else "[yellow]note"
        table.add_row(mark, finding.subject, finding.text)
    Console().print(table)


def _packages() -> list[Finding]:
    findings = [
        Finding(subject="python", good=True, text=platform.python_version()),
    ]
    for name in _SERVER_PACKAGES:
        found = importlib.util.find_spec(name) is not None
        text = importlib.metadata.version(name) if found else "pip install 'twinkle-dask[server]'"
        findings.append(Finding(subject=name, good=found, text=text, fatal=not found))
    for name, purpose in _OPTIONAL_PACKAGES.items():
        found = importlib.util.find_spec(name) is not None
        text = importlib.metadata.version(name) if found else f"only needed for {purpose}"
        findings.append(Finding(subject=name, good=found, text=text))
    return findings


def _processors() -> Finding:
    cores = len(os.sched_getaffinity(0))
    flags = _cpu_flags()
    fast = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    text = f"{cores} cores; bfloat16 is {'fast (' + ', '.join(fast) + ')' if fast else 'slow'}"
    return Finding(subject="processor", good=True, text=text)


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    for line in info.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    good = total >= 4 * 2**30
    return Finding(subject="memory", good=good, text=f"{total / 2**30:.1f} GiB")


def _gpus() -> Finding:
    folder = Path("/proc/driver/nvidia/gpus")
    count = len(list(folder.iterdir())) if folder.is_dir() else 0
    text = f"{count} NVIDIA GPU(s)" if count else "none; models run on the processor"
    return Finding(subject="gpu", good=count > 0, text=text)


def _folder(data_dir: Path) -> Finding:
    place = data_dir.expanduser().absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        text = f"{place} is not writable: {error.strerror}"
        return Finding(subject="data folder", good=False, text=text, fatal=True)
    free = shutil.disk_usage(place).free
    text = f"{place} is writable, {free / 2**30:.0f} GiB free"
    return Finding(subject="data folder", good=free >= _MIN_DISK_BYTES, text=text)


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in {"", "0"}
    text = "HF_HUB_OFFLINE is set: only local models" if offline else "hub ids will be downloaded"
    return Finding(subject="model hub", good=not offline, text=text)
