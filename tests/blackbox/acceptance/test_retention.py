"""What goes by itself, files included (items 45 and 52); on a server that tidies all the time."""

from collections.abc import Generator
from pathlib import Path

import pytest
import tinker

from tests.blackbox.conftest import MODEL
from tests.blackbox.saved import folder_of
from tests.blackbox.states import HOUR, a_run, drawn, expire, known, train_on
from tests.blackbox.test_upkeep import blobs, until
from twinkle_dask import LocalService, local_service

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def tidy(model_folder: Path) -> Generator[LocalService]:
    """Weights that nobody sampled for a second go, as soon as a run has newer ones."""
    journal = {"prune_interval_s": 0.1, "keep_idle_weights_s": 1.0}
    with local_service({MODEL: str(model_folder)}, journal=journal, dtype="float32") as service:
        yield service


@pytest.fixture
def client(tidy: LocalService) -> Generator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=tidy.url, api_key=tidy.api_key) as connected:
        yield connected


def test_45_the_files_of_what_has_expired_go(
    client: tinker.ServiceClient, tidy: LocalService
) -> None:
    run = a_run(client)
    gone = run.save_state("gone", ttl_seconds=HOUR).result().path
    folder = folder_of(tidy, gone)
    rest = tinker.RestClient(base_url=tidy.url, api_key=tidy.api_key)
    copy = rest.copy_weights(gone, "archive").result()
    kept = run.save_state("kept", ttl_seconds=HOUR).result().path
    expire(tidy, gone)
    run.save_state("marker").result()
    assert known(rest, run.model_id).keys() == {"weights/kept", "weights/marker"}
    # A copy has the same files; they go with the last of both.
    client.create_training_client_from_state(copy).result()
    assert folder.exists()
    expire(tidy, copy)
    until(lambda: not folder.exists())
    assert folder_of(tidy, kept).exists()


def test_52_snapshots_that_nobody_samples_go_while_the_session_lasts(
    client: tinker.ServiceClient, tidy: LocalService
) -> None:
    """Else the disk would fill with every step of a long loop."""
    run = a_run(client)

    def num_kept() -> int:
        folders = {path.parent for path in blobs(tidy, f"checkpoints/{run.model_id}")}
        return len(folders)

    first = run.save_weights_and_get_sampling_client().result()
    expected = drawn(first)
    for _ in range(3):
        train_on(run)
        run.save_weights_and_get_sampling_client().result()
    train_on(run)
    newest = run.save_weights_and_get_sampling_client().result()
    until(lambda: num_kept() == 1)
    with pytest.raises(tinker.NotFoundError, match="save under a name"):
        drawn(first)
    assert drawn(newest) != expected
