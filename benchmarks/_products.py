"""The limit of training: the base model's matrix products and nothing else.

Adapters need the frozen weights twice, in ``y = x @ W.T`` and in ``grad_x = grad_y @ W``: that is
4 operations per weight and token. Results go into memory that is there already, since a fresh
allocation of this size costs page faults, which are no part of the limit.

Shapes: T tokens, D in, E out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

OPERATIONS_PER_WEIGHT = 4  # of a token's forward and backward


class ModelProducts:
    """Forward and backward products of linears of these shapes, each with a weight of its own.

    Args:
        shapes: (D, E) of each linear, in the order of the forward pass.
        num_tokens: T.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        self.operations = OPERATIONS_PER_WEIGHT * num_tokens * sum(d * e for d, e in shapes)
        self._weights = [random(out, width) for width, out in shapes]
        widths = {size for shape in shapes for size in shape}
        self._inputs = {size: random(num_tokens, size) for size in widths}
        self._outputs = {size: torch.empty_like(x_TD) for size, x_TD in self._inputs.items()}

    def step(self) -> None:
        """All products once."""
        for weight_ED in self._weights:
            width = weight_ED.shape[1]
            self._into(weight_ED.shape[0], self._inputs[width], weight_ED.T)
        for weight_ED in reversed(self._weights):
            self._into(weight_ED.shape[1], self._inputs[weight_ED.shape[0]], weight_ED)
        synchronize(self._weights[0].device)

    def _into(self, size: int, left: Tensor, right: Tensor) -> None:
        # What functional.linear calls without a bias, and it takes a place for the result.
        torch.mm(left, right, out=self._outputs[size])


class SquareProduct:
    """One large product, the best rate that this machine's matrix kernels reach."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.operations = 2 * size**3
        self._x, self._w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self._y = torch.empty_like(self._x)

    def step(self) -> None:
        """The product once, as a linear would do it."""
        torch.mm(self._x, self._w.T, out=self._y)
        synchronize(self._y.device)


def synchronize(device: torch.device) -> None:
    """Wait for what was started on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
