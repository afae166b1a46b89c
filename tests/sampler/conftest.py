"""One tiny base model for the tests of this room; torch on one thread, so that sums repeat."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.models import tiny_qwen3
from tests.sampler.driver import Driver
from tests.sampler.plain import PlainModel
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.loading import load_base
from twinkle_dask.sampler.engine import TorchSampler, TorchSamplerConfig

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
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), vocab_size=512, hidden=64, layers=2)


@pytest.fixture(scope="session")
def base(folder: Path) -> BaseModel:
    return load_base(str(folder), "float32", max_rank=16)


@pytest.fixture(scope="session")
def plain(folder: Path) -> PlainModel:
    return PlainModel(folder)


@pytest.fixture
def make(base: BaseModel) -> MakeDriver:
    def make_driver(
        *,
        max_kv_bytes: int = 2**22,
        max_adapter_bytes: int = 2**30,
        max_sequences: int = 64,
        prefill_tokens: int = 32,
        lane_tokens: tuple[int, ...] = (64,),
    ) -> Driver:
        """A sampler with short chunks and lanes, so that every seam is crossed."""
        config = TorchSamplerConfig(
            max_kv_bytes=max_kv_bytes,
            max_adapter_bytes=max_adapter_bytes,
            max_sequences=max_sequences,
            prefill_tokens=prefill_tokens,
            lane_tokens=lane_tokens,
        )
        return Driver(TorchSampler(base, config))

    return make_driver
