"""About the service, its sessions, and what this key owns."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from twinkle_dask_client.addresses import Address
from twinkle_dask_client.calls.base import Call
from twinkle_dask_client.models import (
    Capabilities,
    CheckpointList,
    Health,
    Nothing,
    RunInfo,
    RunPage,
    SessionMade,
)


def health() -> Call[Health]:
    """Is the service up? Needs no key."""
    return Call(method="GET", path="healthz", reply=Health)


def capabilities() -> Call[Capabilities]:
    """What does it serve?"""
    return Call(method="GET", path="get_server_capabilities", reply=Capabilities)


def create_session(metadata: Mapping[str, Any]) -> Call[SessionMade]:
    """Open a session; one that is never heard of again ends by itself."""
    return Call(
        method="POST",
        path="twinkle/create_session",
        reply=SessionMade,
        body={"metadata": dict(metadata)},
        repeatable=True,
    )


def heartbeat(session: str, timeout_s: float) -> Call[Nothing]:
    """The session's client is alive."""
    return Call(
        method="POST",
        path="twinkle/session_heartbeat",
        reply=Nothing,
        body={"session_id": session},
        repeatable=True,
        timeout_s=timeout_s,
    )


def finish_session(session: str) -> Call[Nothing]:
    """The session is not needed any more."""
    return Call(
        method="POST",
        path=f"sessions/{quote(session, safe='')}/finish",
        reply=Nothing,
        body={"reason": {"type": "success"}},
        repeatable=True,
        timeout_s=5.0,
    )


def runs(*, limit: int, offset: int) -> Call[RunPage]:
    """Which runs does this key own?"""
    if limit < 1 or offset < 0:
        raise ValueError(f"limit must be at least 1 and offset at least 0: {limit=}, {offset=}")
    params = {"limit": limit, "offset": offset}
    return Call(method="GET", path="training_runs", reply=RunPage, params=params)


def run(run_id: str) -> Call[RunInfo]:
    """One run."""
    return Call(method="GET", path=f"training_runs/{quote(run_id, safe='')}", reply=RunInfo)


def checkpoints(run_id: str) -> Call[CheckpointList]:
    """A run's checkpoints, oldest first."""
    path = f"training_runs/{quote(run_id, safe='')}/checkpoints"
    return Call(method="GET", path=path, reply=CheckpointList)


def delete_checkpoint(address: Address) -> Call[Nothing]:
    """Remove a checkpoint for good."""
    return Call(method="DELETE", path=address.path, reply=Nothing, doing="deleting")
