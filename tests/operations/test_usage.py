"""What may be asked about usage."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any, cast

import pytest

from tests.operations.parts import ANN, Parts
from twinkle_dask.clock import utc_now
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.usage import Usage

HOUR = timedelta(hours=1)
NOW = utc_now().replace(minute=0, second=0, microsecond=0)


async def test_any_other_time_is_refused(parts: Parts) -> None:
    usage = Usage(parts.store, cast(Any, None))
    before_all = datetime(1, 1, 1, tzinfo=timezone(HOUR))
    after_all = datetime(9999, 12, 31, 23, tzinfo=timezone(-HOUR))
    for start, end in (
        (before_all, before_all + HOUR),
        (datetime(1, 1, 1, tzinfo=UTC), NOW),
        (NOW, after_all),
        (after_all, after_all),
        (NOW, NOW),
        (NOW, NOW + timedelta(days=15)),
        (NOW.replace(tzinfo=None), NOW),
        (NOW + timedelta(minutes=1), NOW + HOUR),
    ):
        with pytest.raises(InvalidRequest):
            await usage.between(ANN, start, end)
