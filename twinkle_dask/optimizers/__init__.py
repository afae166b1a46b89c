"""What a tenant may name for its steps: torch's optimizers and schedules, as closed tables.

No torch here: the gateway checks names and settings, ``trainer`` looks the classes up.
"""

from twinkle_dask.optimizers.schedules import SCHEDULES, check_together, schedule_spec
from twinkle_dask.optimizers.steps import checked_step, clip_gradient
from twinkle_dask.optimizers.table import OPTIMIZERS, optimizer_spec

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "check_together",
    "checked_step",
    "clip_gradient",
    "optimizer_spec",
    "schedule_spec",
]
