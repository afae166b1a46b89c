"""What happened in a session, as a document that Perfetto can draw.

The format is the JSON of Chrome's trace viewer: https://ui.perfetto.dev opens it, whatever the
file is called. Beside its ``traceEvents`` it holds the session in plain words under
``twinkle_dask``. It is made anew at each reading, from the records.
"""

import asyncio
from collections.abc import Iterable
from datetime import datetime
from typing import Any, TypeAlias

import orjson

from twinkle_dask.errors import NotFound
from twinkle_dask.operations.values import Tenant
from twinkle_dask.store.records import (
    CheckpointRecord,
    OperationRecord,
    RunRecord,
    SamplerRecord,
    SessionRecord,
    UsageRecord,
)
from twinkle_dask.store.store import Store
from twinkle_dask.types import SessionId

_Object: TypeAlias = dict[str, Any]


class Traces:
    """Timelines of sessions."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def grant(self, tenant: Tenant, session: SessionId) -> SessionId:
        """Check that a tenant may read a session's trace; gives the session.

        Raises:
            NotFound: No such session of this tenant.
        """
        if await self._store.sessions.get(tenant.id, session) is None:
            raise NotFound(f"There is no session {session!r}.")
        return session

    async def document(self, session: SessionId) -> bytes:
        """The trace of a session, for whoever was granted it.

        Raises:
            NotFound: There is no such session.
        """
        record = await self._store.sessions.find(session)
        if record is None:
            raise NotFound(f"There is no session {session!r}.")
        runs = await self._store.runs.in_session(session)
        samplers = await self._store.samplers.in_session(session)
        operations = await self._store.journal.in_session(session)
        checkpoints = await self._store.searches.checkpoints_of_session(session)
        usage = await self._store.usage.of_session(record.tenant_id, session)
        return await asyncio.to_thread(
            _document, record, runs, samplers, operations, checkpoints, usage
        )


def _document(
    session: SessionRecord,
    runs: tuple[RunRecord, ...],
    samplers: tuple[SamplerRecord, ...],
    operations: tuple[OperationRecord, ...],
    checkpoints: tuple[CheckpointRecord, ...],
    usage: tuple[UsageRecord, ...],
) -> bytes:
    owners: list[str] = [*(run.id for run in runs), *(sampler.id for sampler in samplers)]
    told = {
        "session": _session(session),
        "training_runs": [_run(run) for run in runs],
        "samplers": [_sampler(sampler) for sampler in samplers],
        "operations": [_operation(operation) for operation in operations],
        # The journal forgets operations in time; these sums are of all of them.
        "usage": [
            {
                "hour": _time(row.hour),
                "kind": row.kind,
                "base_model": row.base_model,
                "amount": row.amount,
            }
            for row in usage
        ],
        "checkpoints": [_checkpoint(checkpoint) for checkpoint in checkpoints],
    }
    return orjson.dumps(
        {
            "displayTimeUnit": "ms",
            "traceEvents": [*_tracks(session, owners), *_events(owners, operations)],
            "twinkle_dask": told,
        }
    )


def _tracks(session: SessionRecord, owners: list[str]) -> Iterable[_Object]:
    """One process for the session, one thread for each run and sampler."""
    name = f"session {session.id}"
    yield {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": name}}
    for thread, owner in enumerate(owners, 1):
        name_of = {"name": owner}
        yield {"ph": "M", "name": "thread_name", "pid": 1, "tid": thread, "args": name_of}


def _events(owners: list[str], operations: tuple[OperationRecord, ...]) -> Iterable[_Object]:
    """From acknowledgement to outcome. They overlap, so each is an asynchronous pair."""
    threads = {owner: thread for thread, owner in enumerate(owners, 1)}
    for operation in operations:
        owner = operation.run_id or operation.sampler_id or ""
        event: _Object = {
            "cat": str(owner),
            "id": operation.ticket_id,
            "name": operation.kind,
            "pid": 1,
            "tid": threads.get(owner, 0),
        }
        begin = event | {"ph": "b", "ts": _microseconds(operation.created_at)}
        yield begin | {"args": _operation(operation)}
        if operation.finished_at is not None:
            yield event | {"ph": "e", "ts": _microseconds(operation.finished_at)}


def _session(session: SessionRecord) -> _Object:
    return {
        "session_id": session.id,
        "state": session.state,
        "project_id": session.project_id,
        "display_name": session.display_name,
        "tags": session.tags,
        "user_metadata": session.user_metadata,
        "sdk_version": session.sdk_version,
        "created_at": _time(session.created_at),
        "ended_at": _time(session.ended_at),
        "end_reason": session.end_reason,
        "end_detail": session.end_detail,
    }


def _run(run: RunRecord) -> _Object:
    return {
        "training_run_id": run.id,
        "base_model": run.base_model,
        "lora_rank": run.spec.rank,
        "state": run.state,
        "user_metadata": run.user_metadata,
        "created_at": _time(run.created_at),
        "last_request_at": _time(run.last_request_at),
    }


def _sampler(sampler: SamplerRecord) -> _Object:
    return {
        "sampler_id": sampler.id,
        "base_model": sampler.base_model,
        "created_at": _time(sampler.created_at),
    }


def _operation(operation: OperationRecord) -> _Object:
    return {
        "request_id": operation.ticket_id,
        "kind": operation.kind,
        "training_run_id": operation.run_id,
        "sampler_id": operation.sampler_id,
        "seq_id": operation.seq,
        "state": operation.state,
        "num_samples": len(operation.sequence_ids) or None,
        "input_tokens": operation.input_tokens,
        "output_tokens": operation.output_tokens,
        "error": operation.error_message,
        "created_at": _time(operation.created_at),
        "finished_at": _time(operation.finished_at),
        "delivered_at": _time(operation.delivered_at),
    }


def _checkpoint(checkpoint: CheckpointRecord) -> _Object:
    return {
        "training_run_id": checkpoint.run_id,
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "size_bytes": checkpoint.size_bytes,
        "created_at": _time(checkpoint.created_at),
        "expires_at": _time(checkpoint.expires_at),
    }


def _time(when: datetime | None) -> str | None:
    return None if when is None else when.isoformat()


def _microseconds(when: datetime) -> int:
    return round(when.timestamp() * 1e6)
