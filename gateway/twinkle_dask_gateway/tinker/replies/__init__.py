"""The JSON bodies of answers that are not results of long operations, by subject."""

from twinkle_dask_gateway.tinker.replies.base import Cursor, Empty, Reply, Status
from twinkle_dask_gateway.tinker.replies.runs import ModelData, ModelInfo, TrainingRun, TrainingRuns
from twinkle_dask_gateway.tinker.replies.sampling import Sampler, SamplingSessionCreated
from twinkle_dask_gateway.tinker.replies.sessions import (
    Capabilities,
    ClientConfig,
    DynamicConfig,
    Session,
    SessionCreated,
    Sessions,
    SupportedModel,
)
from twinkle_dask_gateway.tinker.replies.weights import Checkpoint, Checkpoints, WeightsInfo

__all__ = [
    "Capabilities",
    "Checkpoint",
    "Checkpoints",
    "ClientConfig",
    "Cursor",
    "DynamicConfig",
    "Empty",
    "ModelData",
    "ModelInfo",
    "Reply",
    "Sampler",
    "SamplingSessionCreated",
    "Session",
    "SessionCreated",
    "Sessions",
    "Status",
    "SupportedModel",
    "TrainingRun",
    "TrainingRuns",
    "WeightsInfo",
]
