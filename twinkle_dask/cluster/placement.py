"""Which worker carries which base model, in which role. Pure: numbers in, a plan out.

Dask's ``resources`` reserve nothing once an actor exists, so this plan is the ledger, and the
supervisor places each host at an exact address.

A base model with ``trainers`` and ``samplers`` configured gets so many hosts of each. The others
share the workers that are left evenly, the first ones getting one more. With one worker a base
model has one host that does both. With two it has a trainer and a sampler. With more, half of
them train (rounded down) and the rest sample, since generating costs more passes than training.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from twinkle_dask.cluster.commands import Role
from twinkle_dask.config import ModelConfig
from twinkle_dask.errors import StartupError


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One host that should exist: ``index`` counts the slots of a source."""

    source: str
    role: Role
    index: int


def sources(models: Mapping[str, ModelConfig]) -> dict[str, ModelConfig]:
    """Each source once, with the settings of the first name that uses it.

    Raises:
        StartupError: Two names of one source ask for different numbers of hosts.
    """
    found: dict[str, ModelConfig] = {}
    for name, model in models.items():
        first = found.setdefault(model.source, model)
        if (first.trainers, first.samplers) != (model.trainers, model.samplers):
            raise StartupError(
                f"Model {name!r} shares its source with another name but asks for other "
                "trainers or samplers; give both names the same numbers."
            )
    return found


def num_workers_needed(models: Mapping[str, ModelConfig]) -> int:
    """The fewest workers that ``plan`` can do with.

    Raises:
        StartupError: Two names of one source ask for different numbers of hosts.
    """
    return sum(max(1, m.trainers + m.samplers) for m in sources(models).values())


def plan(models: Mapping[str, ModelConfig], num_workers: int) -> list[Slot]:
    """Share workers out.

    Args:
        models: Served names.
        num_workers: GPU workers of the cluster.

    Raises:
        StartupError: Too few workers.
    """
    by_source = sources(models)
    fixed = {s: m for s, m in by_source.items() if m.trainers}
    flexible = [s for s in by_source if s not in fixed]
    free = num_workers - sum(m.trainers + m.samplers for m in fixed.values())
    if (needed := num_workers_needed(models)) > num_workers:
        raise StartupError(
            f"The cluster has {num_workers} worker(s) with the resource GPU, but the configured "
            f"models need at least {needed}. Start more with: dask worker SCHEDULER "
            "--resources GPU=1 --nthreads 1 --memory-limit 0"
        )
    slots: list[Slot] = []
    for source, model in fixed.items():
        slots += _slots(source, model.trainers, model.samplers)
    for position, source in enumerate(flexible):
        share = free // len(flexible) + (position < free % len(flexible))
        slots += _slots(source, share // 2, share - share // 2)
    return slots


def _slots(source: str, trainers: int, samplers: int) -> list[Slot]:
    if trainers == 0:
        return [Slot(source=source, role=Role.BOTH, index=i) for i in range(samplers)]
    roles = [Role.TRAINER] * trainers + [Role.SAMPLER] * samplers
    return [Slot(source=source, role=role, index=i) for i, role in enumerate(roles)]
