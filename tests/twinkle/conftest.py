"""A real service, and the real, unmodified ``twinkle_client`` in this process.

Run by the interpreter of the client's own environment; the service is a child process of the
environment that has the server.
"""

import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("TWINKLE_SERVER_URL", "TWINKLE_SERVER_TOKEN", "TINKER_API_KEY", "TINKER_BASE_URL"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
from twinkle_client import init_twinkle_client  # noqa: E402
from twinkle_client.manager import TwinkleClient  # noqa: E402
from twinkle_client.model import MultiLoraTransformersModel  # noqa: E402

from tests.models import tiny_qwen3  # noqa: E402
from twinkle_dask.local import LocalService, local_service  # noqa: E402

MODEL = "tiny/qwen3"
KEY = "tml-first-tenant-key"
OTHER_KEY = "tml-second-tenant-key"
PLAIN_KEY = "a-key-without-prefix"
SERVER_PYTHON = Path(sys.prefix).parents[1] / "bin" / "python"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3, float32, with a byte-level tokenizer and a chat template."""
    return tiny_qwen3(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder below which clients may name data files."""
    return tmp_path_factory.mktemp("data-root")


@pytest.fixture(scope="session")
def start_service(
    model_folder: Path, data_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """``start_service(**settings)``: a service of one's own, as a context manager."""

    def start(**settings: Any) -> Any:
        given = {
            "api_keys": [KEY, OTHER_KEY, PLAIN_KEY],
            "dtype": "float32",
            "data_roots": [str(data_root)],
            "data_dir": tmp_path_factory.mktemp("data"),
            **settings,
        }
        return local_service({MODEL: str(model_folder)}, python=SERVER_PYTHON, **given)

    return start


@pytest.fixture(scope="session")
def service(start_service: Callable[..., Any]) -> Generator[LocalService]:
    """The service that all tests share which need no settings of their own."""
    with start_service() as running:
        yield running


@pytest.fixture
def client(service: LocalService) -> Generator[TwinkleClient]:
    """The first tenant's client; it is the process's own from here on (the client has one global).

    A test that makes another client must make this one's context valid again itself.
    """
    connected = init_twinkle_client(base_url=service.url, api_key=KEY)
    yield connected
    connected.close()


@pytest.fixture
def model(client: TwinkleClient) -> MultiLoraTransformersModel:
    """A model of the shared service with no adapter yet."""
    return MultiLoraTransformersModel(MODEL)
