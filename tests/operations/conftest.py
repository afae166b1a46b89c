from collections.abc import AsyncGenerator
from pathlib import Path

import pytest_asyncio

from tests.operations.parts import Parts, open_parts


@pytest_asyncio.fixture
async def parts(tmp_path: Path) -> AsyncGenerator[Parts]:
    async with open_parts(tmp_path) as opened:
        yield opened
