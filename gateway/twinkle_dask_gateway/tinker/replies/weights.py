"""Answers about checkpoints."""

from datetime import datetime
from typing import Literal

from twinkle_dask_gateway.tinker.replies.base import Cursor, Reply


class WeightsInfo(Reply):
    """``weights_info``."""

    base_model: str
    is_lora: bool = True
    lora_rank: int
    train_unembed: bool
    train_mlp: bool
    train_attn: bool


class Checkpoint(Reply):
    """One checkpoint; its id is kind and name."""

    checkpoint_id: str
    checkpoint_type: Literal["training", "sampler", "external"]
    time: datetime
    tinker_path: str
    size_bytes: int
    public: bool
    user_metadata: dict[str, str]
    expires_at: datetime | None


class Checkpoints(Reply):
    """Checkpoints, latest first."""

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class WeightsCopied(Reply):
    """``copy_weights``."""

    tinker_path: str


class ExternalWeightsUrls(Reply):
    """Where the files of exported weights can be fetched without a key, until ``expires``."""

    urls: dict[str, str]
    expires: datetime
