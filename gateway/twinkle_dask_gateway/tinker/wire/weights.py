"""Bodies that save, load and describe checkpoints."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from twinkle_dask_gateway.tinker.wire.base import (
    Address,
    Asked,
    CheckpointName,
    Id,
    RunSeq,
    TtlS,
)
from twinkle_dask_gateway.tinker.wire.runs import OptimizerConfig

#: The key of another account, or a token for it, that may read the weights.
Token = Annotated[str | None, Field(max_length=8192, repr=False)]


class SaveWeights(Asked):
    """``POST save_weights``."""

    model_id: Id
    path: CheckpointName
    seq_id: RunSeq | None = None
    ttl_seconds: TtlS | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None


class SaveWeightsForSampler(Asked):
    """``POST save_weights_for_sampler``: under a name, or into a new sampler."""

    model_id: Id
    path: CheckpointName | None = None
    sampling_session_seq_id: RunSeq | None = None
    kind: Literal["snapshot", "inflight"] | None = "snapshot"
    seq_id: RunSeq | None = None
    ttl_seconds: TtlS | None = None
    user_metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> "SaveWeightsForSampler":
        if (self.path is None) == (self.sampling_session_seq_id is None):
            raise ValueError("give either path or sampling_session_seq_id")
        if self.kind == "inflight" and self.path is not None:
            raise ValueError("path: inflight weights have none; give sampling_session_seq_id")
        return self


class SaveWeightsExternal(Asked):
    """``POST save_weights_external``: PEFT's files, encrypted for recipients if there are any."""

    model_id: Id
    path: CheckpointName
    seq_id: RunSeq | None = None
    ttl_seconds: TtlS | None = None
    age_encryption_recipients: Annotated[list[str], Field(max_length=1024)] | None = None


class LoadWeights(Asked):
    """Into a run (``model_id``, ``seq_id``), or into a new one (``session_id``, ...)."""

    model_id: Id | None = None
    seq_id: RunSeq | None = None
    session_id: Id | None = None
    model_seq_id: RunSeq | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    path: Address
    optimizer: bool = False
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: Token = None


class CopyWeights(Asked):
    """``POST copy_weights``: into a project, or into a session at a place among its runs."""

    source_path: Address
    destination_project_id: str | None = None
    session_id: Id | None = None
    model_seq_id: RunSeq | None = None
    ttl_seconds: TtlS | None = None
    weights_access_token: Token = None

    @model_validator(mode="after")
    def _one_destination(self) -> "CopyWeights":
        into_session = self.session_id is not None
        if into_session != (self.model_seq_id is not None):
            raise ValueError("give session_id and model_seq_id together")
        if into_session == bool(self.destination_project_id):
            raise ValueError("give either destination_project_id, or session_id and model_seq_id")
        return self


class WeightsQuery(Asked):
    """``weights_info``."""

    tinker_path: Address


class SetTtl(Asked):
    """``PUT .../ttl``; null removes it."""

    ttl_seconds: TtlS | None
