"""The warm-up schedules against Twinkle's own classes, bit for bit."""

import pytest
import torch
from twinkle.module.scheduler import CosineWarmupScheduler, LinearWarmupScheduler

from twinkle_dask.optimizers import optimizer_spec, schedule_spec
from twinkle_dask.trainer.schedules import Schedules

THEIRS = {
    "CosineWarmupScheduler": CosineWarmupScheduler,
    "LinearWarmupScheduler": LinearWarmupScheduler,
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("CosineWarmupScheduler", {"num_warmup_steps": 3, "num_training_steps": 11}),
        (
            "CosineWarmupScheduler",
            {"num_warmup_steps": 0, "num_training_steps": 9, "num_cycles": 2.5},
        ),
        ("LinearWarmupScheduler", {"num_warmup_steps": 4, "num_training_steps": 10}),
        ("LinearWarmupScheduler", {"num_warmup_steps": 0, "num_training_steps": 0}),
    ],
)
def test_rates_are_theirs(name: str, settings: dict[str, float]) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = THEIRS[name](optimizer, **settings)
    ours, spec = optimizer_spec("AdamW", {"lr": 3e-4}), schedule_spec(name, settings)
    schedules = Schedules()
    for step in range(15):
        assert schedules.settings_at(ours, spec, step)["lr"] == optimizer.param_groups[0]["lr"]
        optimizer.step()
        theirs.step()
