from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.operations.parts import Parts, open_parts
from twinkle_dask.operations import contents


@pytest.fixture(autouse=True)
def contents_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request and result has a file, as large ones have, so that its fate can be seen."""
    monkeypatch.setattr(contents, "INLINE_BYTES", -1)


@pytest_asyncio.fixture
async def parts(tmp_path: Path) -> AsyncGenerator[Parts]:
    async with open_parts(tmp_path) as opened:
        yield opened
