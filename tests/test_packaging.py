"""What is in the wheel, and what its parts bring into a process."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVER_ONLY = "torch transformers peft dask distributed fastapi starlette uvicorn sqlalchemy fsspec"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    subprocess.run([*command, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return zipfile.Path(file)


def files_in(wheel: zipfile.Path) -> set[str]:
    return {name for name in wheel.root.namelist() if not name.endswith("/")}


def test_the_wheel_has_our_three_packages_only(wheel: zipfile.Path) -> None:
    names = {entry.name for entry in wheel.iterdir() if not entry.name.endswith(".dist-info")}
    assert names == {"twinkle_dask", "twinkle_dask_gateway", "twinkle_dask_client"}


@pytest.mark.parametrize(
    "package", ["twinkle_dask", "gateway/twinkle_dask_gateway", "client/twinkle_dask_client"]
)
def test_every_file_of_a_package_travels(wheel: zipfile.Path, package: str) -> None:
    folder = ROOT / package
    files = {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {path.relative_to(folder.parent).as_posix() for path in files} <= files_in(wheel)


def test_migrations_and_schema_are_there(wheel: zipfile.Path) -> None:
    files = files_in(wheel)
    assert "twinkle_dask/store/migrations/env.py" in files
    assert any(name.startswith("twinkle_dask/store/migrations/versions/") for name in files)
    assert any(name.endswith(".proto") for name in files)


def test_the_wheel_has_command_licence_and_light_dependencies(wheel: zipfile.Path) -> None:
    (info,) = (entry for entry in wheel.iterdir() if entry.name.endswith(".dist-info"))
    assert "twinkle-dask = twinkle_dask.cli:main" in (info / "entry_points.txt").read_text()
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()
    required = [
        line.removeprefix("Requires-Dist: ")
        for line in (info / "METADATA").read_text().splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    names = {requirement.split(">=")[0] for requirement in required}
    assert names == {"httpx", "numpy", "pydantic", "rich", "typer"}


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("twinkle_dask_client", SERVER_ONLY),
        ("twinkle_dask.types, twinkle_dask.errors, twinkle_dask.local", SERVER_ONLY),
        ("twinkle_dask.cli", SERVER_ONLY),
        ("twinkle_dask_gateway.app, twinkle_dask.operations.service", "torch transformers"),
        ("twinkle_dask.store.store", "torch transformers dask distributed fastapi"),
        ("twinkle_dask.trainer, twinkle_dask.sampler", "dask distributed fastapi sqlalchemy"),
    ],
)
def test_a_part_brings_in_no_more_than_it_may(modules: str, unwanted: str) -> None:
    code = f"import sys, {modules}; print(*sorted(set({unwanted.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
