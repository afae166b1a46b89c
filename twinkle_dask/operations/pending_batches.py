"""The batch of an adapter that went forward and waits for its loss and gradient.

It is a blob beside the adapter's row, so it survives a restart like everything else.
"""

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any

from twinkle_dask import packing
from twinkle_dask.errors import ServiceFault
from twinkle_dask.operations.adapter_batches import AdapterBatch
from twinkle_dask.operations.adapter_metrics import Measured, accumulated
from twinkle_dask.operations.adapter_settings import Progress
from twinkle_dask.operations.adapters import Adapter, Adapters
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.store import Store

#: Larger batches are packed and read on a thread, so that the event loop keeps turning.
_INLINE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingBatch:
    """A batch that went forward and may still have a loss and a gradient.

    Attributes:
        training: Of ``forward``; else of ``forward_only``, which has no backward.
        adapter: False if the base model alone made the pass.
        dropout_seed: What the adapter's dropout left out in it.
        arguments: Of ``calculate_loss``, as JSON; None before it.
        measured: What metrics are told of the pass.
        counted: The metrics have been told.
    """

    batch: AdapterBatch
    training: bool
    adapter: bool
    dropout_seed: int | None
    arguments: str | None
    measured: Measured
    counted: bool = False


packing.register(PendingBatch)


class PendingBatches:
    """Those of all adapters, at most one each. The caller holds the adapter's lock."""

    def __init__(self, adapters: Adapters, store: Store, blobs: BlobStore) -> None:
        self._adapters = adapters
        self._store = store
        self._blobs = blobs

    async def told(self, adapter: Adapter, progress: Progress) -> Progress:
        """Progress with what the waiting batch means to the metrics, before it is replaced."""
        pending = await self.get(adapter)
        if pending is None or pending.counted:
            return progress
        return accumulated(adapter.settings, progress, pending.measured, training=pending.training)

    async def get(self, adapter: Adapter) -> PendingBatch | None:
        """The batch that waits; None if none does."""
        if adapter.pending is None:
            return None
        content = await asyncio.to_thread(self._blobs.get, adapter.pending)
        pending = await _aside(len(content), packing.unpack, content)
        if not isinstance(pending, PendingBatch):
            raise ServiceFault("The batch that waits cannot be read; call forward again.")
        return pending

    async def put(self, adapter: Adapter, pending: PendingBatch | None, progress: Progress) -> None:
        """Write progress down, and the batch that waits from now on."""
        if pending is None and adapter.pending is None:
            await self._adapters.keep(adapter.run, progress)
            return
        path = None
        if pending is not None:
            path = f"pending/{secrets.token_hex(12)}"
            size = sum(len(tokens) for tokens in pending.batch.tokens) * 32
            content = await _aside(size, packing.pack, pending)
            await asyncio.to_thread(self._blobs.put, path, content)
        await self._store.run_settings.set_pending(adapter.run, path, progress.json())
        if adapter.pending is not None:
            await asyncio.to_thread(self._blobs.remove, adapter.pending)


async def _aside(num_bytes: int, work: Any, value: Any) -> Any:
    return await asyncio.to_thread(work, value) if num_bytes > _INLINE_BYTES else work(value)
