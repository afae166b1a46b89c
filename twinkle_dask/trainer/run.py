"""What a run owns on the device: four flat float32 buffers, the last three only while needed.

Weights, moments and gradient are laid out alike, so the optimizer, clipping, copies and checks are
a few calls however many layers there are; the model sees views of the buffers by weight name. A
run without work keeps its buffers and nothing else: the layout is shared by all runs of one shape,
and the views are made anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.lora import LoraTensors
from twinkle_dask.trainer.gradient import Gradient
from twinkle_dask.trainer.layout import Layout
from twinkle_dask.trainer.optimizer import Moments, adamw_step, clip_scale, norm
from twinkle_dask.types import (
    AdamParams,
    AdapterState,
    LoraSpec,
    OptimizerState,
    RunState,
    StepResult,
)


@dataclass(frozen=True, slots=True, eq=False)
class Buffers:
    """All that a run is, apart from its spec; on whatever device."""

    weights: Tensor
    moments: Moments | None = None
    gradient: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers that there are, in an order that their number and kinds tell."""
        moments = [] if self.moments is None else [self.moments.exp_avg, self.moments.exp_avg_sq]
        return [self.weights, *moments, *([] if self.gradient is None else [self.gradient])]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Buffers":
        """The same state with its ``tensors`` elsewhere."""
        weights, *others = tensors
        moments = None
        if self.moments is not None:
            moments = Moments(self.moments.step, others.pop(0), others.pop(0))
        return Buffers(weights, moments, others.pop() if self.gradient is not None else None)

    @property
    def num_bytes(self) -> int:
        """Of all buffers together."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Run:
    """One tenant's adapter with its optimizer and accumulated gradient.

    Attributes:
        spec: Of the adapter.
    """

    def __init__(
        self, spec: LoraSpec, layout: Layout, buffers: Buffers, dtype: torch.dtype
    ) -> None:
        """Take buffers over.

        Args:
            spec: Of the adapter.
            layout: Of each buffer.
            buffers: On the base model's device; the run's own from here on.
            dtype: Of the computation.
        """
        self.spec = spec
        self._layout = layout
        self._dtype = dtype
        self._device = buffers.weights.device
        self._weights = buffers.weights
        self._moments = buffers.moments
        self._gradient = buffers.gradient
        self._grad_norm: float | None = None
        self._finite: bool | None = None
        self._adapter: LoraTensors | None = None

    @classmethod
    def of_state(
        cls, base: BaseModel, layout: Layout, state: RunState, *, with_optimizer: bool
    ) -> "Run":
        """Copy a state to the device.

        Raises:
            InvalidRequest: The state does not fit the base model.
        """
        moments = gradient = None
        weights = layout.gather(state.adapter.weights, base.device)
        if with_optimizer and state.optimizer is not None and state.optimizer.step > 0:
            moments = Moments(
                state.optimizer.step,
                layout.gather(state.optimizer.exp_avg, base.device),
                layout.gather(state.optimizer.exp_avg_sq, base.device),
            )
        if state.gradients is not None:
            gradient = layout.gather(state.gradients, base.device)
        return cls(state.adapter.spec, layout, Buffers(weights, moments, gradient), base.dtype)

    @property
    def adapter(self) -> LoraTensors:
        """The weights as the model takes them; the same object until ``rest``."""
        if self._adapter is None:
            layout, weights, dtype = self._layout, self._weights, self._dtype
            self._adapter = LoraTensors(
                self.spec,
                layout.views(weights),
                dtype=dtype,
                copies=lambda: layout.views(weights.to(dtype)),
                finite=self._is_finite,
            )
        return self._adapter

    def _is_finite(self) -> bool:
        if self._finite is None:
            self._finite = isfinite(float(norm(self._weights)))
        return self._finite

    @property
    def num_weights(self) -> int:
        """Of the adapter."""
        return self._layout.size

    @property
    def buffers(self) -> Buffers:
        """What the run is, as it stands now; not a copy."""
        return Buffers(self._weights, self._moments, self._gradient)

    def rest(self) -> None:
        """Let go of everything but the buffers: views, and copies in the computation's dtype."""
        self._adapter = None

    def new_gradient(self) -> Gradient:
        """A gradient of zeros, not yet part of the run."""
        return Gradient(self._layout, self._device)

    def add_gradient(self, gradient: Gradient) -> None:
        """Add to what the next step spends; ``gradient`` is the run's from then on.

        Raises:
            InvalidRequest: It is not finite; nothing was added.
        """
        # The norm tells as much as a sum would, and the step needs it if nothing else is added.
        size = float(norm(gradient.flat))
        if not isfinite(size) and not isfinite(gradient.flat.sum()):
            raise InvalidRequest("The gradient is not finite; nothing was added to the run.")
        if self._gradient is None:
            self._gradient, self._grad_norm = gradient.flat, size
        else:
            self._gradient += gradient.flat
            self._grad_norm = None

    def step(self, adam: AdamParams) -> StepResult:
        """Spend the accumulated gradient; without one, nothing changes and only its norm 0 is told.

        Raises:
            InvalidRequest: The sum of the gradients overflowed; it is dropped, no step was taken.
        """
        gradient = self._gradient
        if gradient is None:
            return StepResult(metrics={"grad_norm:mean": 0.0})
        # Before anything changes, should there be no memory for them.
        moments = self._moments or Moments.fresh(self._weights)
        self._gradient = None
        grad_norm = float(norm(gradient)) if self._grad_norm is None else self._grad_norm
        self._grad_norm = None
        if not isfinite(grad_norm):
            raise InvalidRequest(
                "The accumulated gradient is not finite. It was dropped and no step was taken."
            )
        if (scale := clip_scale(grad_norm, adam.grad_clip_norm)) < 1.0:
            gradient *= scale
        self._moments = moments
        norms = adamw_step(self._weights, gradient, moments, adam)
        self._finite = isfinite(norms.weight)
        if self._adapter is not None:
            self._adapter.touch()
        metrics = {
            "grad_norm:mean": grad_norm,
            "update_norm:mean": norms.update,
            "weight_norm:mean": norms.weight,
            "learning_rate:mean": adam.learning_rate,
            "step:max": float(moments.step),
        }
        return StepResult(metrics=metrics)

    def export(self, *, gradients: bool, optimizer: bool) -> RunState:
        """Copy the state to the host; an optimizer that never stepped has no moments to copy."""
        adapter = AdapterState(spec=self.spec, weights=self._layout.scatter(self._weights))
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
