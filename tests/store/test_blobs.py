"""Blobs: whole or not at all, wherever they lie."""

import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinkle_dask.errors import InvalidRequest, StartupError, StorageFailed
from twinkle_dask.store.blobs import BlobStore, check_path

OLD = {"state.json": b"old", "weights": b"old weights", "extra": b"only in old"}
NEW = {"state.json": b"new", "weights": b"new weights"}


@pytest.fixture(params=["local", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """An empty store in a folder, and one in an fsspec file system."""
    place = tmp_path / "blobs" if request.param == "local" else f"memory://{uuid4().hex}"
    return BlobStore(place)


def folder(blobs: BlobStore, path: str) -> dict[str, bytes]:
    return {name: blobs.get(f"{path}/{name}") for name in blobs.names(path)}


def all_files(root: Path) -> list[str]:
    return sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())


def test_a_blob_is_written_read_replaced_and_removed(blobs: BlobStore) -> None:
    path = "journal/s:train:0/1"
    assert blobs.names("journal/s:train:0") == ()
    blobs.put(path, b"one")
    blobs.put(path, memoryview(b"two!"), durable=True)
    assert blobs.get(path) == b"two!"
    assert blobs.names("journal/s:train:0") == ("1",)
    blobs.remove(path)
    blobs.remove(path)
    assert blobs.names("journal/s:train:0") == ()


def test_a_folder_is_written_replaced_and_removed(blobs: BlobStore) -> None:
    path = "checkpoints/c1"
    assert blobs.names(path) == ()
    blobs.put_folder(path, OLD)
    assert folder(blobs, path) == OLD
    with pytest.raises(StorageFailed, match="exists already"):
        blobs.put_folder(path, NEW)
    assert folder(blobs, path) == OLD
    blobs.put_folder(path, NEW, overwrite=True)
    assert folder(blobs, path) == NEW
    blobs.remove(path)
    assert blobs.names("checkpoints") == ()


def test_names_are_those_of_files_and_folders_directly_inside(blobs: BlobStore) -> None:
    for path in ("s/run/1/a", "s/run/1/b", "s/run/file", "s/other"):
        blobs.put(path, b"")
    assert blobs.names("s") == ("other", "run")
    assert blobs.names("s/run") == ("1", "file")
    assert blobs.names("s/other") == blobs.names("s/none") == ()


def test_names_that_are_not_ours_are_passed_over(tmp_path: Path) -> None:
    for name in (".hidden", "a b", "ours"):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / name).touch()
    assert BlobStore(tmp_path).names("s") == ("ours",)


def test_what_is_missing_is_a_plain_failure(blobs: BlobStore) -> None:
    with pytest.raises(StorageFailed, match="does not exist"):
        blobs.get("journal/none")


def test_a_worker_can_open_the_same_store(blobs: BlobStore) -> None:
    blobs.put("a/b", b"x")
    sent: BlobStore = pickle.loads(pickle.dumps(blobs))
    assert (sent.url, sent.get("a/b")) == (blobs.url, b"x")
    assert BlobStore(blobs.url).get("a/b") == b"x"


def test_a_relative_folder_stays_where_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert BlobStore("here").url == str(tmp_path / "here")
    assert BlobStore(f"file://{tmp_path}/here").url == str(tmp_path / "here")


