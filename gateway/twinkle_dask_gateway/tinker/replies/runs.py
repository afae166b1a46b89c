"""Answers about runs."""

from datetime import datetime
from typing import Literal

from twinkle_dask_gateway.tinker.replies.base import Cursor, Reply
from twinkle_dask_gateway.tinker.replies.weights import Checkpoint


class ModelData(Reply):
    """What the client needs to find the tokenizer."""

    arch: str
    model_name: str
    tokenizer_id: str


class ModelInfo(Reply):
    """``get_info``."""

    type: Literal["get_info"] = "get_info"
    model_id: str
    model_name: str
    model_data: ModelData
    is_lora: bool = True
    lora_rank: int


class TrainingRun(Reply):
    """One run."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool = True
    lora_rank: int
    last_request_time: datetime
    last_checkpoint: Checkpoint | None
    last_sampler_checkpoint: Checkpoint | None
    user_metadata: dict[str, str]


class TrainingRuns(Reply):
    """A page of runs, latest first."""

    training_runs: list[TrainingRun]
    cursor: Cursor
