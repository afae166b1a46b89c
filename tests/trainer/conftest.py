"""One tiny base model for the tests of this room; torch on one thread, so that sums repeat."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import tiny_qwen3
from tests.trainer.driver import Driver
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.loading import load_base
from twinkle_dask.trainer.engine import Trainer, TrainerConfig

MakeDriver = Callable[..., Driver]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(
        tmp_path_factory.mktemp("qwen3"), vocab_size=512, hidden=64, layers=2, tokenizer=False
    )


@pytest.fixture(scope="session")
def base(folder: Path) -> BaseModel:
    return load_base(str(folder), "float32", max_rank=16)


@pytest.fixture(scope="session")
def made() -> list[Driver]:
    """What ``make`` made for the tests that are running."""
    return []


@pytest.fixture(autouse=True)
def _no_threads_left(made: list[Driver]) -> Iterator[None]:
    yield
    while made:
        made.pop().trainer.close()


@pytest.fixture(scope="session")
def make(base: BaseModel, made: list[Driver]) -> MakeDriver:
    """A trainer with small micro-batches and chunks, so that every seam is crossed.

    It is closed with the test that made it.
    """

    def make_driver(tokens_per_micro_batch: int = 64, **config: Any) -> Driver:
        small = {"pass_tokens": 8, "head_chunk_bytes": 512 * 4 * 24, "head_block_bytes": 20_000}
        wanted: dict[str, Any] = {"lanes": 1, "lane_tokens": 1} | small | config
        settings = TrainerConfig(tokens_per_micro_batch=tokens_per_micro_batch, **wanted)
        made.append(Driver(Trainer(base, settings)))
        return made[-1]

    return make_driver
