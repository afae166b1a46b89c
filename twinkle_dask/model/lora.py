"""Adapters as data, the plan that says which rows wear which, and their part of a product.

    y_BLE[rows_s] += scale_s * (x_BLD[rows_s] @ A_RD.T) @ B_ER.T      for each segment s of the plan

so an adapter costs its own tensors, switching costs nothing, and ranks and targets may differ
between the rows of one batch. The linears that learn are in ``linears``.

Shapes: B rows, L padded length, M rows of one segment times L, D in, E out, R rank, S the sum of
several ranks.
"""

import threading
from collections.abc import Callable, Generator, Hashable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeAlias

import torch
from torch import Tensor

from twinkle_dask.model.dropout import Dropout
from twinkle_dask.types import AdapterState, LoraSpec

if TYPE_CHECKING:
    from twinkle_dask.model.linears import Shared

Copies: TypeAlias = Callable[[], Mapping[str, Tensor]]


class LoraTensors:
    """One adapter on the device: float32 masters, and copies in the dtype of the computation.

    Attributes:
        spec: Rank, alpha and which groups are adapted.
        scale: Of the product, as the spec says.
        master: Float32 weights by name, ``<module path>.lora_A.weight`` (R, D) and
            ``.lora_B.weight`` (E, R). Whoever changes one in place calls ``touch`` afterwards.
    """

    def __init__(
        self,
        spec: LoraSpec,
        master: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        copies: Copies | None = None,
        finite: Callable[[], bool] | None = None,
    ) -> None:
        """Hold ``master`` as it is.

        Args:
            spec: Not checked against the tensors.
            master: See the class.
            dtype: Of the computation.
            copies: Makes all copies in ``dtype`` at once, where that is cheaper than one by one.
            finite: Whether all weights are, where there is a cheaper way than one by one.
        """
        self.spec = spec
        self.scale = spec.scale
        self.master = master
        self._make = copies or (lambda: {name: w.to(dtype) for name, w in master.items()})
        self._copies: Mapping[str, Tensor] | None = None
        self._look = finite or (lambda: all(bool(w.isfinite().all()) for w in master.values()))
        self._finite: bool | None = None

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
        if self._copies is None:
            self._copies = self._make()
        a_RD = self._copies.get(f"{module_path}.lora_A.weight")
        b_ER = self._copies.get(f"{module_path}.lora_B.weight")
        return None if a_RD is None or b_ER is None else (a_RD, b_ER)

    def touch(self) -> None:
        """Drop the copies: a master changed, or nobody needs them now. Made anew on demand."""
        self._copies = None
        self._finite = None

    @property
    def finite(self) -> bool:
        """Whether no weight is infinite or NaN."""
        if self._finite is None:
            self._finite = self._look()
        return self._finite


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The rows of a batch that wear one adapter.

    Attributes:
        rows: A slice of rows (no copies) or int64 row indices.
        grads: Buffers under the weights' names that ``backward`` adds to, float32 or of the
            computation's dtype; None if these rows need no gradient of the adapter.
        dropout: What the adapter leaves out; only in plans over positions.
    """

    rows: slice | Tensor
    adapter: LoraTensors
    grads: Mapping[str, Tensor] | None = None
    dropout: Dropout | None = None


class BatchPlan:
    """Which rows wear which adapter; rows in no segment see the base model alone.

    Segments must not share rows. A plan may serve many passes over the same rows, as in
    generation, for as long as none of its adapters changes.

    Attributes:
        segments: In any order.
        over_positions: The segments' rows are positions of the flattened (B, L): several rows may
            lie one after another in one sequence.
        learns: Whether any segment wants gradients.
    """

    def __init__(self, segments: tuple[Segment, ...] = (), *, over_positions: bool = False) -> None:
        self.segments = segments
        self.over_positions = over_positions
        self.learns = any(segment.grads is not None for segment in segments)
        self._worn: dict[str, list[Worn]] = {}
        self._stacks: dict[tuple[str, int], Stack | None] = {}
        self._memory: dict[Hashable, Tensor] = {}

    def flattened(self, num_rows: int, length: int) -> "BatchPlan":
        """The same plan over positions of the flattened (``num_rows``, ``length``)."""
        if self.over_positions:
            return self
        segments: list[Segment] = []
        for segment in self.segments:
            rows = segment.rows
            if isinstance(rows, slice):
                start, stop, _ = rows.indices(num_rows)
                rows = slice(start * length, stop * length)
            else:
                rows = (rows[:, None] * length + torch.arange(length, device=rows.device)).flatten()
            segments.append(Segment(rows, segment.adapter, segment.grads, segment.dropout))
        return BatchPlan(tuple(segments), over_positions=True)

    def remember(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gave the first time under this key."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]

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

        None if some adapter holds an infinite or NaN weight, which would reach the others' rows, or
        leaves out something.
        """
        key = module_path, num_rows
        if key not in self._stacks:
            self._stacks[key] = _stack(self.worn(module_path), num_rows)
        return self._stacks[key]


class PlanContext(threading.local):
    """Where the wrapped linears of one model find the plan of the pass; each thread has its own.

    Attributes:
        plan: Of the pass that this thread computes.
        shared: What siblings computed together and not all of them have taken yet.
        anchor: See below.
    """

    def __init__(self, device: torch.device) -> None:
        self.plan = BatchPlan()
        self.shared: Shared | None = None
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
            self.shared = None  # left over if a pass failed between siblings


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
    if any(item.segment.dropout is not None for item in worn):
        return None
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
    if plan.over_positions:
        x_BLD, y_BLE = x_BLD.flatten(0, -2), y_BLE.view(-1, y_BLE.shape[-1])
    if len(worn) > 1 and x_BLD.dim() == 3 and x_BLD.shape[1] == 1:
        # In generation a segment has a few positions only, and one pair of small products per
        # adapter costs more than one pair with all of them: 8 adapters on SmolLM2-135M (bfloat16,
        # one core, a position each) took 139 ms a step, and take 72; one adapter takes 66.
        stack = plan.stack(module_path, len(x_BLD))
        if stack is not None:
            _add_stacked(x_BLD, y_BLE, stack)
            return
    for item in worn:
        _add_one(x_BLD, y_BLE, item, module_path)


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


def _add_one(x_BLD: Tensor, y_BLE: Tensor, worn: Worn, module_path: str) -> None:
    rows, dropout = worn.segment.rows, worn.segment.dropout
    x_MD = _flat(x_BLD, rows)
    if dropout is not None:
        x_MD = dropout.applied(x_MD, module_path)
    h_MR = x_MD @ worn.a_RD.T
    _add_product(y_BLE, rows, h_MR, worn.b_ER.T, worn.segment.adapter.scale)
