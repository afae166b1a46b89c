"""Wrapped linears: frozen products plus the adapters of the current plan, with their gradients.

Every linear of the base model is wrapped once, when the model loads; the wrapper owns no adapter.
Linears that read the same input (siblings: q, k and v, or gate and up) are computed together when
something learns: x is kept once, their As are one matrix, and so is the gradient of x. Several
small adapters stand side by side in one pair of matrices where that is cheaper.

Shapes: B rows, L padded length, T positions (B times L), M positions of one segment, D in, E out,
R rank, S a sum of ranks: over siblings, and over the adapters that stand side by side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from twinkle_dask.model.dropout import Dropout
from twinkle_dask.model.lora import BatchPlan, PlanContext, Segment, add_adapters

# Most columns of several adapters side by side. All positions are multiplied with all of them, so
# more would cost more than the calls they save; 128 is the cost of one adapter of rank 128.
_MOST_COLUMNS = 128


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One of a bundle's linears: its place among the siblings, its columns of S, its B."""

    index: int
    columns: slice
    b_SE: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Learner:
    """Where one segment's gradients go.

    Attributes:
        rows: Positions of the flattened input.
        local: The same, counted from the bundle's first.
        columns: Its parts of S, one for each linear that it adapts; None if they are all of S.
        grads_a: Buffers for parts of its columns, side by side; together all of them.
        grads_b: For each linear its index, its columns of S, and a buffer.
    """

    rows: slice | Tensor
    local: slice
    columns: Sequence[slice] | None
    grads_a: Sequence[tuple[slice, Tensor]]
    grads_b: Sequence[tuple[int, slice, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """One segment's adapter on one group of siblings, or those of several side by side.

    Attributes:
        rows: Positions of the flattened input.
        scale_MS: The adapter's scale; of several, each position's scale in the columns of the
            adapter that it wears, and 0 in the others'.
        a_SD: As one below another.
        dropped: What its one linear leaves out, and that linear's path.
    """

    rows: slice | Tensor
    scale_MS: float | Tensor
    a_SD: Tensor
    members: Sequence[Member]
    learners: Sequence[Learner]
    dropped: tuple[Dropout, str] | None = None

    def read(self, x_MD: Tensor) -> Tensor:
        """What its As see of its inputs; as well, what of a gradient by that goes back to them."""
        if self.dropped is None:
            return x_MD
        dropout, path = self.dropped
        return dropout.applied(x_MD, path)


@dataclass(frozen=True, slots=True, eq=False)
class _Worn:
    """One segment on one group: ``pairs`` are index, path, A and B of each linear it adapts."""

    segment: Segment
    rows: slice | Tensor
    pairs: Sequence[tuple[int, str, Tensor, Tensor]]

    @property
    def indices(self) -> list[int]:
        return [index for index, _, _, _ in self.pairs]

    @property
    def width(self) -> int:
        return len(self.pairs[0][2])

    def follows(self, other: "_Worn") -> bool:
        """Whether its positions come right after another's, and it adapts the same linears."""
        return (
            isinstance(self.rows, slice)
            and isinstance(other.rows, slice)
            and self.rows.start == other.rows.stop
            and self.indices == other.indices
        )

    @property
    def may_share(self) -> bool:
        """Whether its columns may stand beside others'.

        In float32 no two adapters share a product: sums would be cut in other places than alone.
        Infinite or NaN weights would reach the others' positions as 0 times infinity.
        """
        if self.segment.dropout is not None:
            return False
        return self.pairs[0][2].dtype != torch.float32 and self.segment.adapter.finite


def _bundles(paths: Sequence[str], plan: BatchPlan, num_rows: int, length: int) -> list[Bundle]:
    groups: list[list[_Worn]] = []
    for segment in plan.flattened(num_rows, length).segments:
        found = [(i, path, segment.adapter.pair(path)) for i, path in enumerate(paths)]
        pairs = [(i, path, *pair) for i, path, pair in found if pair is not None]
        if not pairs:
            continue
        if segment.dropout is not None:
            # Each linear leaves out something else, so they share no input.
            groups += [[_Worn(segment, segment.rows, [pair])] for pair in pairs]
            continue
        worn = _Worn(segment, segment.rows, pairs)
        if (
            groups
            and worn.follows(groups[-1][-1])
            and sum(other.width for other in groups[-1]) + worn.width <= _MOST_COLUMNS
            and worn.may_share
            and groups[-1][-1].may_share
        ):
            groups[-1].append(worn)
        else:
            groups.append([worn])
    return [_alone(group[0]) if len(group) == 1 else _together(group, plan) for group in groups]


def _alone(worn: _Worn) -> Bundle:
    members: list[Member] = []
    start = 0
    for index, _, a_RD, b_ER in worn.pairs:
        members.append(Member(index, slice(start, start := start + len(a_RD)), b_ER.T))
    stack = [a_RD for _, _, a_RD, _ in worn.pairs]
    a_SD = _joined(stack)
    if a_SD is None:
        a_SD = torch.cat(stack)
    learners = _learner(worn, slice(None), [member.columns for member in members], whole=True)
    dropout = worn.segment.dropout
    dropped = None if dropout is None else (dropout, worn.pairs[0][1])
    return Bundle(worn.rows, worn.segment.adapter.scale, a_SD, members, learners, dropped)


def _together(group: Sequence[_Worn], plan: BatchPlan) -> Bundle:
    """Linear by linear, and for each linear adapter by adapter."""
    columns_of: list[list[slice]] = [[] for _ in group]
    members: list[Member] = []
    start = 0
    for i, index in enumerate(group[0].indices):
        begin = start
        for worn, columns in zip(group, columns_of, strict=True):
            columns.append(slice(start, start := start + worn.width))
        b_SE = torch.cat([worn.pairs[i][3].T for worn in group])
        members.append(Member(index, slice(begin, start), b_SE))
    a_SD = torch.cat([worn.pairs[i][2] for i in range(len(members)) for worn in group])
    spans = [cast(slice, worn.rows) for worn in group]
    first = spans[0].start
    local = [slice(span.start - first, span.stop - first) for span in spans]
    scales = [worn.segment.adapter.scale for worn in group]
    learners = [
        learner
        for worn, here, columns in zip(group, local, columns_of, strict=True)
        for learner in _learner(worn, here, columns, whole=False)
    ]
    rows = slice(first, spans[-1].stop)
    scale_MS = plan.remember(
        (
            len(members),
            *((span.start, span.stop, worn.width) for span, worn in zip(spans, group, strict=True)),
        ),
        lambda: _scales(a_SD, local, columns_of, scales),
    )
    return Bundle(rows, scale_MS, a_SD, members, learners)


def _scales(
    a_SD: Tensor,
    local: Sequence[slice],
    columns_of: Sequence[Sequence[slice]],
    scales: Sequence[float],
) -> Tensor:
    scale_MS = a_SD.new_zeros(local[-1].stop, len(a_SD))
    for rows, columns, scale in zip(local, columns_of, scales, strict=True):
        for part in columns:
            scale_MS[rows, part] = scale
    return scale_MS


def _learner(
    worn: _Worn, local: slice, columns: Sequence[slice], *, whole: bool
) -> Sequence[Learner]:
    grads = worn.segment.grads
    if grads is None:
        return ()
    parts = [grads[f"{path}.lora_A.weight"] for _, path, _, _ in worn.pairs]
    joined = _joined(parts)
    width = worn.width
    grads_a = (
        [(slice(i * width, (i + 1) * width), part) for i, part in enumerate(parts)]
        if joined is None
        else [(slice(0, len(joined)), joined)]
    )
    grads_b = [
        (index, part, grads[f"{path}.lora_B.weight"])
        for (index, path, _, _), part in zip(worn.pairs, columns, strict=True)
    ]
    return (Learner(worn.rows, local, None if whole else columns, grads_a, grads_b),)


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
        bundles: list[Bundle],
    ) -> tuple[Tensor, ...]:
        ys = tuple(
            functional.linear(x_TD, linear.weight, linear.bias).contiguous()
            for linear in siblings.linears
        )
        projections: list[Tensor] = []
        for bundle in bundles:
            h_MS = (bundle.read(x_TD[bundle.rows]) @ bundle.a_SD.T).mul_(bundle.scale_MS)
            for member in bundle.members:
                _add_rows(ys[member.index], bundle.rows, h_MS[:, member.columns], member.b_SE)
            if bundle.learners:
                projections.append(h_MS)
        ctx.save_for_backward(x_TD if projections else None, *projections)
        ctx.siblings = siblings
        ctx.bundles = bundles
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
        for bundle in ctx.bundles:
            h_MS = next(of_learning) if bundle.learners else None
            _bundle_backward(bundle, x_TD, h_MS, grads, grad_TD)
        return grad_TD, None, None, None


def _bundle_backward(
    bundle: Bundle,
    x_TD: Tensor | None,
    h_MS: Tensor | None,
    grads: Sequence[Tensor | None],
    grad_TD: Tensor | None,
) -> None:
    """Add a bundle's part to the gradient of x, and its learners' to their own."""
    parts: list[Tensor] = []
    for member in bundle.members:
        grad_TE = grads[member.index]
        if grad_TE is None:  # nothing was computed from this sibling
            some = next(grad for grad in grads if grad is not None)
            parts.append(some.new_zeros(len(some[bundle.rows]), len(member.b_SE)))
        else:
            parts.append(grad_TE[bundle.rows] @ member.b_SE.T)
    grad_MS = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).mul_(bundle.scale_MS)
    if grad_TD is not None and bundle.dropped is None:
        _add_rows(grad_TD, bundle.rows, grad_MS, bundle.a_SD)
    elif grad_TD is not None:
        grad_TD[bundle.rows] += bundle.read(grad_MS @ bundle.a_SD)
    for learner in bundle.learners:
        if x_TD is not None and h_MS is not None:
            x_MD = bundle.read(x_TD[learner.rows])
            _learn(learner, x_MD, h_MS[learner.local], grad_MS[learner.local], grads)


def _learn(
    learner: Learner,
    x_MD: Tensor,
    h_MS: Tensor,
    grad_MS: Tensor,
    grads: Sequence[Tensor | None],
) -> None:
    """From its own positions and columns alone: what is beside them may be NaN."""
    for index, columns, buffer in learner.grads_b:
        grad_TE = grads[index]
        if grad_TE is not None:
            _accumulate(buffer, grad_TE[learner.rows].T, h_MS[:, columns])
    if learner.columns is not None:
        own = [grad_MS[:, columns] for columns in learner.columns]
        grad_MS = own[0] if len(own) == 1 else torch.cat(own, -1)
    for columns, buffer in learner.grads_a:
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
        bundles = _bundles(self._paths, context.plan, rows, length)
        anchor = context.anchor if any(bundle.learners for bundle in bundles) else None
        return _apply(x_BLD.reshape(-1, x_BLD.shape[-1]), anchor, self, bundles)


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
