"""Sending adapters elsewhere: to folders and object stores of the operator's, or to a hub.

An upload goes on beside its client, who asks how it stands. It is in this process alone: after a
restart nobody knows of it, and it is to be asked for again.
"""

import asyncio
import re
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import structlog

from twinkle_dask.errors import (
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    ServiceFault,
    TwinkleDaskError,
    new_incident,
)
from twinkle_dask.operations.audit import Audit
from twinkle_dask.operations.save_roots import plain, tenant_folder
from twinkle_dask.operations.saving import Saving
from twinkle_dask.operations.values import CheckpointAddress, Tenant
from twinkle_dask.store.blobs import BlobStore
from twinkle_dask.types import TenantId

log = structlog.stdlib.get_logger(__name__)

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_KEEP = 1000
_MAX_RUNNING = 4
_HUB_TIMEOUT_S = 600.0


class UploadState(StrEnum):
    """How an upload stands."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(slots=True, kw_only=True)
class Upload:
    """One upload. ``error`` says why it failed, ``target`` where it goes."""

    id: str
    tenant: TenantId
    target: str
    state: UploadState = UploadState.RUNNING
    error: str | None = None


class Uploads:
    """All uploads of this process.

    Args:
        saving: Has the files.
        audit: Told of every upload.
        roots: Folders or URLs that may be written to; the first is for names without a place.
    """

    def __init__(self, saving: Saving, audit: Audit, roots: Sequence[str]) -> None:
        self._saving = saving
        self._audit = audit
        self._roots = tuple(roots)
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(
        self, tenant: Tenant, address: CheckpointAddress, *, name: str, token: str | None
    ) -> Upload:
        """Begin to send the adapter files of a tenant's own checkpoint.

        Args:
            tenant: Who asks.
            address: Theirs.
            name: ``owner/name``. With a token a model of the Hugging Face hub, which is made if it
                is not there, for its owner alone; else a folder below the first root.
            token: Of the hub.

        Raises:
            NotFound: There is no such checkpoint of this tenant.
            InvalidRequest: The name is none, or there is nowhere to send it to.
            QuotaExceeded: Too many of the tenant's are going on.
        """
        if not _HUB_NAME.fullmatch(name) or ".." in name:
            raise InvalidRequest(
                f"hub_model_id {name[:100]!r} is not usable; it should read owner/name."
            )
        if not token and not self._roots:
            raise InvalidRequest(
                "This server has no folder or object store to upload to (setting upload_roots), "
                "and a hub needs hub_token; download the checkpoint instead."
            )
        running = [one for one in self._uploads.values() if one.tenant == tenant.id]
        if sum(one.state is UploadState.RUNNING for one in running) >= _MAX_RUNNING:
            raise QuotaExceeded(f"{_MAX_RUNNING} of your uploads are going on; wait for one.", 5.0)
        files = await self._saving.files(tenant, address)
        target = f"hub:{name}" if token else self._folder(tenant.id, name)
        upload = Upload(id=f"req_{secrets.token_hex(16)}", tenant=tenant.id, target=target)
        self._uploads[upload.id] = upload
        while len(self._uploads) > _KEEP:
            self._uploads.popitem(last=False)
        await self._audit.record(
            tenant,
            "checkpoints.uploaded",
            path=f"{address.run}/{address.kind}/{address.name}",
            target=target,
        )
        task = asyncio.create_task(self._send(upload, files, name, token), name="upload")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return upload

    async def status(self, tenant: Tenant, upload: str) -> Upload:
        """How an upload stands.

        Raises:
            NotFound: There is none of this tenant, or the server was restarted since.
        """
        found = self._uploads.get(upload)
        if found is None or found.tenant != tenant.id:
            raise NotFound(f"There is no upload {upload[:80]!r}; start it again.")
        return found

    async def stop(self) -> None:
        """Give up what is going on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _folder(self, tenant: TenantId, name: str) -> str:
        parts = "/".join(plain(part) for part in name.split("/"))
        return f"{self._roots[0].rstrip('/')}/{tenant_folder(tenant)}/{parts}"

    async def _send(
        self, upload: Upload, files: Mapping[str, bytes], name: str, token: str | None
    ) -> None:
        try:
            if token:
                work = asyncio.to_thread(_to_hub, files, name, token)
                await asyncio.wait_for(work, _HUB_TIMEOUT_S)
            else:
                await asyncio.to_thread(_to_folder, files, upload.target)
        except asyncio.CancelledError:
            upload.state, upload.error = UploadState.FAILED, "The server is stopping."
            raise
        except TwinkleDaskError as error:
            upload.state, upload.error = UploadState.FAILED, error.message
            log.warning("upload_failed", target=upload.target, error=error.message)
        except TimeoutError:
            upload.state = UploadState.FAILED
            upload.error = f"The hub did not take it within {_HUB_TIMEOUT_S:.0f} s."
        except Exception:
            incident = new_incident()
            log.exception("upload_failed", target=upload.target, incident=incident)
            upload.state = UploadState.FAILED
            upload.error = f"Something went wrong on our side; incident {incident}."
        else:
            upload.state = UploadState.COMPLETED


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
