"""Sending adapters elsewhere: to folders and object stores of the operator's, or to a hub.

An upload goes on beside its client, who asks how it stands. What a restart interrupts is begun
again; only uploads to a hub end with the process, because their tokens are never written down.
"""

import asyncio
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from twinkle_dask.clock import utc_now
from twinkle_dask.errors import (
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    ServiceFault,
    StorageFailed,
    TwinkleDaskError,
    new_incident,
)
from twinkle_dask.operations.audit import Audit
from twinkle_dask.operations.save_roots import plain, tenant_folder
from twinkle_dask.operations.saving import Saving
from twinkle_dask.operations.values import CheckpointAddress, Tenant
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.store.records import UploadRecord, UploadState
from twinkle_dask.store.store import Store
from twinkle_dask.types import TenantId

log = structlog.stdlib.get_logger(__name__)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_HUB_TOKEN = re.compile(r"[\w.\-]{1,1024}", re.ASCII)
_HUB = "hub:"
_MAX_RUNNING = 4
_HUB_TIMEOUT_S = 600.0


class Uploads:
    """All uploads.

    Args:
        store: Knows how they stand.
        saving: Has the files.
        audit: Told of every upload.
        roots: Folders or URLs that may be written to; the first is for names without a place.
    """

    def __init__(self, store: Store, saving: Saving, audit: Audit, roots: Sequence[str]) -> None:
        self._store = store
        self._saving = saving
        self._audit = audit
        self._roots = tuple(roots)
        self._running: Counter[TenantId] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def recover(self) -> None:
        """Begin again what the last server did not end.

        Raises:
            StorageFailed: The records cannot be read or written.
        """
        for record in await self._store.uploads.running():
            if record.target.startswith(_HUB):
                why = "The server was restarted; start the upload again."
                await self._store.uploads.end(record.id, UploadState.FAILED, why)
            else:
                self._running[record.tenant_id] += 1
                self._begin(record, None)

    async def start(
        self, tenant: Tenant, address: CheckpointAddress, *, name: str, token: str | None
    ) -> UploadRecord:
        """Begin to send the adapter files of a tenant's own checkpoint.

        Args:
            tenant: Who asks.
            address: Theirs.
            name: ``owner/name``. With a token a model of the Hugging Face hub, which is made if it
                is not there, for its owner alone; else a folder below the first root.
            token: Of the hub.

        Raises:
            NotFound: There is no such checkpoint of this tenant.
            InvalidRequest: The name or the token is none, or there is nowhere to send it to.
            QuotaExceeded: Too many of the tenant's are going on.
        """
        if not _HUB_NAME.fullmatch(name) or ".." in name:
            raise InvalidRequest(
                f"hub_model_id {name[:100]!r} is not usable; it should read owner/name."
            )
        # It becomes a header; an error of the HTTP library's would put it into our log.
        if token and not _HUB_TOKEN.fullmatch(token):
            raise InvalidRequest("hub_token is not usable; it has letters, digits, '_' and '-'.")
        if not token and not self._roots:
            raise InvalidRequest(
                "This server has no folder or object store to upload to (setting upload_roots), "
                "and a hub needs hub_token; download the checkpoint instead."
            )
        if self._running[tenant.id] >= _MAX_RUNNING:
            raise QuotaExceeded(f"{_MAX_RUNNING} of your uploads are going on; wait for one.", 5.0)
        self._running[tenant.id] += 1
        try:
            record = await self._taken(tenant, address, name, token)
        except BaseException:
            self._running[tenant.id] -= 1
            raise
        self._begin(record, token)
        return record

    async def status(self, tenant: Tenant, upload: str) -> UploadRecord:
        """How an upload stands.

        Raises:
            NotFound: There is none of this tenant, or it ended long ago.
        """
        found = await self._store.uploads.get(tenant.id, upload)
        if found is None:
            raise NotFound(f"There is no upload {upload[:80]!r}; start it again.")
        return found

    async def stop(self) -> None:
        """Leave what is going on to the next server."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _taken(
        self, tenant: Tenant, address: CheckpointAddress, name: str, token: str | None
    ) -> UploadRecord:
        # What is not there is refused, not a failed upload.
        await self._saving.own(tenant, address)
        record = UploadRecord(
            id=f"req_{secrets.token_hex(16)}",
            tenant_id=tenant.id,
            run_id=address.run,
            kind=address.kind,
            name=address.name,
            target=f"{_HUB}{name}" if token else self._folder(tenant.id, name),
            state=UploadState.RUNNING,
            error=None,
            created_at=utc_now(),
        )
        await self._store.uploads.add(record)
        await self._audit.record(
            tenant,
            "checkpoints.uploaded",
            path=f"{address.run}/{address.kind}/{address.name}",
            target=record.target,
        )
        return record

    def _begin(self, record: UploadRecord, token: str | None) -> None:
        task = asyncio.create_task(self._carry_out(record, token), name="upload")
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._running[record.tenant_id] -= 1

        task.add_done_callback(ended)

    def _folder(self, tenant: TenantId, name: str) -> str:
        parts = "/".join(plain(part) for part in name.split("/"))
        return f"{self._roots[0].rstrip('/')}/{tenant_folder(tenant)}/{parts}"

    async def _carry_out(self, record: UploadRecord, token: str | None) -> None:
        error = await self._send(record, token)
        state = UploadState.COMPLETED if error is None else UploadState.FAILED
        try:
            await self._store.uploads.end(record.id, state, error)
        except StorageFailed as failed:
            # It stands as running, so the next server does it once more, which does no harm.
            log.warning("upload_not_recorded", upload=record.id, error=failed.message)

    async def _send(self, record: UploadRecord, token: str | None) -> str | None:
        """Send the files; gives why that failed, None if it did not."""
        address = CheckpointAddress(run=record.run_id, kind=record.kind, name=record.name)
        try:
            files = await self._saving.files(record.tenant_id, address)
            if token:
                name = record.target.removeprefix(_HUB)
                work = asyncio.to_thread(_to_hub, files, name, token)
                await asyncio.wait_for(work, _HUB_TIMEOUT_S)
            else:
                await asyncio.to_thread(_to_folder, files, record.target)
        except TwinkleDaskError as error:
            log.warning("upload_failed", target=record.target, error=error.message)
            return error.message
        except TimeoutError:
            return f"The hub did not take it within {_HUB_TIMEOUT_S:.0f} s."
        except Exception:
            incident = new_incident()
            log.exception("upload_failed", target=record.target, incident=incident)
            return f"Something went wrong on our side; incident {incident}."
        return None


def _to_folder(files: Mapping[str, bytes], target: str) -> None:
    root, _, folder = target.rpartition("/")
    BlobStore(root).put_folder(folder, files, overwrite=True, marker="adapter_model.safetensors")


def _to_hub(files: Mapping[str, bytes], name: str, token: str) -> None:
    # Here, because it takes half a second to import and few servers ever need it.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api: Any = HfApi(token=token)
    try:
        repo = api.create_repo(name, private=True, exist_ok=True)
        for path, data in files.items():
            api.upload_file(path_or_fileobj=data, path_in_repo=path, repo_id=repo.repo_id)
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise InvalidRequest(f"The hub refused the upload of {name} (status {status}).") from None
    except (OfflineModeIsEnabled, OSError) as error:
        raise ServiceFault(
            f"The hub cannot be reached from this server ({type(error).__name__})."
        ) from None
