"""A real service for every test here: real SDK, real socket, real Dask cluster of processes, and a
real (small) model. One service is shared by all tests of a session, since starting takes seconds;
tests of crashes and start-up make their own.
"""

import gc
import os
import warnings
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path

import pytest
import tinker

from tests.blackbox.servers import a_cluster
from tests.blackbox.wire import Wire
from tests.models import tiny_qwen3
from twinkle_dask import LocalService, local_service

MODEL = "tiny/qwen3"
ALIAS = "tiny/qwen3-alias"
KEY = "tml-first-tenant-key"
OTHER_KEY = "tml-second-tenant-key"

os.environ["TINKER_TELEMETRY"] = "1"
for name in ("TINKER_API_KEY", "TINKER_BASE_URL"):
    os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The SDK leaves its connections to the garbage collector; whose test that happens in is chance.
    ignore = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    for item in items:
        if "blackbox" in item.path.parts:
            item.add_marker(ignore)


@pytest.fixture(scope="module", autouse=True)
def no_connections_left() -> Generator[None]:
    """What a module leaves is collected in it, not under somebody else's eyes."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen3(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def service(
    request: pytest.FixtureRequest,
    model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Generator[LocalService]:
    """Two names of one model, two tenants, float32 so that numbers can be compared."""
    with ExitStack() as stack:
        address = None
        if request.config.getoption("--on-cluster"):
            address = stack.enter_context(a_cluster(tmp_path_factory.mktemp("cluster")))
        yield stack.enter_context(
            local_service(
                {MODEL: str(model_folder), ALIAS: str(model_folder)},
                api_keys=[KEY, OTHER_KEY],
                dtype="float32",
                scheduler=address,
                data_dir=tmp_path_factory.mktemp("data"),
            )
        )


@pytest.fixture
def client(service: LocalService) -> Generator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=service.url, api_key=KEY) as connected:
        yield connected


@pytest.fixture
def other_client(service: LocalService) -> Generator[tinker.ServiceClient]:
    """Another tenant."""
    with tinker.ServiceClient(base_url=service.url, api_key=OTHER_KEY) as connected:
        yield connected


@pytest.fixture
def wire(service: LocalService) -> Generator[Wire]:
    """The first tenant without the SDK."""
    with Wire(service.url, KEY) as connected:
        yield connected
