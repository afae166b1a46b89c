"""Train and sample on a twinkle_dask service without installing one: no torch, no dask.

    with Service("http://127.0.0.1:8000", api_key="tml-...") as service:
        run = service.create_run("my-model", lora=Lora(rank=16))
        run.set_optimizer("AdamW", lr=1e-4)
        for step in range(20):
            print(run.forward_backward([Feature.of(prompt, answer)]).loss)
            run.step()
        saved = run.save_for_sampler()
        sampler = service.sampler("my-model", checkpoint=saved.address)
        for sample in sampler.sample([Feature(input_ids=prompt)], SamplingParams(max_tokens=20)):
            print(sample.sequences[0].text)

``AsyncService`` and what it makes are the same with ``await``. ``inputs.py`` holds what is sent,
``models.py`` and ``results.py`` what is answered, ``calls/`` which requests there are,
``retrying.py`` when one is sent again, ``errors.py`` what can go wrong; ``door.py`` does the I/O.
"""

from twinkle_dask_client.addresses import Address
from twinkle_dask_client.dataset import AsyncDataset, Dataset
from twinkle_dask_client.errors import (
    BadReply,
    ClientError,
    Conflict,
    Gone,
    InvalidRequest,
    NotAuthenticated,
    NotConfigured,
    NotFound,
    NotPermitted,
    RequestRefused,
    ServiceFault,
    SessionLost,
    TryLater,
    Unreachable,
)
from twinkle_dask_client.inputs import (
    Conversation,
    Feature,
    Lora,
    Message,
    Rows,
    SamplingParams,
)
from twinkle_dask_client.models import Capabilities, Checkpoint, RunInfo, RunPage, ServedModel
from twinkle_dask_client.results import Forwarded, Sample, Saved, Sequence
from twinkle_dask_client.retrying import RetryPolicy
from twinkle_dask_client.run import AsyncRun, Run
from twinkle_dask_client.sampler import AsyncSampler, Sampler
from twinkle_dask_client.service import AsyncService, Service

__all__ = [
    "Address",
    "AsyncDataset",
    "AsyncRun",
    "AsyncSampler",
    "AsyncService",
    "BadReply",
    "Capabilities",
    "Checkpoint",
    "ClientError",
    "Conflict",
    "Conversation",
    "Dataset",
    "Feature",
    "Forwarded",
    "Gone",
    "InvalidRequest",
    "Lora",
    "Message",
    "NotAuthenticated",
    "NotConfigured",
    "NotFound",
    "NotPermitted",
    "RequestRefused",
    "RetryPolicy",
    "Rows",
    "Run",
    "RunInfo",
    "RunPage",
    "Sample",
    "Sampler",
    "SamplingParams",
    "Saved",
    "Sequence",
    "ServedModel",
    "Service",
    "ServiceFault",
    "SessionLost",
    "TryLater",
    "Unreachable",
]
