"""Rows as points: the final hidden state of each one's last token, scaled to length 1.

    e_D = h_D / |h_D|,    dL/dh_D = (g_D - (g_D . e_D) e_D) / |h_D|,    g_D = dL/de_D

Shapes: E rows that are embedded, D hidden.
"""

from dataclasses import dataclass

from torch import Tensor

from twinkle_dask.trainer.batch import Embedded
from twinkle_dask.types import Float32Array

# As torch.nn.functional.normalize has it: a hidden state of zeros stays one.
_LEAST_NORM = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """The embeddings of one slice of a pass, float32, with what their gradient needs."""

    rows: Embedded
    embeddings_ED: Tensor
    norm_E1: Tensor

    @classmethod
    def of(cls, hidden_D: Tensor, rows: Embedded) -> "Embeddings":
        """Embed some rows.

        Args:
            hidden_D: Final hidden states of all positions.
            rows: Where their last tokens are.
        """
        last_ED = hidden_D[rows.last_E].float()
        norm_E1 = last_ED.square().sum(-1, keepdim=True).sqrt().clamp(min=_LEAST_NORM)
        return cls(rows, last_ED / norm_E1, norm_E1)

    def add_gradient(self, grad_D: Tensor) -> None:
        """Add the derivatives by the hidden states to those of all positions."""
        slopes_ED = self.rows.slopes_ED
        if slopes_ED is None:
            return
        along_E1 = (slopes_ED * self.embeddings_ED).sum(-1, keepdim=True)
        across_ED = (slopes_ED - along_E1 * self.embeddings_ED) / self.norm_E1
        grad_D.index_add_(0, self.rows.last_E, across_ED.to(grad_D.dtype))

    def on_host(self) -> list[Float32Array]:
        """Each row's embedding."""
        return list(self.embeddings_ED.cpu().numpy().copy())
