"""What a gateway keeps for commands that are on their way."""

import asyncio
from typing import Any, cast

from tests.operations.parts import FACTS
from twinkle_dask.cluster.commands import Command, Role
from twinkle_dask.cluster.link import HostLink
from twinkle_dask.types import RunId, TenantId


async def test_a_command_that_nobody_waits_for_is_forgotten() -> None:
    """A host never answers a cancelled sample, and who has most in flight gets no more."""
    link = HostLink(
        client=cast(Any, None),
        name="host",
        address="",
        key="",
        source="",
        role=Role.BOTH,
        facts=FACTS,
        epoch=0,
    )
    command = Command(id="c", run=RunId(""), tenant=TenantId("t"), body=b"")
    answer = link.send(command)
    assert link.in_flight == 1
    answer.cancel()
    await asyncio.sleep(0)
    assert link.in_flight == 0