def test_nothing_else_is_left_in_the_folder(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    blobs.put("a/one", b"1")
    blobs.put_folder("a/two", OLD)
    blobs.put_folder("a/two", NEW, overwrite=True)
    blobs.remove("a/one")
    assert all_files(tmp_path) == ["a/two/state.json", "a/two/weights"]
    assert blobs.clean_temporary(older_than_s=0) == 0


@pytest.mark.parametrize("url", ["nosuch://place", "s3://bucket/prefix"])
def test_an_unusable_url_is_refused_at_start(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(StartupError, match="cannot be opened"):
        BlobStore(url)


# ---- paths

UNSAFE = [
    *("", "/", "/etc/passwd", "a//b", "a/", "..", "../a", "a/../../b", "a/..", ".", "a/./b"),
    *(".staging/x", "a/.hidden", "a\\b", "a\0b", "a\nb", "a*", "a?", "[a]", "é", "a b", "~/../x"),
    *("x" * 201, "/".join(["x" * 100] * 10)),
]


@pytest.mark.parametrize("path", UNSAFE)
def test_an_unsafe_path_is_refused_by_every_method(blobs: BlobStore, path: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: blobs.put(path, b""),
        lambda: blobs.get(path),
        lambda: blobs.put_folder(path, {"a": b""}),
        lambda: blobs.put_folder("a", {path if path != "a b" else "": b""}),
        lambda: blobs.names(path),
        lambda: blobs.remove(path),
    ]
    for call in calls:
        with pytest.raises(InvalidRequest):
            call()


@given(st.text(st.sampled_from("ab./\\~:*\0 \n%é"), max_size=12) | st.text(max_size=20))
def test_a_path_that_passes_cannot_leave_the_root(path: str) -> None:
    try:
        check_path(path)
    except InvalidRequest:
        return
    root = "/data/blobs"
    landed = os.path.normpath(os.path.join(root, path))
    assert landed == f"{root}/{path}"  # nothing in it was a step anywhere
    assert not any(segment.startswith(".") for segment in path.split("/"))


# ---- faults


class FailingWrites:
    """Lets a number of writes through, then fails each further one like a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.left = after
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fsync(descriptor)


@pytest.mark.parametrize("after", range(4))
def test_a_disk_full_while_replacing_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    blobs = BlobStore(tmp_path)
    blobs.put_folder("c/x", OLD)
    with monkeypatch.context() as patched:
        FailingWrites(patched, after)
        with pytest.raises(StorageFailed, match="disk full"):
            blobs.put_folder("c/x", NEW, overwrite=True)
    assert folder(blobs, "c/x") == OLD
    assert all_files(tmp_path) == sorted(f"c/x/{name}" for name in OLD)


def test_a_disk_full_leaves_the_former_blob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = BlobStore(tmp_path)
    blobs.put("a/b", b"old")
    FailingWrites(monkeypatch, 0)
    with pytest.raises(StorageFailed, match="disk full"):
        blobs.put("a/b", b"new", durable=True)
    assert blobs.get("a/b") == b"old"
    assert all_files(tmp_path) == ["a/b"]


_LIMITED = """
import resource, sys
from twinkle_dask.errors import StorageFailed
from twinkle_dask.store.blobs import BlobStore
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
blobs = BlobStore(sys.argv[1])
for write in (lambda: blobs.put("a/b", b"x" * 20_000),
              lambda: blobs.put_folder("c/x", {"small": b"x", "big": b"x" * 20_000})):
    try:
        write()
    except StorageFailed as error:
        print(error.message)
blobs.put("fits", b"x" * 10_000)
"""


def test_a_real_limit_of_the_system_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.count("file too large for the store") == 2
    assert all_files(tmp_path) == ["fits"]


_DIES = """
import os, sys
from twinkle_dask.store.blobs import BlobStore
blobs = BlobStore(sys.argv[1])
rename, deadly = os.rename, int(sys.argv[2])
def counting(source, target):
    global deadly
    deadly -= 1
    if deadly == 0:
        os._exit(9)
    rename(source, target)
os.rename = counting
blobs.put_folder("c/x", {"state.json": b"new", "weights": b"new weights"}, overwrite=True)
"""


@pytest.mark.parametrize("deadly_rename", [1, 2, 3])
def test_a_writer_killed_between_renames_never_leaves_neither(
    tmp_path: Path, deadly_rename: int
) -> None:
    """1: onto the old one (refused), 2: the old one aside, 3: the new one in."""
    blobs = BlobStore(tmp_path)
    blobs.put_folder("c/x", OLD)
    command = [sys.executable, "-c", _DIES, str(tmp_path), str(deadly_rename)]
    assert subprocess.run(command, timeout=30).returncode == 9
    assert blobs.clean_temporary() == 0  # too young: its writer might be alive
    assert blobs.clean_temporary(older_than_s=0) == 1
    assert folder(blobs, "c/x") == OLD
    assert all_files(tmp_path) == sorted(f"c/x/{name}" for name in OLD)


def test_two_writers_of_one_folder_leave_one_whole_version(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)

    def write(number: int) -> None:
        files = {name: str(number).encode() for name in ("state.json", "weights")}
        blobs.put_folder("c/x", files, overwrite=True)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(40)))
    assert len(set(folder(blobs, "c/x").values())) == 1
    assert blobs.clean_temporary(older_than_s=0) == 0


def test_an_object_folder_without_its_marker_is_not_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import (  # pyright: ignore[reportMissingTypeStubs]
        MemoryFileSystem,
    )

    blobs = BlobStore(f"memory://{uuid4().hex}")
    blobs.put_folder("c/x", OLD)
    seen: list[tuple[str, ...]] = []
    write: Callable[..., None] = MemoryFileSystem.pipe_file  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]  # untyped

    def watched(self: MemoryFileSystem, path: str, value: bytes) -> None:
        seen.append(blobs.names("c/x"))
        if path.endswith("state.json"):
            raise OSError(errno.ENOSPC, "full")
        write(self, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", watched)
    with pytest.raises(StorageFailed, match="disk full"):
        blobs.put_folder("c/x", NEW, overwrite=True)
    assert not any("state.json" in names for names in seen)
    assert "state.json" not in blobs.names("c/x")


def test_blobs_need_neither_engine_nor_web_nor_database() -> None:
    code = """
import sys
import twinkle_dask.store.blobs
heavy = {"torch", "transformers", "dask", "distributed", "fastapi", "httpx", "sqlalchemy"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"


def test_parts_of_a_blob(blobs: BlobStore) -> None:
    blobs.put("results/a", b"0123456789")
    assert blobs.size("results/a") == 10
    assert blobs.get_part("results/a", 2, 3) == b"234"
    assert blobs.get_part("results/a", 8, 100) == b"89"
    assert blobs.get_part("results/a", 10, 5) == b""
    for failure, path in ((StorageFailed, "results/missing"), (InvalidRequest, "../a")):
        with pytest.raises(failure):
            blobs.size(path)
        with pytest.raises(failure):
            blobs.get_part(path, 0, 1)
