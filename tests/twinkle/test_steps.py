"""Optimizer steps of the real client: torch's optimizers and schedules, and a host that is lost."""

from typing import Any

import psutil
import pytest
from adapters import lora, step
from conftest import KEY, MODEL
from twinkle_client import init_twinkle_client
from twinkle_client.model import MultiLoraTransformersModel


def workers_of(pid: int) -> list[psutil.Process]:
    """The process that carries the host: the one that holds most memory."""
    children = psutil.Process(pid).children(recursive=True)
    return sorted(children, key=lambda child: child.memory_info().rss)[-1:]


def prepared(name: str, path: str | None = None) -> MultiLoraTransformersModel:
    model = MultiLoraTransformersModel(MODEL)
    model.add_adapter_to_model(name, lora(), gradient_accumulation_steps=2)
    model.set_loss("CrossEntropyLoss")
    model.set_optimizer("RMSprop", lr=1e-3, momentum=0.9)
    model.set_lr_scheduler("CosineWarmupScheduler", num_warmup_steps=2, num_training_steps=20)
    if path is not None:
        model.load(path, load_optimizer=True)
    return model


@pytest.mark.timeout(180)
def test_a_lost_host_does_not_show(start_service: Any) -> None:
    """Optimizer memory, counters and the schedule's place are as if nothing had happened."""
    with start_service(journal={"snapshot_operations": 3}) as service:
        client = init_twinkle_client(base_url=service.url, api_key=KEY)
        first = prepared("first")
        step(first, 5)
        saved = first.save("start", save_optimizer=True).twinkle_path
        # With no gradient waiting, since checkpoints hold none.
        undisturbed, disturbed = prepared("undisturbed", saved), prepared("disturbed", saved)
        expected = step(undisturbed, 7)
        losses = step(disturbed, 3)
        for worker in workers_of(service.pid):
            worker.kill()
        losses += step(disturbed, 4)
        assert losses == pytest.approx(expected, rel=1e-6)
        assert len(set(losses)) == 4  # a step after every second batch
        told = [m.calculate_metric(is_training=True).result for m in (undisturbed, disturbed)]
        rates = [
            {name: value for name, value in one.items() if "learning rate" in name} for one in told
        ]
        assert rates[0]
        assert rates[0] == rates[1]
        client.close()


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("Adam", {"lr": 1e-2, "betas": [0.9, 0.99]}),
        ("SGD", {"lr": 1e-1, "momentum": 0.9, "nesterov": True}),
        ("Muon", {"lr": 1e-2}),
        ("Adafactor", {"lr": 1e-2}),
    ],
)
def test_optimizers_learn(
    model: MultiLoraTransformersModel, optimizer: str, settings: dict[str, Any]
) -> None:
    model.add_adapter_to_model(optimizer, lora())
    model.set_loss("CrossEntropyLoss")
    model.set_optimizer(optimizer, **settings)
    losses = step(model, 6)
    assert losses[-1] < losses[0]
