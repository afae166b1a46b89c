"""One tiny base model for the tests of this room; torch on one thread, so that sums repeat."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.models import tiny_qwen3
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.init import init_adapter
from twinkle_dask.model.loading import load_base
from twinkle_dask.model.lora import LoraTensors
from twinkle_dask.types import LoraSpec

MakeAdapter = Callable[..., LoraTensors]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("qwen3"), vocab_size=512, hidden=64, layers=2)


@pytest.fixture(scope="session")
def qwen(qwen_folder: Path) -> BaseModel:
    return load_base(str(qwen_folder), "float32", max_rank=16)


@pytest.fixture(scope="session")
def make_adapter() -> MakeAdapter:
    """Make an adapter whose B is random, so that it changes the model and A gets gradients."""

    def make(base: BaseModel, spec: LoraSpec) -> LoraTensors:
        state = init_adapter(base.targets(spec), spec)
        adapter = LoraTensors.from_state(state, device=base.device, dtype=base.dtype)
        generator = torch.Generator().manual_seed(spec.seed)
        for name, value in adapter.master.items():
            if ".lora_B." in name:
                value.normal_(0, 0.05, generator=generator)
        adapter.touch()
        return adapter

    return make
