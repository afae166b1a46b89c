"""Samplers: what each of them samples with, and the clients that share one."""

import zlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from twinkle_dask.clock import utc_now
from twinkle_dask.errors import InvalidRequest, NotFound, SessionEnded
from twinkle_dask.operations import validation
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.inflight import InflightWeights
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.values import CheckpointAddress, SamplerInfo, ServedModel, Tenant
from twinkle_dask.store.records import SamplerRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import RunId, SamplerId, SessionId, TenantId

_OWN_SEQ = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """A sampler as it is used: ``folder`` holds its weights.

    None is the base model, or the newest weights of the run that the sampler follows.
    """

    record: SamplerRecord
    model: ServedModel
    folder: str | None
    address: CheckpointAddress | None


class Samplers:
    """All samplers of all tenants."""

    def __init__(
        self,
        *,
        store: Store,
        catalogue: Catalogue,
        sessions: Sessions,
        checkpoints: Checkpoints,
        inflight: InflightWeights,
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._inflight = inflight
        self._handles: dict[SamplerId, Handle] = {}
        self._used: set[str] = set()
        checkpoints.on_removed(self._forget_weights)

    async def create(
        self,
        tenant: Tenant,
        session: SessionId,
        *,
        seq: int,
        base_model: str | None,
        address: CheckpointAddress | None,
    ) -> SamplerInfo:
        """Make a sampler of saved weights, or of the base model. An address wins over a name."""
        await self._sessions.active(tenant, session)
        checkpoint_id = None
        if address is not None:
            checkpoint = await self._checkpoints.find(tenant.id, address)
            checkpoint_id, base_model = checkpoint.id, checkpoint.base_model
        if base_model is None:
            raise InvalidRequest("Give a base_model or a model_path.")
        model = validation.sampled(self._catalogue.get(base_model))
        record = await self._store.samplers.add(
            SamplerRecord(
                id=SamplerId(f"{session}:sample:{seq}"),
                session_id=session,
                tenant_id=tenant.id,
                sampler_seq=seq,
                base_model=model.name,
                checkpoint_id=checkpoint_id,
                created_at=utc_now(),
            )
        )
        return await self.info(tenant, record.id)

    async def of_weights(
        self, tenant: Tenant, session: SessionId, *, model: ServedModel, checkpoint: str | None
    ) -> SamplerId:
        """The session's one sampler of some weights, for clients that make none themselves.

        Args:
            tenant: Whose.
            session: An active one of theirs.
            model: The base model.
            checkpoint: The id of weights that were found for the tenant; None is the base model.

        Raises:
            InvalidRequest: The model is trained here and not sampled.
        """
        validation.sampled(model)
        wanted = SamplerId(f"{session}:weights:{checkpoint or model.name}")
        if wanted in self._handles:
            return wanted
        # Far from the numbers that clients of other protocols count up from 0.
        seq = _OWN_SEQ + zlib.crc32(wanted.encode()) % _OWN_SEQ
        while True:
            stored = await self._store.samplers.add(
                SamplerRecord(
                    id=wanted,
                    session_id=session,
                    tenant_id=tenant.id,
                    sampler_seq=seq,
                    base_model=model.name,
                    checkpoint_id=checkpoint,
                    created_at=utc_now(),
                )
            )
            if stored.id == wanted:
                return wanted
            seq += 1  # another one's number is the same, by chance

    async def info(self, tenant: Tenant, sampler: SamplerId) -> SamplerInfo:
        """What a sampler samples."""
        handle = await self.find(tenant.id, sampler)
        return SamplerInfo(sampler=sampler, base_model=handle.model.name, address=handle.address)

    async def join(self, tenant: Tenant, sampler: SamplerId) -> int:
        """A number for one more client of a sampler: from 1, and never given twice.

        Its samples have ``seq`` from a billion times that number.

        Raises:
            NotFound: No such sampler of this tenant.
            SessionEnded: Its session is over.
        """
        await self.alive(tenant, sampler)
        return await self._store.samplers.join(sampler)

    async def alive(self, tenant: Tenant, sampler: SamplerId) -> Handle:
        """A sampler of a session that is alive, and is heard of now.

        Raises:
            NotFound: No such sampler of this tenant.
            SessionEnded: Its session is over.
        """
        handle = await self.find(tenant.id, sampler)
        if not self._sessions.is_active(handle.record.session_id):
            raise SessionEnded(f"The session of sampler {sampler!r} is over; create a new one.")
        self._sessions.touch(handle.record.session_id)
        return handle

    async def find(self, tenant: TenantId, sampler: SamplerId) -> Handle:
        """A sampler, whether its session is alive or not.

        Raises:
            NotFound: No such sampler of this tenant, or its weights were deleted.
        """
        handle = self._handles.get(sampler)
        if handle is None:
            record = await self._store.samplers.get(tenant, sampler)
            if record is None:
                raise NotFound(f"There is no sampler {sampler!r}.")
            handle = self._handles[sampler] = await self._open(record)
        if handle.record.tenant_id != tenant:
            raise NotFound(f"There is no sampler {sampler!r}.")
        return handle

    @asynccontextmanager
    async def weights(self, handle: Handle) -> AsyncGenerator[str | None]:
        """The folder to sample with (None is the base model), in place until the block ends."""
        run = handle.record.follows_run_id
        if run is None:
            if handle.record.checkpoint_id is not None:
                self._used.add(handle.record.checkpoint_id)
            yield handle.folder
            return
        newest = await self._inflight.newest(run)
        self._used.add(newest.checkpoint_id)
        with self._inflight.using(newest.checkpoint_id):
            yield newest.folder

    async def num_active(self, tenant: Tenant) -> int:
        """How many samplers of sessions that are alive a tenant has."""
        return await self._store.samplers.num_active(tenant.id)

    def take_used(self) -> set[str]:
        """The checkpoints that were sampled since the last call."""
        used, self._used = self._used, set()
        return used

    async def is_deleted(self, handle: Handle) -> bool:
        """Whether the weights of a sampler are not there any more."""
        record = handle.record
        if record.checkpoint_id is None:
            return False
        return await self._store.checkpoints.by_id(record.checkpoint_id) is None

    def forget_ended(self) -> None:
        """Take the samplers of ended sessions out of memory; a drawing keeps what it needs."""
        self._handles = {
            sampler: handle
            for sampler, handle in self._handles.items()
            if self._sessions.is_active(handle.record.session_id)
        }
        followed = (handle.record.follows_run_id for handle in self._handles.values())
        self._inflight.keep({run for run in followed if run is not None})

    def _forget_weights(self, checkpoint: str) -> None:
        self._handles = {
            sampler: handle
            for sampler, handle in self._handles.items()
            if handle.record.checkpoint_id != checkpoint
        }
        self._inflight.forget(checkpoint)

    async def _open(self, record: SamplerRecord) -> Handle:
        folder = address = None
        if record.checkpoint_id is not None:
            checkpoint = await self._store.checkpoints.by_id(record.checkpoint_id)
            if checkpoint is None:
                raise deleted(record)
            folder = checkpoint.path
            if checkpoint.name is not None:
                run = RunId(checkpoint.run_id)
                address = CheckpointAddress(run=run, kind=checkpoint.kind, name=checkpoint.name)
        model = validation.sampled(self._catalogue.get(record.base_model))
        return Handle(record=record, model=model, folder=folder, address=address)


def deleted(sampler: SamplerRecord) -> NotFound:
    """What to say where a sampler has lost its weights."""
    return NotFound(
        f"The weights of sampler {sampler.id!r} were deleted or have expired; create a new "
        "sampler. Weights saved without a name go when nobody has sampled them for some time: "
        "save under a name what is to stay."
    )
