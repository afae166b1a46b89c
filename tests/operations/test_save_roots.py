from pathlib import Path

import pytest

from twinkle_dask.errors import InvalidRequest, StorageFailed
from twinkle_dask.operations.save_roots import SaveRoots, plain, tenant_folder
from twinkle_dask.types import TenantId

A = TenantId("team.a@b")


def test_only_what_is_below_a_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "runs", outside):
        folder.mkdir(parents=True)
    (root / "way-out").symlink_to(outside)
    (root / "way-in").symlink_to(root / "runs")
    (root / "file").write_text("")
    roots = SaveRoots([root])
    assert roots.check(str(root)) == str(root.resolve())
    assert roots.check(str(root / "way-in")) == str((root / "runs").resolve())
    for bad in (
        str(outside),
        str(root / "way-out"),
        str(root / ".." / "outside"),
        str(root / "nowhere"),
        str(root / "file"),
        str(tmp_path),
        "",
        "runs",
        "\0",
        "/etc",
    ):
        with pytest.raises(InvalidRequest, match="does not exist on the server"):
            roots.check(bad)


def test_without_roots_the_setting_is_named() -> None:
    with pytest.raises(InvalidRequest, match="save_roots"):
        SaveRoots([]).check("/tmp")


def test_tenants_never_share_a_folder(tmp_path: Path) -> None:
    roots = SaveRoots([tmp_path])
    folders = {roots.folder(TenantId(name), str(tmp_path), "run", "n") for name in ("a.b", "a_b")}
    assert len(folders) == 2
    assert plain("../x y") == "_x_y"
    assert "/" not in tenant_folder(A)


def test_a_folder_takes_the_place_of_the_former(tmp_path: Path) -> None:
    roots = SaveRoots([tmp_path])
    folder = roots.folder(A, str(tmp_path), "run", "weights", "n")
    roots.write(folder, {"one": b"1", "two": b"2"})
    roots.write(folder, {"one": b"3"})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {"one": b"3"}
    assert [entry.name for entry in folder.parent.iterdir()] == ["n"]


def test_a_folder_that_became_a_link_is_not_written_through(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    roots = SaveRoots([root])
    folder = roots.folder(A, str(root), "run", "n")
    folder.parent.parent.mkdir(parents=True)
    folder.parent.symlink_to(outside)
    with pytest.raises(StorageFailed, match="leads out"):
        roots.write(folder, {"one": b"1"})
    assert list(outside.iterdir()) == []
