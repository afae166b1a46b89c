"""Builds the engines a host was asked for. The only module of this room that loads torch."""

import ctypes
import os
from dataclasses import replace

import torch

from twinkle_dask.cluster.commands import HostConfig, Role
from twinkle_dask.model.loading import load_base
from twinkle_dask.sampler.engine import TorchSampler, TorchSamplerConfig
from twinkle_dask.sampler.interface import Sampler
from twinkle_dask.trainer.engine import Trainer, TrainerConfig
from twinkle_dask.types import ModelFacts

# Below, a kernel is over before threads have met; measured at 1.3 M (a pass of 256 tokens takes
# 28 ms on one core and 36 ms on two) and at 135 M (the second core saves 40 %).
_PARAMETERS_FOR_THREADS = 20_000_000

_DASKS_TRIM_THRESHOLD = "65536"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def build_engines(config: HostConfig) -> tuple[Trainer | None, Sampler | None, ModelFacts]:
    """Load the base model and put the engines of the host's role over it.

    Raises:
        StartupError: The base model cannot be loaded.
    """
    _keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    base = load_base(config.source, config.dtype, config.max_rank)
    if config.threads is None and base.facts.num_parameters < _PARAMETERS_FOR_THREADS:
        torch.set_num_threads(1)
    trainer = sampler = None
    if config.role is not Role.SAMPLER:
        settings = TrainerConfig()
        if config.tokens_per_micro_batch is not None:
            settings = replace(settings, tokens_per_micro_batch=config.tokens_per_micro_batch)
        trainer = Trainer(base, settings)
    if config.role is not Role.TRAINER:
        sampler = TorchSampler(base, TorchSamplerConfig(max_kv_bytes=config.kv_cache_bytes))
    return trainer, sampler, base.facts


def _keep_freed_memory() -> None:
    """Undo what a Dask nanny of default settings does to the allocator.

    It has freed memory given back at once, so that every tensor is faulted in anew: a step of
    SmolLM2-135M (bfloat16, one core) takes 3.9 s, and 2.8 s without. The embedded cluster's
    nannies leave it alone; these lines are for ``dask worker``.
    """
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") == _DASKS_TRIM_THRESHOLD:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most it takes
            mallopt(_M_TRIM_THRESHOLD, 256 * 2**20)
