"""What was sampled, kept as long as its session, for those who asked for it.

A sample is kept whole, under its ticket; its sequences are named after the ticket and counted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from twinkle_dask import packing
from twinkle_dask.clock import utc_now
from twinkle_dask.operations import contents
from twinkle_dask.operations.sweeping import remove_all
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import RecordedRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import (
    Int32Array,
    SampleRequest,
    SampleResult,
    SessionId,
    TenantId,
    TicketId,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSample:
    """A prompt and what was drawn after it: int32 (N,), and (M,) for each sequence."""

    prompt: Int32Array
    sequences: tuple[Int32Array, ...]


def sequence_ids(ticket: TicketId, num_samples: int) -> tuple[str, ...]:
    """The names of a sample's sequences, in the order of its result."""
    return tuple(f"{ticket}-{i}" for i in range(num_samples))


def sequence_of(sequence_id: str) -> tuple[TicketId, int] | None:
    """The ticket and place behind a name; None if it is none of ours."""
    ticket, _, place = sequence_id.rpartition("-")
    if not (ticket and place.isascii() and place.isdigit() and len(place) < 10):
        return None
    return TicketId(ticket), int(place)


class Recording:
    """The recorded samples of all sessions that are alive."""

    def __init__(self, store: Store, blobs: BlobStore) -> None:
        self._store = store
        self._blobs = blobs

    async def add(
        self, tenant: TenantId, session: SessionId, ticket: TicketId, request: bytes, result: bytes
    ) -> None:
        """Keep a sample, given as its packed request and result. Repeating it changes nothing.

        Raises:
            StorageFailed: It could not be stored.
        """
        asked: SampleRequest = packing.unpack(request)
        drawn: SampleResult = packing.unpack(result)
        sample = RecordedSample(
            prompt=asked.prompt, sequences=tuple(one.tokens for one in drawn.sequences)
        )
        kept = await contents.keep(self._blobs, f"recorded/{ticket}", packing.pack(sample))
        await self._store.recorded.add(
            RecordedRecord(
                ticket_id=ticket,
                tenant_id=tenant,
                session_id=session,
                created_at=utc_now(),
                content_path=kept.path,
                content=kept.inline,
            )
        )

    async def find(
        self, tenant: TenantId, session: SessionId, tickets: Iterable[TicketId]
    ) -> Mapping[TicketId, RecordedSample]:
        """Those of these tickets whose samples were recorded in the tenant's session.

        Raises:
            StorageFailed: They cannot be read.
        """
        return {
            record.ticket_id: packing.unpack(await contents.recorded_of(self._blobs, record))
            for record in await self._store.recorded.of(tenant, session, tickets)
        }

    async def remove_ended(self) -> None:
        """Forget what was recorded in sessions that are over."""
        paths = await self._store.recorded.remove_ended()
        if paths:
            await remove_all(self._blobs, paths)


packing.register(RecordedSample)
