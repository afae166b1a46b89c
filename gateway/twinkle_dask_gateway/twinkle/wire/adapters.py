"""Bodies about adapters: what they are, what they are set to, and their passes and steps."""

from typing import Any

from pydantic import Field, StrictInt

from twinkle_dask_gateway.twinkle.wire.base import AdapterName, Body, OpenBody


class ModelCall(OpenBody):
    """Nothing is asked for; any fields are let be."""


class AddAdapter(Body):
    """Make an adapter. ``config`` is a LoraConfig as a JSON text."""

    adapter_name: str
    config: str | None = None
    save_dir: str | None = None
    gradient_accumulation_steps: StrictInt = 1


class AdapterCall(OpenBody):
    """Something about an adapter, with arguments."""

    adapter_name: AdapterName


class SetLoss(AdapterCall):
    """Name the loss; the other fields are its settings."""

    loss_cls: str


class SetOptimizer(AdapterCall):
    """Name the optimizer; the other fields are its settings."""

    optimizer_cls: str


class SetScheduler(AdapterCall):
    """Name the learning rate's schedule; the other fields are its settings."""

    scheduler_cls: str


class SetTemplate(AdapterCall):
    """Name the template; the other fields are its settings."""

    template_cls: str


class SetProcessor(AdapterCall):
    """Name the processor of inputs; the other fields are its settings."""

    processor_cls: str


class AddMetric(AdapterCall):
    """Name a metric; without ``is_training`` it is for training and evaluation."""

    metric_cls: str
    is_training: bool | None = None


class ApplyPatch(AdapterCall):
    """Name a patch of the model."""

    patch_cls: str


class Pass(OpenBody):
    """Inputs for an adapter; the other fields are arguments of the pass, its loss and metrics."""

    inputs: Any = Field(description="Input features or trajectories: one, or a list.")
    adapter_name: AdapterName


class ForwardOnlyPass(OpenBody):
    """As ``Pass``; without an adapter's name it is refused with a sentence."""

    inputs: Any = Field(description="Input features or trajectories: one, or a list.")
    adapter_name: str | None = None


class Clip(AdapterCall):
    """Clip the gradient; the norms may be the text ``inf``."""

    max_grad_norm: float | str = 1.0
    norm_type: float | str = 2


class CalculateMetric(AdapterCall):
    """Ask the metrics of training or evaluation."""

    is_training: bool = True
