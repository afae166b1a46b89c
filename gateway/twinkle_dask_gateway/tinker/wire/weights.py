"""Bodies that save, load and describe checkpoints."""

from typing import Any

from pydantic import model_validator

from twinkle_dask_gateway.tinker.wire.base import Asked, Id, RunSeq, Seq
from twinkle_dask_gateway.tinker.wire.runs import OptimizerConfig


class SaveWeights(Asked):
    """``POST save_weights``."""

    model_id: Id
    path: str
    seq_id: RunSeq | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None


class SaveWeightsForSampler(Asked):
    """``POST save_weights_for_sampler``: under a name, or into a new sampler."""

    model_id: Id
    path: str | None = None
    sampling_session_seq_id: Seq | None = None
    kind: str | None = "snapshot"
    seq_id: RunSeq | None = None
    ttl_seconds: int | None = None
    user_metadata: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_place_for_a_snapshot(self) -> "SaveWeightsForSampler":
        if self.kind not in {None, "snapshot"}:
            raise ValueError(
                "kind: only 'snapshot' is supported. Save again when newer weights are wanted."
            )
        if (self.path is None) == (self.sampling_session_seq_id is None):
            raise ValueError("give either path or sampling_session_seq_id")
        return self


class LoadWeights(Asked):
    """Into a run (``model_id``, ``seq_id``), or into a new one (``session_id``, ...)."""

    model_id: Id | None = None
    seq_id: RunSeq | None = None
    session_id: Id | None = None
    model_seq_id: Seq | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    path: str
    optimizer: bool = False
    optimizer_config: OptimizerConfig | None = None


class WeightsQuery(Asked):
    """``weights_info``."""

    tinker_path: str


class SetTtl(Asked):
    """``PUT .../ttl``; null removes it."""

    ttl_seconds: int | None
