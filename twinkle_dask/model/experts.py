"""Adapters on fused routed experts: one parameter holds a projection of all experts.

Each token goes to K of E experts, and each expert's slice of a weight has its own A and B. Tokens
are sorted by expert and segment, so that both the base products and the adapters' are a few
contiguous matrix products:

    y_SO[s] = W_EOD[e_s] @ x_SD[s] + scale * B_e @ (A_e @ x_SD[s]),   e_s the expert of choice s

An adapter's weights lie as PEFT's ``target_parameters`` has them: A is (E * R, D), expert by
expert, and B is (O, R * E), rank by rank.

Shapes: T tokens (rows times length), K choices of each, S choices in all (T times K), E experts,
D in, O out, M choices of one segment, R rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from twinkle_dask.model.lora import PlanContext, Segment

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")

# An expert and the range of its choices in S.
Span: TypeAlias = tuple[int, int, int]


def can_adapt(module: nn.Module) -> bool:
    """Whether these are fused experts as most of transformers' mixtures have them.

    That is: gate and up in one (E, 2 I, D), down in one (E, D, I), no biases and no norm.
    """
    experts = cast("Any", module)
    shapes = {name: weight.dim() for name, weight in module.named_parameters(recurse=False)}
    return (
        shapes == dict.fromkeys(EXPERT_WEIGHTS, 3)
        and callable(getattr(experts, "_apply_gate", None))
        and getattr(experts, "has_gate", False)
        and not getattr(experts, "has_post_expert_norm", True)
        and not getattr(experts, "is_transposed", True)
    )


class AdaptedExperts:
    """Computes an experts module with the adapters of the current plan.

    Takes the place of the module's ``forward``; all else that reads the module finds it unchanged.
    The plan's segments must be over positions: experts see no rows.

    Attributes:
        module: The one that is adapted.
    """

    def __init__(self, experts: nn.Module, module_path: str, context: PlanContext) -> None:
        self.module = experts
        self._experts: Any = experts
        self._paths = tuple(f"{module_path}.{name}" for name in EXPERT_WEIGHTS)
        self._context = context
        self._unadapted = experts.forward
        self._experts.forward = self.forward

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Each token's experts' outputs, weighted and summed."""
        plan = self._context.plan
        up_path, down_path = self._paths
        worn = [item.segment for item in plan.worn(up_path)]
        if not worn:
            return self._unadapted(x_TD, experts_TK, weights_TK)
        up_EOD: Tensor = self._experts.gate_up_proj
        order_S, spans, spans_of = _sort(worn, experts_TK, len(up_EOD))
        num_choices = experts_TK.shape[1]
        inner = x_TD.index_select(0, order_S // num_choices)
        inner = self._product(up_path, up_EOD, inner, spans, worn, spans_of)
        inner = self._experts._apply_gate(inner)
        outer = self._product(down_path, self._experts.down_proj, inner, spans, worn, spans_of)
        outer = outer * weights_TK.reshape(-1)[order_S].unsqueeze(-1)
        back_S = torch.empty_like(order_S)
        back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        outer_TKD = outer.index_select(0, back_S).view(*experts_TK.shape, -1)
        return outer_TKD.sum(1).to(x_TD.dtype)

    def _product(
        self,
        path: str,
        weight_EOD: Tensor,
        x_SD: Tensor,
        spans: list[Span],
        worn: list[Segment],
        spans_of: list[list[Span]],
    ) -> Tensor:
        pieces = [
            _piece(path, segment, len(weight_EOD), own)
            for segment, own in zip(worn, spans_of, strict=True)
        ]
        learns = any(piece.grad_a_ERD is not None for piece in pieces)
        anchor = self._context.anchor if learns and torch.is_grad_enabled() else None
        return _apply(x_SD, anchor, weight_EOD, spans, pieces)


def _sort(
    worn: Sequence[Segment], experts_TK: Tensor, num_experts: int
) -> tuple[Tensor, list[Span], list[list[Span]]]:
    """Choices in the order of experts, within them of segments, within those of tokens.

    Returns:
        The order over S, the span of each expert, and those of each segment within them; experts
        without a token are left out.
    """
    device = experts_TK.device
    segment_T = torch.full((len(experts_TK),), len(worn), dtype=torch.int64, device=device)
    for i, segment in enumerate(worn):
        segment_T[segment.rows] = i
    kinds = len(worn) + 1
    kind_S = (experts_TK * kinds + segment_T[:, None]).flatten()
    order_S = torch.argsort(kind_S, stable=True)
    sizes = torch.bincount(kind_S, minlength=num_experts * kinds)
    counts = cast("list[int]", cast("Any", sizes).tolist())
    spans: list[Span] = []
    spans_of: list[list[Span]] = [[] for _ in worn]
    start = 0
    for expert in range(num_experts):
        first = start
        for i, count in enumerate(counts[expert * kinds : (expert + 1) * kinds]):
            if count and i < len(worn):
                spans_of[i].append((expert, start, start + count))
            start += count
        if start > first:
            spans.append((expert, first, start))
    return order_S, spans, spans_of


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """One segment's adapter on one projection.

    Attributes:
        grad_a_ERD: View of the segment's buffer; None if it does not learn.
        grad_b_ORE: Likewise.
    """

    spans: Sequence[Span]
    scale: float
    a_ERD: Tensor
    b_EOR: Tensor
    grad_a_ERD: Tensor | None
    grad_b_ORE: Tensor | None


def _piece(path: str, segment: Segment, num_experts: int, spans: list[Span]) -> _Piece:
    pair = segment.adapter.pair(path)
    if pair is None:
        raise ValueError(f"The adapter has one half of the experts' weights, but not {path}.")
    rank = segment.adapter.spec.rank

    def by_expert(a: Tensor) -> Tensor:
        return a.view(num_experts, rank, a.shape[1])

    def by_output(b: Tensor) -> Tensor:
        return b.view(b.shape[0], rank, num_experts)

    grads = segment.grads
    return _Piece(
        spans,
        segment.adapter.scale,
        by_expert(pair[0]),
        by_output(pair[1]).permute(2, 0, 1).contiguous(),
        None if grads is None else by_expert(grads[f"{path}.lora_A.weight"]),
        None if grads is None else by_output(grads[f"{path}.lora_B.weight"]),
    )


class _ExpertsProduct(torch.autograd.Function):
    """One projection of all experts, plus the segments' adapters.

    Backward returns the gradient of x and adds those of A and B to the segments' own buffers. Saved
    are x, only if a segment learns, and the scaled (M, R) projections.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_SD: Tensor,
        anchor: Tensor | None,  # only there so that autograd records this node
        weight_EOD: Tensor,
        spans: list[Span],
        pieces: list[_Piece],
    ) -> Tensor:
        y_SO = x_SD.new_empty(len(x_SD), weight_EOD.shape[1])
        for expert, start, stop in spans:
            torch.mm(x_SD[start:stop], weight_EOD[expert].T, out=y_SO[start:stop])
        projections: list[Tensor] = []
        for piece in pieces:
            parts: list[Tensor] = []
            for expert, start, stop in piece.spans:
                h_MR = (x_SD[start:stop] @ piece.a_ERD[expert].T).mul_(piece.scale)
                y_SO[start:stop].addmm_(h_MR, piece.b_EOR[expert].T)
                parts.append(h_MR)
            if piece.grad_a_ERD is not None and parts:
                projections.append(torch.cat(parts))
        ctx.save_for_backward(x_SD if projections else None, weight_EOD, *projections)
        ctx.spans = spans
        ctx.pieces = pieces
        return y_SO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - torch's decorator
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_SD, weight_EOD, *projections = ctx.saved_tensors
        grad_SO = grad_outputs[0].contiguous()
        grad_SD: Tensor | None = None
        if ctx.needs_input_grad[0]:
            grad_SD = grad_SO.new_empty(len(grad_SO), weight_EOD.shape[2])
            for expert, start, stop in ctx.spans:
                torch.mm(grad_SO[start:stop], weight_EOD[expert], out=grad_SD[start:stop])
        of_learning = iter(projections)
        for piece in ctx.pieces:
            h_MR = next(of_learning) if piece.grad_a_ERD is not None and piece.spans else None
            _piece_backward(piece, x_SD, h_MR, grad_SO, grad_SD)
        return grad_SD, None, None, None, None


def _piece_backward(
    piece: _Piece, x_SD: Tensor, h_MR: Tensor | None, grad_SO: Tensor, grad_SD: Tensor | None
) -> None:
    """Add one piece's part to the gradient of x and, if it learns, to its own gradients."""
    done = 0
    for expert, start, stop in piece.spans:
        grad_MO = grad_SO[start:stop]
        grad_MR = (grad_MO @ piece.b_EOR[expert]).mul_(piece.scale)
        if grad_SD is not None:
            grad_SD[start:stop].addmm_(grad_MR, piece.a_ERD[expert])
        if h_MR is not None and piece.grad_a_ERD is not None and piece.grad_b_ORE is not None:
            here_MR = h_MR[done : (done := done + stop - start)]
            piece.grad_a_ERD[expert].add_(grad_MR.T @ x_SD[start:stop])
            piece.grad_b_ORE[:, :, expert].add_(grad_MO.T @ here_MR)


# torch types `apply` as returning Any of any arguments.
_apply = cast("Callable[..., Tensor]", _ExpertsProduct.apply)  # pyright: ignore[reportUnknownMemberType]
