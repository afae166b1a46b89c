"""Answers about samplers."""

from twinkle_dask_gateway.tinker.replies.base import Reply


class SamplingSessionCreated(Reply):
    """``create_sampling_session``."""

    sampling_session_id: str


class Sampler(Reply):
    """``samplers/{id}``."""

    sampler_id: str
    base_model: str
    model_path: str | None
