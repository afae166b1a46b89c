"""Builds the engines a host was asked for. The only module of this room that loads torch."""

import tempfile
from dataclasses import replace
from pathlib import Path

import structlog
import torch

from twinkle_dask.cluster.commands import HostConfig, Role
from twinkle_dask.errors import CannotSample, StartupError
from twinkle_dask.model.allocator import keep_freed_memory
from twinkle_dask.model.loading import load_base
from twinkle_dask.sampler.engine import TorchSampler, TorchSamplerConfig
from twinkle_dask.sampler.interface import Sampler
from twinkle_dask.trainer.budget import free_bytes
from twinkle_dask.trainer.engine import Trainer, TrainerConfig
from twinkle_dask.trainer.paging import PagingConfig
from twinkle_dask.types import ModelFacts

log = structlog.stdlib.get_logger(__name__)

# A smaller model's operations are over before two threads have met, once clients want the cores as
# well: a pair through the service takes 43 to 47 ms with one thread and 47 to 50 with two, though
# alone in the process two are faster (24 and 32 ms). Large passes have a lane for each core anyway.
_PARAMETERS_FOR_THREADS = 20_000_000

# Of what is free once the weights are loaded. The rest is for a pass's activations and the
# sampler's keys and values (``trainer.budget``, ``sampler.startup``).
_ADAPTERS_SHARE_OF_FREE = 0.2


def build_engines(
    config: HostConfig, folder: Path
) -> tuple[Trainer | None, Sampler | None, ModelFacts, int]:
    """Load the base model and put the engines of the host's role over it.

    A host of both roles goes without a sampler if the model can be trained and not sampled; its
    facts tell why.

    Args:
        config: Of the host.
        folder: On a local disk; gets a folder for runs that there is no memory for. Losing it
            costs nothing but time, since the journal and snapshots hold what it holds.

    Returns:
        The engines, what is told of the model, and the threads for the one that computes.

    Raises:
        StartupError: The base model cannot be loaded, or a setting is of no use here.
    """
    if config.deterministic and torch.cuda.is_available():
        raise StartupError(
            "engine.deterministic is for hosts without a GPU: on one, the gradient of attention is "
            "summed in no fixed order."
        )
    keep_freed_memory()
    threads = config.threads or torch.get_num_threads()
    # This thread is not the one that will compute. Were both to have a team of threads, OpenMP
    # would see more threads than cores and let them sleep between any two operations: a step of
    # the tiny model (two threads, in process) takes 55 ms then, and 24 ms with one team.
    torch.set_num_threads(1)
    base = load_base(config.source, config.dtype, config.max_rank)
    facts = base.facts
    trainer = sampler = None
    if config.role is not Role.SAMPLER:
        settings = TrainerConfig(
            tokens_per_micro_batch=config.tokens_per_micro_batch,
            deterministic=config.deterministic,
            threads=threads,
        )
        trainer = Trainer(base, settings, _paging(config, base.device, folder))
    if config.role is not Role.TRAINER:
        try:
            sampler = TorchSampler(base, TorchSamplerConfig(max_kv_bytes=config.kv_cache_bytes))
        except CannotSample as error:
            if config.role is Role.SAMPLER:
                raise
            log.warning(
                "This model is trained and not sampled here",
                source=config.source,
                why=error.message,
            )
            facts = replace(facts, why_not_sampled=error.message)
    small = config.threads is None and facts.num_parameters < _PARAMETERS_FOR_THREADS
    return trainer, sampler, facts, 1 if small else threads


def _paging(config: HostConfig, device: torch.device, folder: Path) -> PagingConfig:
    on_device = config.adapter_bytes or int(_ADAPTERS_SHARE_OF_FREE * free_bytes(device))
    in_host = config.adapter_host_bytes
    if device.type == "cpu" and in_host is not None:
        raise StartupError(
            "engine.adapter_host_bytes is for hosts with a GPU. This one computes in the host's "
            "memory, which engine.adapter_bytes bounds."
        )
    if device.type != "cpu" and in_host is None:
        in_host = int(_ADAPTERS_SHARE_OF_FREE * free_bytes(torch.device("cpu")))
    log.info("Adapters may take memory", device_bytes=on_device, host_bytes=in_host)
    return PagingConfig(
        folder=Path(tempfile.mkdtemp(prefix="twinkle-runs-", dir=folder)),
        device_bytes=on_device,
        host_bytes=in_host,
    )
