"""Answers about runs and checkpoints."""

from datetime import datetime
from typing import Any

from twinkle_dask_gateway.twinkle.replies.base import Answer


class KeptCheckpoint(Answer):
    """A checkpoint in a list; ``time`` has its zone."""

    checkpoint_id: str
    checkpoint_type: str
    time: datetime
    size_bytes: int
    public: bool
    twinkle_path: str
    base_model: str
    is_lora: bool
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool
    user_metadata: dict[str, Any]


class KeptCheckpoints(Answer):
    """All checkpoints of a run, oldest first."""

    checkpoints: list[KeptCheckpoint]
    cursor: None = None


class KeptRun(Answer):
    """A run; ``model_owner`` is the tenant's name."""

    training_run_id: str
    base_model: str
    model_owner: str
    save_dir: str | None
    is_lora: bool
    corrupted: bool
    lora_rank: int
    last_request_time: datetime
    last_checkpoint: KeptCheckpoint | None
    last_sampler_checkpoint: KeptCheckpoint | None
    user_metadata: dict[str, Any]


class RunCursor(Answer):
    """Where a page of runs lies in the whole list."""

    limit: int
    offset: int
    total_count: int


class KeptRuns(Answer):
    """Runs, newest first."""

    training_runs: list[KeptRun]
    cursor: RunCursor


class CheckpointRemoved(Answer):
    """A checkpoint is gone."""

    success: bool
    message: str


class CheckpointPlace(Answer):
    """Where a checkpoint's files are: a folder of the server, or an URL of its object store."""

    path: str
    twinkle_path: str


class WeightsShape(Answer):
    """Whose weights they are, and of what shape."""

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    lora_rank: int


class AdapterSaved(Answer):
    """What was saved; nothing (empty and null) between the intervals of a save."""

    twinkle_path: str
    checkpoint_dir: str | None


class Progress(Answer):
    """How far a client had got when it saved."""

    cur_step: int
    consumed_train_samples: int
    gradient_accumulation_steps: int


class AdapterResumed(Answer):
    """A run goes on from a checkpoint."""

    result: Progress


class UploadStarted(Answer):
    """An upload goes on by itself."""

    request_id: str


class UploadStatus(Answer):
    """How an upload stands; ``error`` says why it failed."""

    request_id: str
    status: str
    error: str | None
