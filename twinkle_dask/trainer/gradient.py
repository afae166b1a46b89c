"""What a work adds to its run: the sum over its passes, and the part of one pass."""

from collections.abc import Mapping

import torch
from torch import Tensor

from twinkle_dask.trainer.layout import Layout


class Gradient:
    """The float32 sum over the passes of a work."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout = layout
        self._device = device
        self._sum: Tensor | None = None

    @property
    def flat(self) -> Tensor:
        """The sum so far, in the adapter's layout."""
        if self._sum is None:
            self._sum = self._layout.zeros(self._device)
        return self._sum

    def of_pass(self, dtype: torch.dtype) -> "PassGradient":
        """Zeros for one pass to fill in; nothing is added here until ``add``."""
        return PassGradient(self._layout, dtype, self._device)

    def add(self, part: "PassGradient") -> None:
        """Add what a pass found."""
        body = self._layout.body_size
        if self._sum is None:  # most often the only pass: a copy costs half of zeros and a sum
            self._sum = torch.empty(self._layout.size, device=self._device)
            self._sum[:body] = part.body
            self._sum[body:] = part.head
        else:
            self._sum[:body] += part.body
            self._sum[body:] += part.head


class PassGradient:
    """The gradient of one slice of a pass.

    Each weight of the body is written once, so a buffer in the dtype of the products holds it
    without loss; the head's sum grows chunk by chunk, in float32.

    Attributes:
        body: Flat.
        head: Flat.
        views: Of both, by weight name.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self.body = torch.zeros(layout.body_size, dtype=dtype, device=device)
        self.head = torch.zeros(layout.size - layout.body_size, device=device)
        self.views: Mapping[str, Tensor] = layout.views(self.body) | layout.head_views(self.head)
