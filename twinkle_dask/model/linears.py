"""Wrapped linears: frozen products plus the adapters of the current plan, with their gradients.

Every linear of the base model is wrapped once, when the model loads; the wrapper owns no adapter.
Linears that read the same input (siblings: q, k and v, or gate and up) are computed together when
something learns: x is kept once, their As are one matrix, and so is the gradient of x.

Shapes: B rows, L padded length, T positions (B times L), M positions of one segment, D in, E out,
R rank, S the sum of the siblings' ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from twinkle_dask.model.lora import BatchPlan, PlanContext, add_adapters


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One of a piece's linears: its place among the siblings, its columns of S, its B."""

    index: int
    columns: slice
    b_ER: Tensor
    grad_b_ER: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One segment's adapter on one group of siblings.

    Attributes:
        rows: Positions of the flattened input.
        a_SD: The As of the siblings that it adapts, one below another.
        grads_a: Buffers for parts of S, together all of it; empty if the segment does not learn.
    """

    rows: slice | Tensor
    scale: float
    a_SD: Tensor
    members: Sequence[Member]
    grads_a: Sequence[tuple[slice, Tensor]]


def _pieces(paths: Sequence[str], plan: BatchPlan, num_rows: int, length: int) -> list[Piece]:
    pieces: list[Piece] = []
    for segment in plan.segments:
        found = [(i, path, segment.adapter.pair(path)) for i, path in enumerate(paths)]
        worn = [(i, path, *pair) for i, path, pair in found if pair is not None]
        if not worn:
            continue
        rows = segment.rows
        if not plan.over_positions:
            rows = _positions(rows, num_rows, length)
        grads = segment.grads
        members: list[Member] = []
        start = 0
        for i, path, a_RD, b_ER in worn:
            columns = slice(start, start := start + len(a_RD))
            grad = None if grads is None else grads[f"{path}.lora_B.weight"]
            members.append(Member(i, columns, b_ER, grad))
        grads_a: list[tuple[slice, Tensor]] = []
        if grads is not None:
            parts = [grads[f"{path}.lora_A.weight"] for _, path, _, _ in worn]
            whole = _joined(parts)
            columns_of = [member.columns for member in members]
            grads_a = (
                list(zip(columns_of, parts, strict=True))
                if whole is None
                else [(slice(0, start), whole)]
            )
        stack = [a_RD for _, _, a_RD, _ in worn]
        a_SD = _joined(stack)
        if a_SD is None:
            a_SD = torch.cat(stack)
        pieces.append(Piece(rows, segment.adapter.scale, a_SD, members, grads_a))
    return pieces


def _positions(rows: slice | Tensor, num_rows: int, length: int) -> slice | Tensor:
    """Positions of whole rows of ``length`` each."""
    if isinstance(rows, slice):
        start, stop, _ = rows.indices(num_rows)
        return slice(start * length, stop * length)
    return (rows[:, None] * length + torch.arange(length, device=rows.device)).flatten()


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Matrices as one, if they lie one after another in one buffer; no copy."""
    first = parts[0]
    end = first.data_ptr()
    rows = 0
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            return None
        end += part.numel() * part.element_size()
        rows += len(part)
    if rows * first.shape[1] * first.element_size() > first.untyped_storage().nbytes():
        return None
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _accumulate(buffer: Tensor, left: Tensor, right: Tensor) -> None:
    """``buffer += left @ right``; the buffer may be float32 where the factors are not."""
    if left.dtype == buffer.dtype:
        buffer.addmm_(left, right)
    else:
        buffer.add_(left @ right)


