"""What a sample is drawn with, for clients that name weights with every sample.

Their samplers are made here, one for each weights and session. A name of an adapter stands for the
weights that it was given, or for the newest that the session's adapter of that name has saved for
sampling; it never stands for the base model.
"""

import asyncio

from twinkle_dask.errors import InvalidRequest, NotFound
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.checkpoints import Checkpoints
from twinkle_dask.operations.samplers import Samplers
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.values import CheckpointAddress, ServedModel, Tenant
from twinkle_dask.store.records import CheckpointKind, CheckpointRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import Json, RunId, SamplerId, SessionId, TenantId

_CHAT = "chat completions"


class SampledWeights:
    """Finds samplers by weights or by the names of adapters, and keeps what names are set to."""

    def __init__(
        self,
        *,
        store: Store,
        catalogue: Catalogue,
        sessions: Sessions,
        samplers: Samplers,
        checkpoints: Checkpoints,
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._sessions = sessions
        self._samplers = samplers
        self._checkpoints = checkpoints
        self._standing: dict[TenantId, SessionId] = {}
        self._opening: dict[TenantId, asyncio.Lock] = {}

    async def at(self, tenant: Tenant, address: CheckpointAddress) -> ServedModel:
        """The base model of saved weights that the tenant may sample.

        Raises:
            NotFound: There are none, or their base model is not served any more.
        """
        record = await self._checkpoints.find(tenant.id, address)
        model = self._catalogue.find(record.base_model)
        if model is None:
            raise NotFound(f"The base model {record.base_model!r} is not served any more.")
        return model

    async def sampler(
        self,
        tenant: Tenant,
        session: SessionId,
        model: ServedModel,
        *,
        address: CheckpointAddress | None = None,
        adapter: str = "",
    ) -> SamplerId:
        """The sampler for one sample.

        Args:
            tenant: Whose.
            session: An active one of theirs.
            model: The base model.
            address: Of saved weights.
            adapter: Where there is no address: the name of an adapter; empty is the base model.

        Raises:
            NotFound: There are no such weights.
            InvalidRequest: They are of another base model.
        """
        checkpoint = None
        if address is not None:
            checkpoint = await self._checkpoints.find(tenant.id, address)
        elif adapter:
            checkpoint = await self._named(tenant, session, model, adapter)
        if checkpoint is None:
            return await self._samplers.of_weights(tenant, session, model=model, checkpoint=None)
        self._check_base(checkpoint, model)
        found = checkpoint.id
        return await self._samplers.of_weights(tenant, session, model=model, checkpoint=found)

    async def set_template(
        self, session: SessionId, model: ServedModel, adapter: str, template: Json
    ) -> None:
        """Keep how trajectories are encoded for the samples of one session and adapter's name."""
        await self._store.sampler_settings.set_template(session, model.name, adapter, template)

    async def template(self, session: SessionId, model: ServedModel, adapter: str) -> Json | None:
        """What was set for the adapter's name, or else for none; None if nothing was."""
        for name in dict.fromkeys((adapter, "")):
            found = await self._store.sampler_settings.get(session, model.name, name)
            if found is not None and found.template is not None:
                return found.template
        return None

    async def name(
        self,
        tenant: Tenant,
        session: SessionId,
        model: ServedModel,
        adapter: str,
        address: CheckpointAddress | None,
    ) -> None:
        """Let an adapter's name stand for weights, or again for the session's own adapter.

        Raises:
            NotFound: There are no such weights, or no such adapter.
            InvalidRequest: They are of another base model.
        """
        weights = None
        if address is not None:
            checkpoint = await self._checkpoints.find(tenant.id, address)
            self._check_base(checkpoint, model)
            weights = checkpoint.id
        elif await self._store.runs.get(tenant.id, _run(session, adapter)) is None:
            raise NotFound(
                f"This session has no adapter {adapter!r}, and an adapter that was never trained "
                "is the base model. Give the adapter_uri of saved weights, or add the adapter to "
                "the model first."
            )
        await self._store.sampler_settings.set_weights(session, model.name, adapter, weights)

    async def standing_session(self, tenant: Tenant) -> SessionId:
        """A session for a tenant's calls that belong to none; a new one after the last has ended.

        It is heard of with each of these calls and expires like any other.
        """
        async with self._opening.setdefault(tenant.id, asyncio.Lock()):
            session = self._standing.get(tenant.id)
            if session is None or not self._sessions.is_active(session):
                session = await self._sessions.create(
                    tenant,
                    tags=(),
                    user_metadata={},
                    display_name=_CHAT,
                    project_id=None,
                    sdk_version=None,
                    idempotency_key=None,
                )
                self._standing[tenant.id] = session
        self._sessions.touch(session)
        return session

    async def _named(
        self, tenant: Tenant, session: SessionId, model: ServedModel, adapter: str
    ) -> CheckpointRecord:
        found = await self._store.sampler_settings.get(session, model.name, adapter)
        if found is not None and found.weights is not None:
            record = await self._store.checkpoints.by_id(found.weights)
            if record is None:
                raise NotFound(f"The weights that {adapter!r} stands for were deleted.")
            return record
        run = _run(session, adapter)
        if await self._store.runs.get(tenant.id, run) is None:
            raise NotFound(
                f"This session has no adapter {adapter!r}. Leave adapter_name empty to sample the "
                "base model, or give the adapter_uri of saved weights."
            )
        saved = [
            record
            for record in await self._store.checkpoints.for_run(tenant.id, run)
            if record.kind is CheckpointKind.SAMPLER
        ]
        if not saved:
            raise NotFound(
                f"Adapter {adapter!r} has no weights saved for sampling yet; call "
                "save(..., is_sampler=True) first, or give an adapter_uri."
            )
        return saved[-1]

    def _check_base(self, checkpoint: CheckpointRecord, model: ServedModel) -> None:
        if not self._catalogue.same_base(checkpoint.base_model, model.name):
            raise InvalidRequest(
                f"These weights are of base model {checkpoint.base_model!r}, not of {model.name!r}."
            )


def _run(session: SessionId, adapter: str) -> RunId:
    return RunId(f"{session}-{adapter}")
