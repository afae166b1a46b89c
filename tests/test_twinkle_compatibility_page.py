"""The page that says what works of the Twinkle protocol is whole, and names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "twinkle-compatibility.md"
TEXT = PAGE.read_text()
VERDICT = re.compile(r"(works better|works differently|works|refused|not needed)(: .+)?")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = TEXT.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]


def test_every_feature_has_one_verdict() -> None:
    features = rows("The 128 features")
    assert [int(number) for number, *_ in features] == list(range(1, 129))
    for number, _, verdict in features:
        assert VERDICT.fullmatch(verdict), number
        # Only what is there may go without a word.
        assert verdict == "works" or ": " in verdict, number


def test_every_check_is_a_test_of_the_real_client() -> None:
    source = "\n".join(file.read_text() for file in (ROOT / "tests" / "twinkle").glob("test_*.py"))
    found = {
        int(number)
        for name in re.findall(r"def test_((?:\d+_)(?:and_\d+_)*)", source)
        for number in re.findall(r"\d+", name)
    }
    assert found == set(range(1, 111))


@pytest.mark.parametrize("row", rows("Faults of the original"), ids=lambda row: row[0][:30])
def test_the_test_that_holds_a_mended_fault_exists(row: list[str]) -> None:
    file, name = row[2].strip("`").split("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text()


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert (PAGE.parent / link).exists(), link