class _AdaptedLinears(torch.autograd.Function):
    """Frozen linears that share their input, plus their segments' adapters.

    Backward returns the gradient of x and adds those of A and B to each segment's own buffers, so
    they are neither leaves nor kept per adapter. Saved are x (once, and only if a segment learns)
    and the scaled (M, S) projections.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        anchor: Tensor | None,  # only there so that autograd records this node
        siblings: "Siblings",
        pieces: list[Piece],
    ) -> tuple[Tensor, ...]:
        ys = tuple(
            functional.linear(x_TD, linear.weight, linear.bias).contiguous()
            for linear in siblings.linears
        )
        projections: list[Tensor] = []
        for piece in pieces:
            h_MS = (x_TD[piece.rows] @ piece.a_SD.T).mul_(piece.scale)
            for member in piece.members:
                _add_rows(ys[member.index], piece.rows, h_MS[:, member.columns], member.b_ER.T)
            if piece.grads_a:
                projections.append(h_MS)
        ctx.save_for_backward(x_TD if projections else None, *projections)
        ctx.siblings = siblings
        ctx.pieces = pieces
        return ys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's decorator
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_TD, *projections = ctx.saved_tensors
        grads = [None if grad is None else grad.contiguous() for grad in grad_outputs]
        grad_TD: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for linear, grad_TE in zip(ctx.siblings.linears, grads, strict=True):
                if grad_TE is None:
                    continue
                if grad_TD is None:
                    grad_TD = grad_TE @ linear.weight
                else:
                    grad_TD.addmm_(grad_TE, linear.weight)
        of_learning = iter(projections)
        for piece in ctx.pieces:
            h_MS = next(of_learning) if piece.grads_a else None
            _piece_backward(piece, x_TD, h_MS, grads, grad_TD)
        return grad_TD, None, None, None


def _piece_backward(
    piece: Piece,
    x_TD: Tensor,
    h_MS: Tensor | None,
    grads: Sequence[Tensor | None],
    grad_TD: Tensor | None,
) -> None:
    """Add one piece's part to the gradient of x and, if it learns, to its own gradients."""
    parts: list[Tensor] = []
    for member in piece.members:
        grad_TE = grads[member.index]
        if grad_TE is None:  # nothing was computed from this sibling
            rows = len(x_TD[piece.rows])
            parts.append(x_TD.new_zeros(rows, member.b_ER.shape[1]))
            continue
        grad_ME = grad_TE[piece.rows]
        parts.append(grad_ME @ member.b_ER)
        if h_MS is not None and member.grad_b_ER is not None:
            _accumulate(member.grad_b_ER, grad_ME.T, h_MS[:, member.columns])
    grad_MS = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).mul_(piece.scale)
    if grad_TD is not None:
        _add_rows(grad_TD, piece.rows, grad_MS, piece.a_SD)
    if piece.grads_a:
        x_MD = x_TD[piece.rows]
        for columns, buffer in piece.grads_a:
            _accumulate(buffer, grad_MS[:, columns].T, x_MD)


def _add_rows(y_TE: Tensor, rows: slice | Tensor, left_MS: Tensor, right_SE: Tensor) -> None:
    """``y_TE[rows] += left_MS @ right_SE``."""
    if isinstance(rows, slice):
        y_TE[rows].addmm_(left_MS, right_SE)
    else:
        y_TE.index_add_(0, rows, left_MS @ right_SE)


# torch types `apply` as returning Any of any arguments.
_apply = cast("Callable[..., tuple[Tensor, ...]]", _AdaptedLinears.apply)  # pyright: ignore[reportUnknownMemberType]


@dataclass(slots=True, eq=False)
class Shared:
    """Outputs of siblings for one input."""

    siblings: "Siblings"
    x_BLD: Tensor
    outputs: tuple[Tensor, ...]


class Siblings:
    """Linears that read the same input in every pass; most often one alone.

    Attributes:
        linears: In the order of their calls.
    """

    def __init__(self, linears: "Sequence[AdaptedLinear]") -> None:
        self.linears = tuple(linears)
        self._paths = tuple(linear.module_path for linear in linears)

    def output(self, linear: "AdaptedLinear", x_BLD: Tensor, context: PlanContext) -> Tensor:
        """One linear's output; the others' are kept for their calls with the same ``x_BLD``."""
        index = self.linears.index(linear) if len(self.linears) > 1 else 0
        shared = context.shared
        if shared is None or shared.siblings is not self or shared.x_BLD is not x_BLD:
            shared = Shared(self, x_BLD, self._compute(x_BLD, context))
            context.shared = shared
        if index == len(self.linears) - 1:
            context.shared = None
        return shared.outputs[index].view(*x_BLD.shape[:-1], -1)

    def _compute(self, x_BLD: Tensor, context: PlanContext) -> tuple[Tensor, ...]:
        rows, length = x_BLD.shape[0], x_BLD[0].numel() // x_BLD.shape[-1]
        pieces = _pieces(self._paths, context.plan, rows, length)
        learns = any(piece.grads_a for piece in pieces)
        anchor = context.anchor if learns else None
        return _apply(x_BLD.reshape(-1, x_BLD.shape[-1]), anchor, self, pieces)


class AdaptedLinear(nn.Module):
    """Takes the place of an ``nn.Linear``, sharing its weight and bias.

    Input and output are (B, L, D) and (B, L, E), rows first, whenever the plan has segments.

    Attributes:
        module_path: Names its adapters' weights.
        siblings: The group that it is computed with when something learns.
    """

    def __init__(self, linear: nn.Linear, module_path: str, context: PlanContext) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.module_path = module_path
        self.siblings = Siblings([self])
        self._context = context

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The projection of ``x_BLD`` with the adapters of the current plan."""
        plan = self._context.plan
        worn = plan.worn(self.module_path)
        if torch.is_grad_enabled() and (worn or x_BLD.requires_grad):
            # Also with nothing worn: siblings add up their gradients in one way, whoever is there.
            return self.siblings.output(self, x_BLD, self._context)
        if not worn:
            return functional.linear(x_BLD, self.weight, self.bias)
        y_BLE = functional.linear(x_BLD, self.weight, self.bias).contiguous()
        add_adapters(x_BLD, y_BLE, self.module_path, plan)
        return y_BLE

    def extra_repr(self) -> str:
        """Sizes and place, for ``print(model)``."""
        return f"{self.module_path}: {self.in_features} -> {self.out_features}"
