"""Builds the engines a host was asked for. The only module of this room that loads torch."""

from dataclasses import replace

import torch

from twinkle_dask.cluster.commands import HostConfig, Role
from twinkle_dask.model.loading import load_base
from twinkle_dask.sampler.engine import TorchSampler, TorchSamplerConfig
from twinkle_dask.sampler.interface import Sampler
from twinkle_dask.trainer.engine import Trainer, TrainerConfig
from twinkle_dask.types import ModelFacts


def build_engines(config: HostConfig) -> tuple[Trainer | None, Sampler | None, ModelFacts]:
    """Load the base model and put the engines of the host's role over it.

    Raises:
        StartupError: The base model cannot be loaded.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    base = load_base(config.source, config.dtype, config.max_rank)
    trainer = sampler = None
    if config.role is not Role.SAMPLER:
        settings = TrainerConfig()
        if config.tokens_per_micro_batch is not None:
            settings = replace(settings, tokens_per_micro_batch=config.tokens_per_micro_batch)
        trainer = Trainer(base, settings)
    if config.role is not Role.TRAINER:
        sampler = TorchSampler(base, TorchSamplerConfig(max_kv_bytes=config.kv_cache_bytes))
    return trainer, sampler, base.facts
