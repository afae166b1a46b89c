"""Answers about samplers."""

from typing import Literal

from twinkle_dask_gateway.tinker.replies.base import Reply


class SamplingSessionCreated(Reply):
    """``create_sampling_session``."""

    sampling_session_id: str


class SamplingSessionJoined(Reply):
    """``join_sampling_session``; samples of this client have ``seq_id`` from a billion times it."""

    type: Literal["join_sampling_session"] = "join_sampling_session"
    client_counter: int


class Sampler(Reply):
    """``samplers/{id}``."""

    sampler_id: str
    base_model: str
    model_path: str | None
