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
from twinkle_dask_gateway.tinker.wire.futures import TicketQuery
from twinkle_dask_gateway.tinker.wire.runs import (
    AdamParams,
    CreateModel,
    LoraConfig,
    ModelQuery,
    OptimizerConfig,
    OptimStep,
)
from twinkle_dask_gateway.tinker.wire.sampling import CreateSamplingSession, Sample, SamplingParams
from twinkle_dask_gateway.tinker.wire.sessions import (
    CreateSession,
    FinishReason,
    FinishSession,
    Heartbeat,
)
from twinkle_dask_gateway.tinker.wire.values import ModelInput, TensorData
from twinkle_dask_gateway.tinker.wire.weights import (
    LoadWeights,
    SaveWeights,
    SaveWeightsForSampler,
    SetTtl,
    WeightsQuery,
)

__all__ = [
    "MAX_ID_LENGTH",
    "MAX_RUN_SEQ",
    "AdamParams",
    "Asked",
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
    "LoadWeights",
    "LoraConfig",
    "ModelInput",
    "ModelQuery",
    "OptimStep",
    "OptimizerConfig",
    "RunSeq",
    "Sample",
    "SamplingParams",
    "SaveWeights",
    "SaveWeightsForSampler",
    "Seq",
    "SetTtl",
    "TensorData",
    "TicketQuery",
    "Told",
    "WeightsQuery",
]
