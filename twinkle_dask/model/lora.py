"""Adapters as data: linears that read from the current plan which rows wear which adapter.

Every linear of the base model is wrapped once, when the model loads. The wrapper owns no adapter;
per pass it computes, for each segment s of the plan,

    y_BLE[rows_s] = x_BLD[rows_s] @ W_ED.T + b_E + scale_s * (x_BLD[rows_s] @ A_RD.T) @ B_ER.T

so an adapter costs its own tensors, switching costs nothing, and ranks and targets may differ
between the rows of one batch.

Shapes: B rows, L padded length, M rows of one segment times L, D in, E out, R rank.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from twinkle_dask.types import AdapterState, LoraSpec


class LoraTensors:
    """One adapter on the device: float32 masters, and copies in the dtype of the computation.

    Attributes:
        spec: Rank, alpha and which groups are adapted.
        scale: ``alpha / rank``.
        master: Float32 weights by name, ``<module path>.lora_A.weight`` (R, D) and
            ``.lora_B.weight`` (E, R). Whoever changes one in place calls ``touch`` afterwards.
    """

    def __init__(self, spec: LoraSpec, master: dict[str, Tensor], *, dtype: torch.dtype) -> None:
        self.spec = spec
        self.scale = spec.alpha / spec.rank
        self.master = master
        self._dtype = dtype
        self._pairs: dict[str, tuple[Tensor, Tensor] | None] = {}

    @classmethod
    def from_state(cls, state: AdapterState, *, device: torch.device, dtype: torch.dtype) -> Self:
        """Copy an adapter to ``device``, to be computed with in ``dtype``."""
        master = {
            name: torch.tensor(array, dtype=torch.float32, device=device)
            for name, array in state.weights.items()
        }
        return cls(state.spec, master, dtype=dtype)

    def to_state(self) -> AdapterState:
        """Copy the masters out; later changes do not show in the copy."""
        weights = {name: value.cpu().numpy().copy() for name, value in self.master.items()}
        return AdapterState(spec=self.spec, weights=weights)

    def pair(self, module_path: str) -> tuple[Tensor, Tensor] | None:
        """A_RD and B_ER of one module in the computation's dtype, or None if it is not adapted."""
        if module_path not in self._pairs:
            self._pairs[module_path] = self._cast(module_path)
        return self._pairs[module_path]

    def touch(self) -> None:
        """Say that a master changed: copies are made anew when next asked for."""
        self._pairs.clear()

    def _cast(self, module_path: str) -> tuple[Tensor, Tensor] | None:
        a_RD = self.master.get(f"{module_path}.lora_A.weight")
        b_ER = self.master.get(f"{module_path}.lora_B.weight")
        if a_RD is None or b_ER is None:
            return None
        return a_RD.to(self._dtype), b_ER.to(self._dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The rows of a batch that wear one adapter.

    Attributes:
        rows: A slice of rows (no copies) or int64 row indices.
        grads: Float32 buffers under the weights' names that ``backward`` adds to; None if these
            rows need no gradient of the adapter.
    """

    rows: slice | Tensor
    adapter: LoraTensors
    grads: Mapping[str, Tensor] | None = None


class BatchPlan:
    """Which rows wear which adapter; rows in no segment see the base model alone.

    Segments must not share rows. A plan may serve many passes over the same rows, as in
    generation, for as long as none of its adapters changes.

    Attributes:
        segments: In any order.
        learns: Whether any segment wants gradients.
    """

    def __init__(self, segments: tuple[Segment, ...] = ()) -> None:
        self.segments = segments
        self.learns = any(segment.grads is not None for segment in segments)
        self._worn: dict[str, list[Worn]] = {}
        self._stacks: dict[tuple[str, int], Stack | None] = {}

    def worn(self, module_path: str) -> "list[Worn]":
        """The segments whose adapter has a part for this module."""
        if module_path not in self._worn:
            self._worn[module_path] = [
                Worn(segment, *pair)
                for segment in self.segments
                if (pair := segment.adapter.pair(module_path)) is not None
            ]
        return self._worn[module_path]

    def stack(self, module_path: str, num_rows: int) -> "Stack | None":
        """All that is worn on this module as one pair of matrices, for ``num_rows`` rows.

        None if some adapter holds an infinite or NaN weight: it would reach the others' rows.
        """
        key = module_path, num_rows
        if key not in self._stacks:
            self._stacks[key] = _stack(self.worn(module_path), num_rows)
        return self._stacks[key]


class PlanContext:
    """Where the wrapped linears of one model find the plan of the pass. One thread only."""

    def __init__(self, device: torch.device) -> None:
        self.plan = BatchPlan()
        # Autograd records a linear only if one of its inputs requires a gradient. Adapters are no
        # autograd leaves, so this scalar stands in for them; nothing is ever added to its .grad.
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    @contextmanager
    def use(self, plan: BatchPlan) -> Generator[None]:
        """Apply ``plan`` to everything computed inside; backward may run outside."""
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before


@dataclass(frozen=True, slots=True, eq=False)
class Worn:
    """A segment with its adapter's matrices for one module."""

    segment: Segment
    a_RD: Tensor
    b_ER: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Several adapters side by side, S being the sum of their ranks.

    Attributes:
        scale_BS: Float32; each row's scale in the columns of the adapter that it wears.
        others_BS: Where the columns are another adapter's.
    """

    a_SD: Tensor
    b_SE: Tensor
    scale_BS: Tensor
    others_BS: Tensor


def _stack(worn: list[Worn], num_rows: int) -> Stack | None:
    a_SD = torch.cat([item.a_RD for item in worn])
    b_SE = torch.cat([item.b_ER.T for item in worn])
    if not b_SE.isfinite().all():  # zero times infinity is NaN; A's columns are masked instead
        return None
    scale_BS = torch.zeros(num_rows, len(a_SD), device=a_SD.device)
    others_BS = torch.ones_like(scale_BS, dtype=torch.bool)
    start = 0
    for item in worn:
        end = start + len(item.a_RD)
        scale_BS[item.segment.rows, start:end] = item.segment.adapter.scale
        others_BS[item.segment.rows, start:end] = False
        start = end
    return Stack(a_SD, b_SE, scale_BS, others_BS)


def add_adapters(x_BLD: Tensor, y_BLE: Tensor, module_path: str, plan: BatchPlan) -> None:
    """Add each segment's ``scale * (x @ A.T) @ B.T`` to its rows of a contiguous ``y_BLE``.

    For passes without gradients, and for heads that are computed outside of the model; ``x`` and
    ``y`` may be (N, D) and (N, E) as well, the plan's rows then being those of N.
    """
    worn = plan.worn(module_path)
    if len(worn) > 1 and x_BLD.dim() == 3 and x_BLD.shape[1] == 1:
        # In generation a segment has a few positions only, and one pair of small products per
        # adapter costs more than one pair with all of them: 8 adapters on SmolLM2-135M (bfloat16,
        # one core, a position each) took 139 ms a step, and take 72; one adapter takes 66.
        stack = plan.stack(module_path, len(x_BLD))
        if stack is not None:
            _add_stacked(x_BLD, y_BLE, stack)
            return
    for item in worn:
        _add_one(x_BLD, y_BLE, item)


def _add_stacked(x_B1D: Tensor, y_B1E: Tensor, stack: Stack) -> None:
    h_BS = (x_B1D.flatten(1) @ stack.a_SD.T) * stack.scale_BS  # float32, as the scales are
    h_BS = h_BS.masked_fill_(stack.others_BS, 0).to(y_B1E.dtype)
    y_B1E.view(len(y_B1E), -1).addmm_(h_BS, stack.b_SE)


def _flat(x_BLD: Tensor, rows: slice | Tensor) -> Tensor:
    """The chosen rows as (M, D): a view for a slice of a contiguous tensor, else a copy."""
    return x_BLD[rows].reshape(-1, x_BLD.shape[-1])


def _add_product(
    y_BLE: Tensor, rows: slice | Tensor, left_MR: Tensor, right_RE: Tensor, scale: float
) -> None:
    """``y_BLE[rows] += scale * left_MR @ right_RE`` in place; ``y_BLE`` must be contiguous."""
    if isinstance(rows, slice):
        y_BLE[rows].view(-1, y_BLE.shape[-1]).addmm_(left_MR, right_RE, alpha=scale)
    else:
        change_ME = left_MR @ right_RE
        y_BLE.index_add_(0, rows, change_ME.view(-1, *y_BLE.shape[1:]), alpha=scale)


def _add_one(x_BLD: Tensor, y_BLE: Tensor, worn: Worn) -> Tensor:
    """Add one segment's part to ``y_BLE``; returns the projection x_MD @ A.T as (M, R)."""
    rows = worn.segment.rows
    h_MR = _flat(x_BLD, rows) @ worn.a_RD.T
    _add_product(y_BLE, rows, h_MR, worn.b_ER.T, worn.segment.adapter.scale)
    return h_MR


def _accumulate(buffer: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """``buffer += scale * left @ right`` into a float32 buffer, from factors of any dtype."""
    if left.dtype == buffer.dtype:
        buffer.addmm_(left, right, alpha=scale)
    else:
        buffer.add_(left @ right, alpha=scale)


class _AdaptedLinear(torch.autograd.Function):
    """A frozen linear plus its segments' adapters.

    Backward returns the gradient of x and adds those of A and B to each segment's own buffers, so
    they are neither leaves nor kept per adapter. Saved are x (once, and only if a segment learns)
    and the (M, R) projections.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BLD: Tensor,
        anchor: Tensor | None,  # only there so that autograd records this node
        weight_ED: Tensor,
        bias_E: Tensor | None,
        module_path: str,
        worn: list[Worn],
    ) -> Tensor:
        y_BLE = functional.linear(x_BLD, weight_ED, bias_E).contiguous()
        projections: list[Tensor] = []
        for item in worn:
            h_MR = _add_one(x_BLD, y_BLE, item)
            if item.segment.grads is not None:
                projections.append(h_MR)
        ctx.save_for_backward(x_BLD if projections else None, weight_ED, *projections)
        ctx.module_path = module_path
        ctx.worn = worn
        return y_BLE

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's decorator
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_BLD, weight_ED, *projections = ctx.saved_tensors
        grad_BLE = grad_outputs[0].contiguous()
        grad_BLD = grad_BLE @ weight_ED if ctx.needs_input_grad[0] else None
        of_learning = iter(projections)
        for item in ctx.worn:
            segment: Segment = item.segment
            scale = segment.adapter.scale
            grad_ME = _flat(grad_BLE, segment.rows)
            grad_MR = grad_ME @ item.b_ER
            if grad_BLD is not None:
                _add_product(grad_BLD, segment.rows, grad_MR, item.a_RD, scale)
            if segment.grads is not None:
                grad_A = segment.grads[f"{ctx.module_path}.lora_A.weight"]
                grad_B = segment.grads[f"{ctx.module_path}.lora_B.weight"]
                _accumulate(grad_A, grad_MR.T, _flat(x_BLD, segment.rows), scale)
                _accumulate(grad_B, grad_ME.T, next(of_learning), scale)
        return grad_BLD, None, None, None, None, None


# torch types `apply` as returning Any of any arguments.
_apply = cast("Callable[..., Tensor]", _AdaptedLinear.apply)  # pyright: ignore[reportUnknownMemberType]


class AdaptedLinear(nn.Module):
    """Takes the place of an ``nn.Linear``, sharing its weight and bias.

    Input and output are (B, L, D) and (B, L, E), rows first, whenever the plan has segments.
    """

    def __init__(self, linear: nn.Linear, module_path: str, context: PlanContext) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self._module_path = module_path
        self._context = context

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The projection of ``x_BLD`` with the adapters of the current plan."""
        plan = self._context.plan
        worn = plan.worn(self._module_path)
        if not worn:
            return functional.linear(x_BLD, self.weight, self.bias)
        if not torch.is_grad_enabled():
            y_BLE = functional.linear(x_BLD, self.weight, self.bias).contiguous()
            add_adapters(x_BLD, y_BLE, self._module_path, plan)
            return y_BLE
        learns = any(item.segment.grads is not None for item in worn)
        anchor = self._context.anchor if learns else None
        return _apply(x_BLD, anchor, self.weight, self.bias, self._module_path, worn)

    def extra_repr(self) -> str:
        """Sizes and place, for ``print(model)``."""
        return f"{self._module_path}: {self.in_features} -> {self.out_features}"
