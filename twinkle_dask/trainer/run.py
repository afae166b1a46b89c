"""What a run owns on the device: four flat float32 buffers, the last three only while needed.

Weights, moments and gradient are laid out alike, so the optimizer, clipping, copies and checks are
a few calls however many layers there are; the model sees views of the buffers by weight name. A
run without work keeps its buffers and nothing else: the layout is shared by all runs of one shape,
and the views are made anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

import torch
from torch import Tensor

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.base import BaseModel
from twinkle_dask.model.lora import LoraTensors
from twinkle_dask.trainer.gradient import Gradient
from twinkle_dask.trainer.layout import Layout
from twinkle_dask.trainer.optimizer import Moments, adamw_step, clip_scale, norm
from twinkle_dask.trainer.schedules import Schedules
from twinkle_dask.trainer.stepping import Memory, step_with
from twinkle_dask.types import (
    AdamParams,
    AdapterState,
    ClipGradient,
    GradientStep,
    GradientStepResult,
    LoraSpec,
    OptimizerState,
    RunState,
    StepResult,
    StepState,
)

NO_COUNTS = StepState()


@dataclass(frozen=True, slots=True, eq=False)
class Buffers:
    """All that a run is, apart from its spec; on whatever device.

    Attributes:
        memory: Of the optimizer that ``GradientStep`` took last; then there are no moments.
        counts: What ``GradientStep`` goes by, without the tensors.
    """

    weights: Tensor
    moments: Moments | None = None
    gradient: Tensor | None = None
    memory: Memory | None = None
    counts: StepState = NO_COUNTS

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers that there are, in an order that their number and kinds tell."""
        moments = [] if self.moments is None else [self.moments.exp_avg, self.moments.exp_avg_sq]
        memory = [] if self.memory is None else list(self.memory.tensors.values())
        gradient = [] if self.gradient is None else [self.gradient]
        return [self.weights, *moments, *gradient, *memory]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "Buffers":
        """The same state with its ``tensors`` elsewhere."""
        weights, *others = tensors
        moments = None
        if self.moments is not None:
            moments = Moments(self.moments.step, others.pop(0), others.pop(0))
        gradient = others.pop(0) if self.gradient is not None else None
        memory = None
        if self.memory is not None:
            words = dict(zip(self.memory.tensors, others, strict=True))
            memory = replace(self.memory, tensors=words)
        return Buffers(weights, moments, gradient, memory, self.counts)

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
        self._memory = buffers.memory
        self._counts = buffers.counts
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
        moments = gradient = memory = None
        counts = NO_COUNTS
        weights = layout.gather(state.adapter.weights, base.device)
        if with_optimizer and state.optimizer is not None and state.optimizer.step > 0:
            moments = Moments(
                state.optimizer.step,
                layout.gather(state.optimizer.exp_avg, base.device),
                layout.gather(state.optimizer.exp_avg_sq, base.device),
            )
        if state.gradients is not None:
            gradient = layout.gather(state.gradients, base.device)
        if with_optimizer and (steps := state.steps) is not None:
            counts = replace(steps, optimizer=None, tensors={})
            if steps.optimizer is not None:
                memory = Memory.of_arrays(steps.optimizer, steps.tensors, layout, base.device)
        buffers = Buffers(weights, moments, gradient, memory, counts)
        return cls(state.adapter.spec, layout, buffers, base.dtype)

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
    def bytes_beyond_moments(self) -> int:
        """What its optimizer remembers beyond two numbers for each weight."""
        if self._memory is None:
            return 0
        remembered = sum(tensor.nbytes for tensor in self._memory.tensors.values())
        return max(0, remembered - 2 * self._weights.nbytes)

    @property
    def buffers(self) -> Buffers:
        """What the run is, as it stands now; not a copy."""
        return Buffers(self._weights, self._moments, self._gradient, self._memory, self._counts)

    def rest(self) -> None:
        """Let go of everything but the buffers: views, and copies in the computation's dtype."""
        self._adapter = None

    def new_gradient(self) -> Gradient:
        """A gradient of zeros, not yet part of the run."""
        return Gradient(self._layout, self._device)

    def add_gradient(self, gradient: Gradient, num_counted: float = 0.0) -> None:
        """Add to what the next step spends; ``gradient`` is the run's from then on.

        Args:
            gradient: Of one backward pass.
            num_counted: What it adds to the run's ``gradient_tokens``.

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
        counts = self._counts
        self._counts = replace(
            counts,
            gradients=1 if counts.at_boundary else counts.gradients + 1,
            at_boundary=False,
            gradient_tokens=counts.gradient_tokens + num_counted,
        )

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
        grad_norm = float(norm(gradient)) if self._grad_norm is None else self._grad_norm
        self._drop_gradient()
        self._counts = replace(self._counts, gradients=0, at_boundary=False)
        if not isfinite(grad_norm):
            raise InvalidRequest(
                "The accumulated gradient is not finite. It was dropped and no step was taken."
            )
        if (scale := clip_scale(grad_norm, adam.grad_clip_norm)) < 1.0:
            gradient *= scale
        self._moments, self._memory = moments, None
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

    def _drop_gradient(self) -> None:
        self._gradient = self._grad_norm = None
        self._counts = replace(self._counts, gradient_tokens=0.0)

    def gradient_step(self, step: GradientStep, schedules: Schedules) -> GradientStepResult:
        """Do the parts of a step; see ``GradientStep``.

        Its optimizer's memory takes the place of AdamW's moments, as those take its place in
        ``step``.

        Raises:
            InvalidRequest: The schedule has no such step, and nothing was done; or the gradient is
                not finite, then it is dropped and nothing else was done.
        """
        counts, memory = self._counts, self._memory
        moved = 0 if step.fresh_schedule else counts.schedule_steps
        done = counts.gradients >= step.accumulation or step.accumulation == 1
        goes_on = done and step.advance and step.schedule is not None
        optimizer = step.step or step.optimizer
        now = then = None
        if optimizer is not None:
            now = schedules.settings_at(optimizer, step.schedule, moved)
            then = schedules.settings_at(optimizer, step.schedule, moved + goes_on)
        if step.fresh_optimizer:
            memory = None
        grad_norm, stepped = None, False
        if done and step.clip is not None:
            grad_norm = self._clip(step.clip)
        if done and step.step is not None and now is not None and self._gradient is not None:
            self._check_gradient(self._gradient)
            memory = step_with(
                step.step.name, now, memory, self._weights, self._gradient, self._layout
            )
            self._moments, self._finite, stepped = None, None, True
            if self._adapter is not None:
                self._adapter.touch()
        if done and step.zero:
            self._drop_gradient()
        self._memory = memory
        self._counts = replace(
            self._counts,
            at_boundary=counts.at_boundary or (done and _has_parts(step)),
            steps=counts.steps + stepped,
            schedule_steps=moved + goes_on,
        )
        return GradientStepResult(
            done=done,
            grad_norm=grad_norm,
            learning_rate=None if then is None else float(then["lr"]),
            steps=self._counts.steps,
            gradients=0 if self._gradient is None else self._counts.gradients,
        )

    def _clip(self, clip: ClipGradient) -> float:
        """Divide the gradient by what was counted with it, then clip it; its norm in between."""
        gradient, counted = self._gradient, self._counts.gradient_tokens
        if gradient is None:
            return 0.0
        self._check_gradient(gradient)
        self._grad_norm = None
        if counted > 0:
            gradient /= counted
            self._counts = replace(self._counts, gradient_tokens=0.0)
        grad_norm = float(norm(gradient, clip.norm_type))
        if clip.max_norm < inf and (scale := clip_scale(grad_norm, clip.max_norm)) < 1.0:
            gradient *= scale
        return grad_norm

    def _check_gradient(self, gradient: Tensor) -> None:
        """Raise InvalidRequest unless it is finite; it is dropped then."""
        if self._grad_norm is None:
            self._grad_norm = float(norm(gradient))
        if not isfinite(self._grad_norm):
            self._drop_gradient()
            self._counts = replace(self._counts, at_boundary=True)
            raise InvalidRequest(
                "The accumulated gradient is not finite. It was dropped and no step was taken."
            )

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
        steps = self._step_state(gradients=gradients) if optimizer else None
        return RunState(adapter=adapter, optimizer=saved, gradients=unspent, steps=steps)

    def _step_state(self, *, gradients: bool) -> StepState | None:
        """What ``GradientStep`` goes by; None if that is what a new run has."""
        counts = self._counts
        if not gradients:
            counts = replace(counts, gradients=0, at_boundary=False, gradient_tokens=0.0)
        if self._memory is None:
            return None if counts == NO_COUNTS else counts
        tensors = self._memory.arrays(self._layout)
        return replace(counts, optimizer=self._memory.optimizer, tensors=tensors)


def _has_parts(step: GradientStep) -> bool:
    """Whether a step does anything at a boundary."""
    return step.clip is not None or step.step is not None or step.zero or step.advance
