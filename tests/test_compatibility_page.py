"""The compatibility page leaves nothing of the SDK out; no checklist item is without a test."""

import inspect
import re
from pathlib import Path
from typing import Any

import click
import pytest
import tinker
from tinker.cli.__main__ import main_cli  # pyright: ignore[reportMissingTypeStubs]

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tinker-compatibility.md").read_text()
NUM_ITEMS = 94


def methods(of: type[Any]) -> list[str]:
    found = (name for name, _ in inspect.getmembers(of, callable) if not name.startswith("_"))
    return sorted({name.removesuffix("_async") for name in found})


def commands(group: click.Command, path: str = "tinker") -> list[str]:
    if not isinstance(group, click.Group):
        return [path]
    context = click.Context(group)
    found: list[str] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found += commands(command, f"{path} {name}")
    return found


@pytest.mark.parametrize(
    "client",
    [
        tinker.ServiceClient,
        tinker.TrainingClient,
        tinker.SamplingClient,
        tinker.RestClient,
        tinker.AdminClient,
    ],
)
def test_every_public_method_has_its_row(client: type[Any]) -> None:
    assert [name for name in methods(client) if not re.search(rf"`{name}\b", PAGE)] == []


def test_every_command_has_its_row() -> None:
    found = commands(main_cli)
    assert len(found) > 15
    assert [name for name in found if f"`{name}`" not in PAGE] == []


def test_every_item_of_the_checklist_has_a_test() -> None:
    files = (ROOT / "tests" / "blackbox" / "acceptance").glob("test_*.py")
    text = "\n".join(file.read_text() for file in files)
    proved = {int(item) for item in re.findall(r"def test_(\d\d)_", text)}
    assert proved == set(range(1, NUM_ITEMS + 1))
