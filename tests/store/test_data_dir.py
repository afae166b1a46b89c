"""One server per data directory."""

import subprocess
import sys
from pathlib import Path

import pytest

from twinkle_dask.errors import StartupError
from twinkle_dask.store.data_dir import open_data_dir


def test_it_is_made_and_names_its_contents(tmp_path: Path) -> None:
    with open_data_dir(tmp_path / "a" / "b") as data_dir:
        assert data_dir.path.is_dir()
        assert data_dir.blobs_dir == data_dir.path / "blobs"
        assert data_dir.database_url == f"sqlite:///{data_dir.path}/twinkle_dask.sqlite3"


def test_only_we_can_look_into_one_that_we_made(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    there.chmod(0o755)
    for folder, mode in ((tmp_path / "made", 0o700), (there, 0o755)):
        with open_data_dir(folder):
            assert folder.stat().st_mode & 0o777 == mode


def test_a_second_server_is_kept_out_until_the_first_is_gone(tmp_path: Path) -> None:
    first = open_data_dir(tmp_path)
    with pytest.raises(StartupError, match=r"in use by another server \(process \d+ on "):
        open_data_dir(tmp_path)
    first.close()
    first.close()
    open_data_dir(tmp_path).close()


def test_another_process_is_kept_out(tmp_path: Path) -> None:
    code = "import sys; from twinkle_dask.store.data_dir import open_data_dir as o; o(sys.argv[1])"
    with open_data_dir(tmp_path):
        second = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=30
        )
    assert second.returncode != 0
    assert "in use by another server" in second.stderr


@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="is not writable"):
        open_data_dir(tmp_path / place)
