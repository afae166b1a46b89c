"""The JSON bodies that clients send, by subject. What they get back is in ``replies``."""

from twinkle_dask_gateway.tinker.wire.base import (
    MAX_ID_LENGTH,
    MAX_RUN_SEQ,
    Asked,
    Id,
    RunSeq,
    Seq,
    Told,
)
from twinkle_dask_gateway.tinker.wire.batches import (
    Datum,
    Forward,
    ForwardBackward,
    ForwardBackwardInput,
)
from twinkle_dask_gateway.tinker.wire.custom_losses import CreateCustomLoss
from twinkle_dask_gateway.tinker.wire.futures import RetrieveFuture, RetrieveFutures, TicketQuery
from twinkle_dask_gateway.tinker.wire.runs import (
    AdamParams,
    CreateModel,
    LoraConfig,
    ModelQuery,
    OptimizerConfig,
    OptimStep,
)
from twinkle_dask_gateway.tinker.wire.sampling import (
    CreateSamplingSession,
    JoinSamplingSession,
    Sample,
    SamplingParams,
)
from twinkle_dask_gateway.tinker.wire.sessions import (
    AssignProject,
    CreateSession,
    FinishReason,
    FinishSession,
    Heartbeat,
    SearchCursor,
    SearchOwner,
    SearchSessions,
    SessionStatusQuery,
)
from twinkle_dask_gateway.tinker.wire.values import ModelInput, TensorData
from twinkle_dask_gateway.tinker.wire.weights import (
    CopyWeights,
    LoadWeights,
    SaveWeights,
    SaveWeightsExternal,
    SaveWeightsForSampler,
    SetTtl,
    WeightsQuery,
)

__all__ = [
    "MAX_ID_LENGTH",
    "MAX_RUN_SEQ",
    "AdamParams",
    "Asked",
    "AssignProject",
    "CopyWeights",
    "CreateCustomLoss",
    "CreateModel",
    "CreateSamplingSession",
    "CreateSession",
    "Datum",
    "FinishReason",
    "FinishSession",
    "Forward",
    "ForwardBackward",
    "ForwardBackwardInput",
    "Heartbeat",
    "Id",
    "JoinSamplingSession",
    "LoadWeights",
    "LoraConfig",
    "ModelInput",
    "ModelQuery",
    "OptimStep",
    "OptimizerConfig",
    "RetrieveFuture",
    "RetrieveFutures",
    "RunSeq",
    "Sample",
    "SamplingParams",
    "SaveWeights",
    "SaveWeightsExternal",
    "SaveWeightsForSampler",
    "SearchCursor",
    "SearchOwner",
    "SearchSessions",
    "Seq",
    "SessionStatusQuery",
    "SetTtl",
    "TensorData",
    "TicketQuery",
    "Told",
    "WeightsQuery",
]
