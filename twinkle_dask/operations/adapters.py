"""Adapters that clients name: runs with their settings kept here."""

import asyncio
import contextlib
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import structlog

from twinkle_dask.clock import utc_now
from twinkle_dask.errors import InvalidRequest, NotFound, ServiceFault
from twinkle_dask.operations import validation
from twinkle_dask.operations.adapter_settings import (
    AdapterSettings,
    Progress,
    progress_of,
    settings_of,
)
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.requests import StartRun
from twinkle_dask.operations.runs import Runs
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.tickets import TicketBoard
from twinkle_dask.operations.values import Failed, LoraRequest, ServedModel, Tenant, Waiting
from twinkle_dask.store.records import RunPhase, RunRecord, RunSettingsRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import LoraSpec, RunId, SessionId, TicketId

log = structlog.stdlib.get_logger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as it stands; ``pending`` is the blob of a batch that waits for its backward."""

    run: RunId
    settings: AdapterSettings
    progress: Progress
    pending: str | None


class Adapters:
    """Adapters by session and name. An adapter's run is ``<session>-<name>``."""

    def __init__(
        self,
        store: Store,
        sessions: Sessions,
        catalogue: Catalogue,
        runs: Runs,
        tickets: TicketBoard,
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._catalogue = catalogue
        self._runs = runs
        self._tickets = tickets
        self._locks = WeakValueDictionary[RunId, asyncio.Lock]()

    async def add(
        self,
        tenant: Tenant,
        session: SessionId,
        *,
        name: str,
        base_model: str,
        lora: LoraRequest,
        settings: AdapterSettings,
    ) -> RunId:
        """Make an adapter and wait until it is there.

        Raises:
            InvalidRequest: The name or the shape is not usable; nothing was made.
            Conflict: The session has an adapter of this name, which stays as it is.
            QuotaExceeded: The tenant has as many runs as it may.
        """
        model = self._catalogue.get(base_model)
        run = run_of(session, name)
        lora = validation.lora(lora, model)
        await self._sessions.active(tenant, session)
        spec = LoraSpec(
            rank=lora.rank,
            seed=secrets.randbits(62) if lora.seed is None else lora.seed,
            alpha=lora.alpha,
            train_attn=lora.train_attn,
            train_mlp=lora.train_mlp,
            train_unembed=lora.train_unembed,
            targets=lora.targets,
            dropout=lora.dropout,
            rslora=lora.rslora,
        )
        async with self.lock(run):
            half_made = await self._half_made(tenant, run, model.name, spec)
            if half_made is None:
                made = await self._runs.create_named(
                    tenant,
                    session,
                    run,
                    base_model=base_model,
                    spec=spec,
                    user_metadata={"adapter_name": name},
                )
                ticket = made.id
            else:
                ticket = await self._start(tenant, half_made)
            record = RunSettingsRecord(
                run_id=run,
                tenant_id=tenant.id,
                settings=settings.json(),
                progress=Progress().json(),
                created_at=utc_now(),
            )
            await self._store.run_settings.add(record)
            while ticket is not None:
                outcome = await self._tickets.wait(tenant.id, ticket, _WAIT_S)
                if isinstance(outcome, Failed):
                    await self._forget(run)
                    raise outcome.error
                if not isinstance(outcome, Waiting):
                    break
            return run

    async def get(
        self, tenant: Tenant, session: SessionId, name: str | None, model: ServedModel
    ) -> Adapter:
        """An adapter of a session and base model.

        Raises:
            InvalidRequest: No adapter is named.
            NotFound: There is none of this name.
        """
        if not name:
            raise InvalidRequest("adapter_name is missing; call add_adapter_to_model first.")
        unknown = NotFound(
            f"This session has no adapter {name[:80]!r} of model {model.name!r}; call "
            "add_adapter_to_model first."
        )
        if not _NAME.fullmatch(name):
            raise unknown
        run = run_of(session, name)
        record = await self._store.run_settings.get(tenant.id, run)
        if record is None:
            with contextlib.suppress(NotFound):
                await self._runs.lane(tenant, run)  # says so if its life is over
            raise unknown
        lane = await self._runs.lane(tenant, run)
        if not self._catalogue.same_base(lane.run.base_model, model.name):
            raise unknown
        return _adapter(record)

    async def settings(self, tenant: Tenant, run: RunId) -> AdapterSettings:
        """What a run is set to.

        Raises:
            NotFound: It is none of this tenant's, or one whose settings are not kept here.
        """
        return (await self.reread(tenant, run)).settings

    async def reread(self, tenant: Tenant, run: RunId) -> Adapter:
        """An adapter as it stands now.

        Raises:
            NotFound: It is none of this tenant's, or one whose settings are not kept here.
        """
        record = await self._store.run_settings.get(tenant.id, run)
        if record is None:
            raise NotFound(f"There is no adapter {run!r}.")
        return _adapter(record)

    async def change(
        self,
        tenant: Tenant,
        run: RunId,
        make: Callable[[AdapterSettings], AdapterSettings],
        progress: Callable[[AdapterSettings, Progress], Progress] | None = None,
    ) -> None:
        """Replace an adapter's settings by what ``make`` makes of them, all or nothing."""
        async with self.lock(run):
            adapter = await self.reread(tenant, run)
            settings = make(adapter.settings)
            validation.metadata(settings.json(), "An adapter's settings as")
            if settings != adapter.settings:
                await self._store.run_settings.set_settings(run, settings.json())
            if progress is not None:
                await self.keep(run, progress(settings, adapter.progress))

    async def keep(self, run: RunId, progress: Progress) -> None:
        """Write down how far an adapter has got; whoever calls holds its lock."""
        await self._store.run_settings.set_progress(run, progress.json())

    async def advance(self, tenant: Tenant, run: RunId, **changed: object) -> None:
        """Replace parts of an adapter's progress, as a loaded checkpoint says."""
        async with self.lock(run):
            adapter = await self.reread(tenant, run)
            await self.keep(run, replace(adapter.progress, **changed))

    def lock(self, run: RunId) -> asyncio.Lock:
        """Calls on one adapter are done one after the other, in the order of their arrival."""
        lock = self._locks.get(run)
        if lock is None:
            lock = self._locks[run] = asyncio.Lock()
        return lock

    async def _half_made(
        self, tenant: Tenant, run: RunId, base_model: str, spec: LoraSpec
    ) -> RunRecord | None:
        """A run of this name and shape that was begun and never got its settings, if there is one.

        The server was killed, or its disk was full, before anybody was told of it. Without this
        its name would be taken by something that cannot be used.
        """
        if await self._store.run_settings.get(tenant.id, run) is not None:
            return None
        record = await self._store.runs.get(tenant.id, run)
        if record is None or record.state not in {RunPhase.CREATING, RunPhase.READY}:
            return None
        alike = record.base_model == base_model and replace(record.spec, seed=spec.seed) == spec
        return record if alike else None

    async def _start(self, tenant: Tenant, record: RunRecord) -> TicketId | None:
        """The ticket of what makes a half-made run, begun if need be; None if it is ready."""
        if record.state is RunPhase.READY:
            return None
        begun = await self._store.journal.at(record.id, 0)
        if begun is not None:
            return begun.ticket_id
        request = StartRun(spec=record.spec)
        ticket = await self._runs.submit(
            tenant, record.id, seq=None, make=lambda _lane, _model: request, rated=False
        )
        return ticket.id

    async def _forget(self, run: RunId) -> None:
        """A run that could not be made leaves nothing behind, so that its name is free again."""
        try:
            await self._store.run_settings.remove(run)
            await self._runs.forget(run)
        except ServiceFault:
            log.exception("failed_run_not_forgotten", run=run)


def run_of(session: SessionId, name: str) -> RunId:
    """The run of an adapter.

    Raises:
        InvalidRequest: The name is not usable.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"Adapter name {name[:80]!r} is not usable: it has 1 to 64 letters, digits, '.', '_' "
            "or '-', and no '..'."
        )
    return RunId(f"{session}-{name}")


def _adapter(record: RunSettingsRecord) -> Adapter:
    return Adapter(
        record.run_id,
        settings_of(record.settings),
        progress_of(record.progress),
        record.pending_path,
    )
