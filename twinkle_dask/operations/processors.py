"""Data sets, loaders and other processors of tenants: records here, the work on CPU workers."""

import asyncio
import re
import secrets
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final
from weakref import WeakValueDictionary

import orjson
import structlog

from twinkle_dask.clock import utc_now
from twinkle_dask.cluster.supervisor import Supervisor
from twinkle_dask.config import ServiceConfig
from twinkle_dask.errors import InvalidRequest, NotFound, QuotaExceeded
from twinkle_dask.operations.catalogue import Catalogue
from twinkle_dask.operations.sessions import Sessions
from twinkle_dask.operations.sweeping import remove_all
from twinkle_dask.operations.values import Tenant
from twinkle_dask.processor import functions
from twinkle_dask.processor.states import LoaderState, read_state
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import ProcessorRecord, SavedDataRecord
from twinkle_dask.store.store import Store
from twinkle_dask.types import Json, SessionId, TenantId

log = structlog.stdlib.get_logger(__name__)

_LONG_TEXT: Final = 16 * 1024
_PID: Final = re.compile(r"pid:([0-9a-f]{32})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    """What a function answered.

    Attributes:
        result: As JSON.
        over: There is no next row, or no row of that number; the result means nothing then.
    """

    result: bytes
    over: bool = False


class Processors:
    """The processors of all tenants.

    Calls of one processor are done one after another; what a call changes is recorded before it
    is answered, so a restart or a lost worker loses nothing but the call under way.
    """

    def __init__(
        self,
        *,
        config: ServiceConfig,
        store: Store,
        blobs: BlobStore,
        supervisor: Supervisor,
        catalogue: Catalogue,
        sessions: Sessions,
    ) -> None:
        self._config = config
        self._store = store
        self._blobs = blobs
        self._supervisor = supervisor
        self._catalogue = catalogue
        self._sessions = sessions
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._in_making: defaultdict[TenantId, set[str]] = defaultdict(set)
        # Held while processors in the making and those in the store are counted, or change places.
        self._counting: defaultdict[TenantId, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def create(
        self,
        tenant: Tenant,
        session: SessionId,
        processor_type: str,
        class_type: str,
        arguments: Json,
    ) -> str:
        """Make a processor.

        Returns:
            Its id, ``pid:`` and 32 hexadecimal digits.

        Raises:
            InvalidRequest: Unknown names or arguments, or a source that cannot be read.
            NotFound: No such source, or a processor that the arguments name.
            QuotaExceeded: The tenant has as many processors, or as many bytes, as it may have.
        """
        functions.check_class(processor_type, class_type)
        await self._sessions.active(tenant, session)
        record = ProcessorRecord(
            id=secrets.token_hex(16),
            tenant_id=tenant.id,
            session_id=session,
            processor_type=processor_type,
            class_type=class_type,
            state="",
            num_bytes=0,
            created_at=utc_now(),
        )
        await self._reserve(record)
        try:
            named = await self._referenced(tenant, arguments)
            async with self._locked(named):
                await self._do(tenant, record, class_type, arguments, named)
        finally:
            self._in_making[tenant.id].discard(record.id)
        log.info("processor_created", processor=record.id, kind=class_type, session=session)
        return f"pid:{record.id}"

    async def call(
        self, tenant: Tenant, processor_id: str, function: str, arguments: Json
    ) -> Called:
        """Call a function of a processor.

        Raises:
            InvalidRequest: Unknown function or arguments, or the state of things forbids it.
            NotFound: No such processor of this tenant.
            QuotaExceeded: There is no room for the rows, or too many calls wait.
        """
        found = _PID.fullmatch(processor_id)
        if found is None:
            raise NotFound(f"There is no processor {processor_id[:60]!r}.")
        record = await self._record(tenant, found.group(1))
        functions.check_function(record.processor_type, record.class_type, function)
        named = await self._referenced(tenant, arguments)
        if record.processor_type == "dataloader":
            state = read_state(record.state)
            if isinstance(state, LoaderState):
                named.append(state.dataset)
        async with self._locked([record.id, *named]):
            # It may have changed while this call waited for its turn.
            record = await self._record(tenant, record.id)
            return await self._do(tenant, record, function, arguments, named)

    async def close_ended(self) -> None:
        """Forget processors whose session is over, and saved data that nobody reads.

        Raises:
            StorageFailed: The records cannot be read or written.
        """
        for record in await self._store.processors.ended():
            if self._sessions.is_active(record.session_id):
                continue
            async with self._locked([record.id]):
                await self._store.processors.remove(record.id)
                await remove_all(self._blobs, [record.folder])
            log.info("processor_closed", processor=record.id)
        before = utc_now() - timedelta(seconds=self._config.journal.keep_saved_data_s)
        await remove_all(self._blobs, await self._store.processors.remove_saved(before))

    async def _reserve(self, record: ProcessorRecord) -> None:
        tenant, limit = record.tenant_id, self._config.limits.max_processors
        async with self._counting[tenant]:
            held = await self._store.processors.count(tenant) + len(self._in_making[tenant])
            if held >= limit:
                raise QuotaExceeded(
                    f"You have {limit} processors (data sets, loaders and others), which is the "
                    "limit. They end with their session.",
                    30.0,
                )
            self._in_making[tenant].add(record.id)

    async def _record(self, tenant: Tenant, processor: str) -> ProcessorRecord:
        record = await self._store.processors.get(tenant.id, processor)
        if record is None:
            raise NotFound(
                f"There is no processor 'pid:{processor}'; processors end with their session."
            )
        return record

    async def _referenced(self, tenant: Tenant, arguments: Json) -> list[str]:
        """The processors that arguments name; all of them the tenant's."""
        named: list[str] = []
        for name in functions.REFERENCES & arguments.keys():
            value = arguments[name]
            found = _PID.fullmatch(value) if isinstance(value, str) else None
            if found is not None:
                named.append((await self._record(tenant, found.group(1))).id)
        return named

    async def _do(
        self,
        tenant: Tenant,
        record: ProcessorRecord,
        function: str,
        arguments: Json,
        named: list[str],
    ) -> Called:
        others = [await self._record(tenant, one) for one in named]
        self._check_inline(arguments)
        is_new = not record.state
        given = {k: v for k, v in arguments.items() if k not in functions.DROPPED}
        texts = {k: v for k, v in given.items() if isinstance(v, str) and len(v) > _LONG_TEXT}
        short = {k: v for k, v in given.items() if k not in texts}
        saved = {one.name: one.path for one in await self._store.processors.saved(tenant.id)}
        allowance = 0
        if is_new or function in functions.WRITES:
            held = await self._store.processors.held_bytes(tenant.id)
            # What this processor has now is replaced by what it gets.
            allowance = self._config.limits.processor_bytes - held + record.num_bytes
        value = {
            "processor": record.id,
            "processor_type": record.processor_type,
            "class_type": record.class_type,
            "function": function,
            "arguments": orjson.dumps(short),
            # Raw: to quote megabytes of rows as JSON would hold up everybody.
            "texts": {key: text.encode() for key, text in texts.items()},
            "state": record.state,
            "others": {one.id: one.state for one in others},
            "blobs_url": self._blobs.url,
            "folder": record.folder,
            "saved_folder": f"saved-data/{tenant.id}",
            "call_id": secrets.token_hex(8),
            "allowance": allowance,
            "max_answer_bytes": self._config.limits.max_answer_bytes,
            "data_roots": [str(root) for root in self._config.data_roots],
            "allow_hub": self._config.allow_hub_datasets,
            "saved": saved,
            "models": {model.name: model.source for model in self._catalogue.all()},
        }
        answer = await self._supervisor.processing.call("processors.run", value, tenant=tenant.id)
        await self._keep(tenant, record, answer, is_new=is_new)
        return Called(result=answer["result"], over=answer["over"])

    def _check_inline(self, arguments: Json) -> None:
        limit = self._config.limits.max_inline_bytes
        meta: Any = arguments.get("dataset_meta")
        size = len(meta) if isinstance(meta, str) else 0
        if size > limit:
            raise InvalidRequest(
                f"DatasetMeta holds {size} bytes of rows; {limit} is the most that a request may "
                "bring. Put them into a file below a data folder of the server, or add them in "
                "parts."
            )

    async def _keep(
        self, tenant: Tenant, record: ProcessorRecord, answer: Json, *, is_new: bool
    ) -> None:
        """Record what a call has changed, then remove what nothing names any more."""
        states: dict[str, tuple[str, int]] = {
            key: (state, answer["sizes"][key]) for key, state in answer["states"].items()
        }
        store = self._store.processors
        if is_new:
            state, num_bytes = states.pop(record.id)
            made = replace(record, state=state, num_bytes=num_bytes)
            async with self._counting[tenant.id]:
                await store.add(made)
                self._in_making[tenant.id].discard(record.id)
        if states:
            await store.update(states)
        doomed: list[str] = list(answer["dropped"])
        now = utc_now()
        if answer["used"]:
            await store.touch_saved(tenant.id, answer["used"], now)
        if answer["saved"] is not None:
            replaced = await store.save(
                SavedDataRecord(tenant_id=tenant.id, created_at=now, used_at=now, **answer["saved"])
            )
            doomed += [replaced] if replaced else []
        if doomed:
            await remove_all(self._blobs, doomed)

    @asynccontextmanager
    async def _locked(self, processors: Iterable[str]) -> AsyncGenerator[None]:
        """Hold the locks of processors, always in the same order."""
        async with AsyncExitStack() as stack:
            for processor in sorted(set(processors)):
                lock = self._locks.setdefault(processor, asyncio.Lock())
                await stack.enter_async_context(lock)
            yield
