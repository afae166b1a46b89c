"""What a run owns on the device: four flat float32 buffers, the last three only while needed.

Weights, moments and gradient are laid out alike, so the optimizer, clipping, copies and checks are
a few calls however many layers there are; the model sees views of the buffers by weight name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np
import torch
from torch import Tensor

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.lora import LoraTensors
from twinkle_dask.trainer.optimizer import Moments, adamw_step, clip_scale
from twinkle_dask.types import (
    AdamParams,
    AdapterState,
    Float32Array,
    LoraSpec,
    OptimizerState,
    RunState,
    StepResult,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each weight lies in a flat buffer: one after another, in the order of ``shapes``."""

    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, base: BaseModel, spec: LoraSpec) -> "Layout":
        """The weights of an adapter of this shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for target in base.targets(spec):
            shapes[f"{target.module_path}.lora_A.weight"] = (spec.rank, target.in_features)
            shapes[f"{target.module_path}.lora_B.weight"] = (target.out_features, spec.rank)
        return cls(shapes)

    def zeros(self, device: torch.device) -> Tensor:
        """A buffer of zeros."""
        return torch.zeros(sum(map(prod, self.shapes.values())), device=device)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The weights as views of a buffer."""
        sizes = [prod(shape) for shape in self.shapes.values()]
        parts = torch.split(flat, sizes)
        pairs = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in pairs}

    def gather(self, arrays: Mapping[str, Float32Array], device: torch.device) -> Tensor:
        """Copy arrays from the host into a new buffer.

        Raises:
            InvalidRequest: A weight is missing, is one too many, or has another shape.
        """
        found = {name: array.shape for name, array in arrays.items()}
        if found != self.shapes:
            names = found.keys() | self.shapes.keys()
            name = min(name for name in names if found.get(name) != self.shapes.get(name))
            raise InvalidRequest(
                f"The state does not fit this base model and LoRA configuration: {name} has shape "
                f"{found.get(name)}, expected {self.shapes.get(name)}."
            )
        if not arrays:
            return self.zeros(device)
        flat = np.concatenate([arrays[name].ravel() for name in self.shapes], dtype=np.float32)
        return torch.from_numpy(flat).to(device)  # pyright: ignore[reportUnknownMemberType]

    def scatter(self, flat: Tensor) -> dict[str, Float32Array]:
        """Copy a buffer to the host, as arrays."""
        host = flat.to("cpu", copy=True)
        return {name: view.numpy() for name, view in self.views(host).items()}


@dataclass(frozen=True, slots=True, eq=False)
class Gradient:
    """A buffer to add gradients to, and its views by weight name."""

    flat: Tensor
    views: Mapping[str, Tensor]


class Run:
    """One tenant's adapter with its optimizer and accumulated gradient."""

    def __init__(self, base: BaseModel, state: RunState, *, with_optimizer: bool) -> None:
        """Copy a state to the device.

        Raises:
            InvalidRequest: The state does not fit the base model.
        """
        spec = state.adapter.spec
        self._device = base.device
        self._layout = Layout.of(base, spec)
        self._weights = self._layout.gather(state.adapter.weights, base.device)
        self.adapter = LoraTensors(spec, self._layout.views(self._weights), dtype=base.dtype)
        self._moments: Moments | None = None
        if with_optimizer and state.optimizer is not None and state.optimizer.step > 0:
            self._moments = Moments(
                state.optimizer.step,
                self._layout.gather(state.optimizer.exp_avg, base.device),
                self._layout.gather(state.optimizer.exp_avg_sq, base.device),
            )
        self._gradient: Tensor | None = None
        if state.gradients is not None:
            self._gradient = self._layout.gather(state.gradients, base.device)

    def new_gradient(self) -> Gradient:
        """A gradient of zeros, not yet part of the run."""
        flat = self._layout.zeros(self._device)
        return Gradient(flat, self._layout.views(flat))

    def add_gradient(self, gradient: Gradient) -> None:
        """Add to what the next step spends; ``gradient`` is the run's from then on.

        Raises:
            InvalidRequest: It is not finite; nothing was added.
        """
        if not isfinite(gradient.flat.sum()):
            raise InvalidRequest("The gradient is not finite; nothing was added to the run.")
        if self._gradient is None:
            self._gradient = gradient.flat
        else:
            self._gradient += gradient.flat

    def step(self, adam: AdamParams) -> StepResult:
        """Spend the accumulated gradient; without one, nothing changes.

        Raises:
            InvalidRequest: The sum of the gradients overflowed; it is dropped, no step was taken.
        """
        gradient, self._gradient = self._gradient, None
        if gradient is None:
            return StepResult(metrics={"grad_norm:mean": 0.0})
        grad_norm = _norm(gradient)
        if not isfinite(grad_norm):
            raise InvalidRequest(
                "The accumulated gradient is not finite. It was dropped and no step was taken."
            )
        if (scale := clip_scale(grad_norm, adam.grad_clip_norm)) < 1.0:
            gradient *= scale
        if self._moments is None:
            self._moments = Moments.fresh(self._weights)
        adamw_step(self._weights, gradient, self._moments, adam)
        self.adapter.touch()
        return StepResult(metrics={"grad_norm:mean": grad_norm})

    def export(self, *, gradients: bool, optimizer: bool) -> RunState:
        """Copy the state to the host; an optimizer that never stepped has no moments to copy."""
        adapter = AdapterState(spec=self.adapter.spec, weights=self._layout.scatter(self._weights))
        saved = None
        if optimizer and self._moments is None:
            saved = OptimizerState(step=0, exp_avg={}, exp_avg_sq={})
        elif optimizer and self._moments is not None:
            saved = OptimizerState(
                step=self._moments.step,
                exp_avg=self._layout.scatter(self._moments.exp_avg),
                exp_avg_sq=self._layout.scatter(self._moments.exp_avg_sq),
            )
        unspent = None
        if gradients and self._gradient is not None:
            unspent = self._layout.scatter(self._gradient)
        return RunState(adapter=adapter, optimizer=saved, gradients=unspent)


def _norm(flat: Tensor) -> float:
    return float(torch.linalg.vector_norm(flat))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
