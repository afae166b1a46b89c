"""Talk to a twinkle_dask service without installing one: httpx and pydantic, no torch, no dask.

    with Service("http://127.0.0.1:8000", api_key="tml-...") as service:
        for run in service.iter_runs():
            print(run.id, run.last_request_at)

``AsyncService`` is the same with ``await``. ``calls.py`` says what can be asked, ``retrying.py``
when a request is tried again, ``errors.py`` what can go wrong; none of them does I/O.
"""

from twinkle_dask_client.errors import (
    BadReply,
    ClientError,
    Gone,
    InvalidRequest,
    NotAuthenticated,
    NotConfigured,
    NotFound,
    NotPermitted,
    RequestRefused,
    ServiceFault,
    TryLater,
    Unreachable,
)
from twinkle_dask_client.models import Capabilities, Checkpoint, Run, RunPage, ServedModel
from twinkle_dask_client.retrying import RetryPolicy
from twinkle_dask_client.service import AsyncService, Service

__all__ = [
    "AsyncService",
    "BadReply",
    "Capabilities",
    "Checkpoint",
    "ClientError",
    "Gone",
    "InvalidRequest",
    "NotAuthenticated",
    "NotConfigured",
    "NotFound",
    "NotPermitted",
    "RequestRefused",
    "RetryPolicy",
    "Run",
    "RunPage",
    "ServedModel",
    "Service",
    "ServiceFault",
    "TryLater",
    "Unreachable",
]
