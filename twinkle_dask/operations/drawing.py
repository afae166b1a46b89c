"""Samples on their way: each goes to a host on its own, again and again until one answers."""

import asyncio
import secrets
from dataclasses import dataclass

import structlog

from twinkle_dask import packing
from twinkle_dask.cluster.commands import Cancel, Command, Sample
from twinkle_dask.cluster.link import HostLink
from twinkle_dask.cluster.supervisor import Supervisor
from twinkle_dask.errors import (
    HostLost,
    InvalidRequest,
    ServiceFault,
    StorageFailed,
    TwinkleDaskError,
)
from twinkle_dask.operations.events import Completion, Events
from twinkle_dask.operations.following import Following
from twinkle_dask.operations.quotas import Quotas
from twinkle_dask.operations.recording import Recording
from twinkle_dask.operations.samplers import Handle, Samplers, deleted
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.types import RunId, TicketId

log = structlog.stdlib.get_logger(__name__)

_MAX_LOSSES = 4
_RETRY_S = 1.0
_FAULT = "The sample failed; the service's log has the details."


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """An acknowledged sample.

    Attributes:
        payload: The packed request, as it stands in the journal.
        recorded: Whether what is drawn is to be kept with the session.
        following: Told what is drawn as it comes, and of the end; None if nobody follows.
    """

    ticket: TicketId
    handle: Handle
    seq: int | None
    payload: bytes
    recorded: bool
    following: Following | None = None


@dataclass(frozen=True, slots=True)
class _Tasks:
    draw: Draw
    attempt: "asyncio.Task[bytes]"
    settling: "asyncio.Task[None]"


class Drawing:
    """All samples that are waiting or being drawn."""

    def __init__(
        self,
        *,
        supervisor: Supervisor,
        samplers: Samplers,
        recording: Recording,
        tickets: TicketBoard,
        events: Events,
        quotas: Quotas,
    ) -> None:
        self._supervisor = supervisor
        self._samplers = samplers
        self._recording = recording
        self._tickets = tickets
        self._events = events
        self._quotas = quotas
        self._tasks: dict[TicketId, _Tasks] = {}

    def start(self, draw: Draw) -> None:
        """Draw. The sample has been counted for its tenant, and is given back at its end."""
        attempt = asyncio.create_task(self._attempt(draw), name=f"sample {draw.ticket}")
        settling = asyncio.create_task(self._settle(draw, attempt))
        self._tasks[draw.ticket] = _Tasks(draw, attempt, settling)
        settling.add_done_callback(lambda done: self._settled(draw, done))

    def find(self, ticket: TicketId) -> Draw | None:
        """The sample of a ticket, until its outcome is durable."""
        tasks = self._tasks.get(ticket)
        return None if tasks is None else tasks.draw

    async def cancel(self, draw: Draw) -> None:
        """Stop it on its host too, and free what it held; returns once its ticket has failed.

        One that has been drawn already keeps its result.
        """
        tasks = self._tasks[draw.ticket]
        tasks.attempt.cancel()
        await asyncio.wait({tasks.settling})

    async def stop(self) -> None:
        """End all of it; the journal keeps what is not done."""
        tasks = list(self._tasks.values())
        for one in tasks:
            one.settling.cancel()  # first, or it would take the rest for a client's wish
            one.attempt.cancel()
        await asyncio.gather(*(one.settling for one in tasks), return_exceptions=True)
        await asyncio.gather(*(one.attempt for one in tasks), return_exceptions=True)

    def _settled(self, draw: Draw, settling: "asyncio.Task[None]") -> None:
        del self._tasks[draw.ticket]
        self._quotas.samples.remove(draw.handle.record.tenant_id)
        if draw.following is not None:
            draw.following.end()
        if not settling.cancelled() and (error := settling.exception()) is not None:
            log.error("sample_failed", ticket=draw.ticket, exc_info=error)

    async def _settle(self, draw: Draw, attempt: "asyncio.Task[bytes]") -> None:
        structlog.contextvars.bind_contextvars(ticket=draw.ticket, sampler=draw.handle.record.id)
        await asyncio.wait({attempt})
        outcome: bytes | TwinkleDaskError | None = None
        while True:
            try:
                if outcome is None:
                    outcome = await self._outcome(draw, attempt)
                if isinstance(outcome, bytes):
                    if draw.recorded:
                        await self._record(draw, outcome)
                    await self._tickets.finish(draw.ticket, outcome)
                else:
                    await self._tickets.fail(draw.ticket, outcome)
            except StorageFailed as error:
                log.warning("outcome_not_stored", error=error.message)
                await asyncio.sleep(_RETRY_S)
            except Exception:
                if not isinstance(outcome, bytes):
                    raise
                log.exception("result_not_taken")
                outcome = ServiceFault(_FAULT)
            else:
                break
        size = len(outcome) if isinstance(outcome, bytes) else None
        event = Completion(ticket=draw.ticket, num_bytes=size)
        self._events.add(draw.handle.record.id, draw.seq, event)

    async def _record(self, draw: Draw, result: bytes) -> None:
        """Before the result is told, since training data may name its sequences at once."""
        sampler = draw.handle.record
        await self._recording.add(
            sampler.tenant_id, sampler.session_id, draw.ticket, draw.payload, result
        )

    async def _outcome(
        self, draw: Draw, attempt: "asyncio.Task[bytes]"
    ) -> bytes | TwinkleDaskError:
        try:
            return attempt.result()
        except asyncio.CancelledError:
            return InvalidRequest("The request was cancelled.")
        except StorageFailed as error:
            # Weights that cannot be read may be ones that their owner deleted.
            if await self._samplers.is_deleted(draw.handle):
                return deleted(draw.handle.record)
            return error
        except TwinkleDaskError as error:
            return error
        except Exception:
            log.exception("sample_failed")
            return ServiceFault(_FAULT)

    async def _attempt(self, draw: Draw) -> bytes:
        """Draw on one host after the other until one answers, with the same seed."""
        async with self._samplers.weights(draw.handle) as folder:
            following = draw.following
            sample = Sample(request=draw.payload, adapter=folder, watched=following is not None)
            body = packing.pack(sample)
            for _ in range(_MAX_LOSSES):
                link = await self._supervisor.sampler(draw.handle.model.source, folder)
                command = Command(
                    id=secrets.token_hex(12),
                    run=RunId(""),
                    tenant=draw.handle.record.tenant_id,
                    body=body,
                )
                if following is not None:
                    following.start_over()
                try:
                    return await link.send(command, following and following.add)
                except HostLost as error:
                    log.warning("sample_sent_again", why=error.message)
                except asyncio.CancelledError:
                    _cancel_on(link, command)
                    raise
            raise ServiceFault(f"The host went down {_MAX_LOSSES} times while this was drawn.")


def _cancel_on(link: HostLink, command: Command) -> None:
    cancel = Command(
        id=secrets.token_hex(12),
        run=RunId(""),
        tenant=command.tenant,
        body=packing.pack(Cancel(command_id=command.id)),
    )
    answer = link.send(cancel)
    answer.add_done_callback(lambda done: done.cancelled() or done.exception())
