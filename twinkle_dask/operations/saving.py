"""Saving and loading for clients that keep their place in the data with a checkpoint.

Such a client saves under any name, and a later checkpoint takes the place of an earlier one of the
same name; of weights for sampling only the newest are kept. It may load what it saved by the
address, by the place that it was told, or, in the same run, by the name.
"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from twinkle_dask.checkpoints.exports import ADAPTER_FILES
from twinkle_dask.clock import utc_now
from twinkle_dask.errors import InvalidRequest, NotFound, NotSupported
from twinkle_dask.operations import validation
from twinkle_dask.operations.adapter_settings import Progress
from twinkle_dask.operations.adapters import Adapters
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.save_roots import SaveRoots, remove_folder
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.training import Training
from twinkle_dask.operations.values import CheckpointAddress, SamplerSaved, Saved, Tenant
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import CheckpointKind, CheckpointRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import Json, RunId, TenantId

log = structlog.stdlib.get_logger(__name__)

_UNUSUAL = re.compile(r"[^\w-]", re.ASCII)
#: In the metadata of weights for sampling of which a run keeps only the newest.
_REPLACED = "replaced_by_next"
_SAVE_DIR = "save_dir"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """How far a client had got when it saved.

    Attributes:
        accumulation: How many backward passes make one optimizer step.
        consumed_samples: Of its data, by its own count.
    """

    progress: Progress
    accumulation: int = 1
    consumed_samples: int = 0

    def metadata(self) -> Json:
        """As it is kept with a checkpoint."""
        return {
            "cur_step": self.progress.gradients,
            "optimizer_steps": self.progress.steps,
            "schedule_steps": self.progress.schedule_steps,
            "learning_rate": self.progress.learning_rate,
            "gradient_accumulation_steps": self.accumulation,
            "consumed_train_samples": self.consumed_samples,
        }

    @classmethod
    def of(cls, metadata: Json) -> "Place":
        """From a checkpoint's metadata; the beginning where there is nothing of it."""
        rate = metadata.get("learning_rate")
        return cls(
            progress=Progress(
                gradients=_whole(metadata.get("cur_step"), 0),
                steps=_whole(metadata.get("optimizer_steps"), 0),
                schedule_steps=_whole(metadata.get("schedule_steps"), 0),
                learning_rate=float(rate) if isinstance(rate, int | float) else None,
            ),
            accumulation=_whole(metadata.get("gradient_accumulation_steps"), 1),
            consumed_samples=_whole(metadata.get("consumed_train_samples"), 0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A checkpoint that is durable.

    Attributes:
        place: Where its files are: a folder of this server, or an URL of its object store.
    """

    address: CheckpointAddress
    place: str


class Saving:
    """See the module."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: BlobStore,
        training: Training,
        checkpoints: Checkpoints,
        tickets: TicketBoard,
        adapters: Adapters,
        save_roots: SaveRoots,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._training = training
        self._checkpoints = checkpoints
        self._tickets = tickets
        self._adapters = adapters
        self._save_roots = save_roots

    async def save(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        name: str | None,
        optimizer: bool,
        consumed_samples: int,
        interval: int = 1,
    ) -> Kept | None:
        """Save a training checkpoint, in place of the run's earlier one of that name.

        Args:
            tenant: Who asks.
            run: An adapter of theirs.
            name: Unusual characters become underscores; None takes the time.
            optimizer: Whether training can go on from it as if it had never stopped.
            consumed_samples: Kept with it.
            interval: Nothing is saved unless the number of backward passes is a multiple of this.
        """
        async with self._adapters.lock(run):
            place = await self._stand(tenant, run, consumed_samples)
            if place.progress.gradients % interval:
                return None
            ticket = await self._training.save_state(
                tenant,
                run,
                seq=None,
                name=usable_name(name),
                overwrite=True,
                ttl_s=None,
                user_metadata=place.metadata(),
                optimizer=optimizer,
            )
            saved: Saved = await self._tickets.result(tenant.id, ticket.id)
        return await self._kept(tenant.id, saved.address)

    async def save_for_sampler(
        self,
        tenant: Tenant,
        run: RunId,
        *,
        name: str | None,
        consumed_samples: int,
        interval: int = 1,
    ) -> Kept | None:
        """Save weights for sampling under a new address, and remove those saved so before.

        Args: as ``save``; the address ends in the time even where there is a name.
        """
        stem = "" if name is None else f"{usable_name(name)}-"
        async with self._adapters.lock(run):
            place = await self._stand(tenant, run, consumed_samples)
            if place.progress.gradients % interval:
                return None
            ticket = await self._training.save_for_sampler(
                tenant,
                run,
                seq=None,
                name=validation.checkpoint_name(f"{stem}{_now()}"),
                sampler_seq=None,
                ttl_s=None,
                user_metadata={**place.metadata(), _REPLACED: True},
            )
            saved: SamplerSaved = await self._tickets.result(tenant.id, ticket.id)
        if saved.address is None:
            raise ValueError("Weights that were saved under a name have an address.")
        kept = await self._kept(tenant.id, saved.address)
        for record in await self._store.checkpoints.for_run(tenant.id, run):
            ours = record.kind is CheckpointKind.SAMPLER and record.user_metadata.get(_REPLACED)
            if ours and record.name is not None and record.name != saved.address.name:
                former = CheckpointAddress(run=run, kind=record.kind, name=record.name)
                await self._remove_copy(record)
                await self._checkpoints.delete(tenant, former)
        return kept

    async def load(
        self,
        tenant: Tenant,
        run: RunId,
        source: CheckpointAddress | str,
        *,
        optimizer: bool,
    ) -> Place:
        """Set a run to a checkpoint; gives how far its client had got.

        Args:
            tenant: Who asks.
            run: An adapter of theirs.
            source: An address, the place of a checkpoint, or a name of this run's.
            optimizer: Also moments, schedule and counters, which must have been saved.

        Raises:
            NotFound: There is no such checkpoint that the tenant may read.
            NotSupported: It is a model of a hub.
        """
        address = await self.address(tenant, source, run)
        record = await self._checkpoints.find(tenant.id, address)
        place = Place.of(record.user_metadata)
        async with self._adapters.lock(run):
            ticket = await self._training.load_state(
                tenant, run, seq=None, address=address, with_optimizer=optimizer
            )
            await self._tickets.result(tenant.id, ticket.id)
            if optimizer:
                before = (await self._adapters.reread(tenant, run)).progress
                there = place.progress
                now = replace(
                    before,
                    gradients=there.gradients,
                    steps=there.steps,
                    schedule_steps=there.schedule_steps,
                    learning_rate=there.learning_rate,
                )
                await self._adapters.keep(run, now)
        return place

    async def save_dirs(self, tenant: Tenant, runs: Sequence[RunId]) -> dict[RunId, str]:
        """Where checkpoints of runs go besides, of those for which that is set."""
        found = await self._store.run_settings.among(tenant.id, runs)
        dirs = {record.run_id: record.settings.get(_SAVE_DIR) for record in found}
        return {run: folder for run, folder in dirs.items() if isinstance(folder, str)}

    async def _stand(self, tenant: Tenant, run: RunId, consumed_samples: int) -> Place:
        adapter = await self._adapters.reread(tenant, run)
        return Place(
            progress=adapter.progress,
            accumulation=adapter.settings.accumulation,
            consumed_samples=consumed_samples,
        )

    async def _remove_copy(self, record: CheckpointRecord) -> None:
        """Remove what was written of a checkpoint below its run's save_dir."""
        try:
            folder = await self._save_folder(record)
            if folder is not None:
                await asyncio.to_thread(remove_folder, folder)
        except (InvalidRequest, OSError) as error:
            log.warning("copy_not_removed", checkpoint=record.id, error=str(error))

    async def address(
        self, tenant: Tenant, source: CheckpointAddress | str, run: RunId | None = None
    ) -> CheckpointAddress:
        """What a client means by an address, a place, or a name of a run; nothing is opened.

        Raises:
            NotFound: There is no such checkpoint of this tenant.
            NotSupported: It is a path or hub id of something that was not saved here.
        """
        if isinstance(source, CheckpointAddress):
            return source
        check_loadable(source)
        if "/" not in source:
            if run is None or not source:
                raise NotFound(f"There is no checkpoint {source[:80]!r}.")
            return CheckpointAddress(
                run=run, kind=CheckpointKind.TRAINING, name=usable_name(source)
            )
        record = await self._at_place(tenant.id, source.rstrip("/"))
        if record is None or record.name is None:
            raise NotFound(
                f"{source[:200]!r} is no checkpoint that was saved here, or it is another "
                "tenant's. Paths of the server and models of a hub cannot be loaded; give a "
                "twinkle:// address."
            )
        return CheckpointAddress(run=record.run_id, kind=record.kind, name=record.name)

    async def place_of(self, tenant: Tenant, address: CheckpointAddress) -> str:
        """Where the files of a tenant's own checkpoint are.

        Raises:
            NotFound: There is none of this tenant.
        """
        record = await self._own(tenant.id, address)
        return await self._place(record)

    async def own(self, tenant: Tenant, address: CheckpointAddress) -> None:
        """Make sure that a checkpoint is the tenant's own.

        Raises:
            NotFound: There is none of this tenant.
        """
        await self._own(tenant.id, address)

    async def files(self, tenant: TenantId, address: CheckpointAddress) -> dict[str, bytes]:
        """The adapter files of a tenant's own checkpoint, whole.

        Raises:
            NotFound: There is none of this tenant.
        """
        record = await self._own(tenant, address)
        return await asyncio.to_thread(self._read, record)

    async def _own(self, tenant: TenantId, address: CheckpointAddress) -> CheckpointRecord:
        record = await self._checkpoints.readable(tenant, address)
        if record.tenant_id != tenant:
            raise NotFound(
                f"There is no checkpoint {address.kind}/{address.name} of run {address.run!r}."
            )
        return record

    async def _kept(self, tenant: TenantId, address: CheckpointAddress) -> Kept:
        """A checkpoint that was just written, which is also written below the run's save_dir."""
        record = await self._own(tenant, address)
        folder = await self._save_folder(record)
        if folder is not None:
            await asyncio.to_thread(self._copy, record, folder)
        return Kept(address=address, place=await self._place(record))

    def _copy(self, record: CheckpointRecord, folder: Path) -> None:
        self._save_roots.write(folder, self._read(record))

    def _read(self, record: CheckpointRecord) -> dict[str, bytes]:
        names = (name for name in self._blobs.names(record.path) if name in ADAPTER_FILES)
        return {name: self._blobs.get(f"{record.path}/{name}") for name in names}

    async def _place(self, record: CheckpointRecord) -> str:
        folder = await self._save_folder(record)
        return f"{self._blobs.url}/{record.path}" if folder is None else str(folder)

    async def _save_folder(self, record: CheckpointRecord) -> Path | None:
        settings = await self._store.run_settings.get(record.tenant_id, record.run_id)
        save_dir = None if settings is None else settings.settings.get(_SAVE_DIR)
        if not isinstance(save_dir, str) or record.name is None:
            return None
        return await asyncio.to_thread(
            self._save_roots.folder,
            record.tenant_id,
            save_dir,
            record.run_id,
            str(record.kind),
            record.name,
        )

    async def _at_place(self, tenant: TenantId, place: str) -> CheckpointRecord | None:
        """The tenant's checkpoint of which ``place`` was told; told by comparing texts alone."""
        if place.startswith(f"{self._blobs.url}/"):
            path = place.removeprefix(f"{self._blobs.url}/")
            return await self._store.checkpoints.at_path(tenant, path)
        parts = place.rsplit("/", 3)
        if len(parts) != 4 or parts[2] not in tuple(CheckpointKind):
            return None
        _, run, kind, name = parts
        record = await self._store.checkpoints.get(tenant, RunId(run), CheckpointKind(kind), name)
        if record is None:
            return None
        try:
            folder = await self._save_folder(record)
        except InvalidRequest:
            return None  # its save_dir has gone
        return record if folder is not None and str(folder) == place else None


def usable_name(name: str | None) -> str:
    """A checkpoint's name of any text; of None the time, so that each is another.

    Raises:
        InvalidRequest: It is empty or too long.
    """
    if name is None:
        return _now()
    clean = _UNUSUAL.sub("_", name)
    return validation.checkpoint_name(f"_{clean}" if clean.startswith("-") else clean)


def check_loadable(source: str) -> None:
    """Refuse what looks like a model of a hub.

    Raises:
        NotSupported: It does.
    """
    if source.startswith(("hf://", "ms://", "http://", "https://")):
        raise NotSupported("Adapters cannot be loaded from a hub; give a twinkle:// address.")


def _now() -> str:
    return utc_now().strftime("%Y%m%d_%H%M%S_%f")


def _whole(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default
